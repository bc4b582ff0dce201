"""Prefill over what ranks have cached: pieces of a prompt, prefixes, packed sequences."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from golden import Array, AttentionConfig, ConfigError, ShapeError, empty_cache, forward
from golden.sharding import (
    Parallelism,
    RankCapture,
    ShardedLayer,
    encode_packed_sharded,
    encode_sharded,
    shard,
)
from golden.sharding.flash_decoding import core_groups
from tests.golden.layers import LAYERS, assert_within, integer_weights, small_integers
from tests.golden.sharding.drawn import encoded

PLAIN = LAYERS["gqa-bias-rms"]


def heads(count: int, kv_heads: int, **options: Any) -> AttentionConfig:
    return replace(PLAIN, num_attention_heads=count, num_key_value_heads=kv_heads, **options)


MESHES: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "both stages alike": ((8, 2), {"tp_degree": 4, "cp_degree": 2, "attention_dp_degree": 2}),
    "heads of the column": ((8, 4), {"tp_degree": 4, "cp_degree": 2}),
    "heads and rows": ((8, 4), {"tp_degree": 8, "cp_degree": 4, "attention_dp_degree": 2}),
    "rows": ((8, 2), {"tp_degree": 4, "attention_dp_degree": 2}),
    "tokens": ((4, 1), {"tp_degree": 4, "cores_per_group": 2}),
}


@pytest.mark.parametrize("mesh", MESHES)
def test_d27_a_rank_reads_its_prefill_heads_of_every_row(mesh: str) -> None:
    counts, degrees = MESHES[mesh]
    config = heads(*counts)
    weights, states = integer_weights(config), small_integers(0, 4, 8, config.hidden_size)
    layer = shard(config, weights, Parallelism(**degrees))
    caches: Any = layer.empty_caches(batch=4, max_length=8)
    whole: Any = empty_cache(config, batch=4, max_length=8)
    seen = RankCapture(frozenset({"k_prior", "v_prior"}))
    for piece in (slice(0, 4), slice(4, 8)):
        at = np.arange(8)[piece]
        prior = whole.prior(np.tile(at, (4, 1)))
        given = {"position_ids": at, "observe": seen}
        caches = encode_sharded(layer, states[:, piece], caches=caches, **given).caches
        whole = forward(config, weights, states[:, piece], position_ids=at, cache=whole).cache
    cores = layer.parallelism.cores_per_group
    for rank in range(layer.prefill.mesh.world_size):
        mine = list(layer.prefill.layout.kv_part(layer.prefill.part(rank)))
        for stage, values in (("k_prior", prior.k), ("v_prior", prior.v)):
            want = values[:, mine]
            if cores > 1:  # each core's tokens, one core after another
                want = np.concatenate([want[:, :, core::cores] for core in range(cores)], axis=2)
                assert len(core_groups(layer)[0]) == cores
            assert_within(seen.values[rank, stage], want, np.abs(want) * 2.0**-45)


def run(layer: ShardedLayer, states: Array, ids: list[int], lengths: int) -> tuple[Array, Any]:
    """Encode rows in two pieces for given sequence ids, in caches of two rows a rank."""
    caches: Any = layer.empty_caches(batch=4, max_length=lengths)
    outputs = []
    for piece in (slice(0, 4), slice(4, lengths)):
        result = encode_sharded(
            layer,
            states[:, piece],
            position_ids=np.arange(lengths)[piece],
            caches=caches,
            seq_ids=np.array(ids),
        )
        caches = result.caches
        outputs.append(result.output)
    return np.concatenate(outputs, axis=1), caches


@pytest.mark.parametrize("ids", [[3], [2, 0, 1], [1, 3]])
def test_d20_a_sequence_is_found_where_its_id_says(ids: list[int]) -> None:
    config = heads(8, 2)
    weights, states = integer_weights(config), small_integers(1, len(ids), 8, config.hidden_size)
    layer = shard(config, weights, Parallelism(tp_degree=4, cp_degree=2, attention_dp_degree=2))
    want, bound = encoded(config, weights, states, parts=1)
    got, caches = run(layer, states, ids, 8)
    assert_within(got, want, bound)
    for rank, cache in enumerate(caches):
        row = layer.decode.mesh.row_of(rank)
        filled = {int(i) for i in np.flatnonzero((cache.positions >= 0).any(axis=1))}
        assert filled == {i - 2 * row for i in ids if i // 2 == row}


def test_a_sequence_that_no_rank_owns_is_idle() -> None:
    config = heads(8, 2)
    weights, states = integer_weights(config), small_integers(1, 2, 8, config.hidden_size)
    layer = shard(config, weights, Parallelism(tp_degree=4, attention_dp_degree=2))
    got, caches = run(layer, states, [-1, 4], 8)
    assert weights.o_bias is None or np.array_equal(got, np.broadcast_to(weights.o_bias, got.shape))
    assert all((cache.positions == -1).all() for cache in caches)


def packed(sharded: ShardedLayer, q_len: int, batch: int = 1, **options: Any) -> Any:
    states = small_integers(0, batch, q_len, sharded.config.hidden_size)
    given = {"query_lens": [2, 2], "key_lens": [2, 2]} | options
    caches = given.pop("caches", None) or sharded.empty_caches(batch=2, max_length=4)
    return encode_packed_sharded(sharded, states, caches=caches, **given)


def layer_of(**degrees: Any) -> ShardedLayer:
    config = heads(4, 1)
    return shard(config, integer_weights(config), Parallelism(**degrees))


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a row that cannot be cut": (
        lambda: packed(layer_of(tp_degree=4, cp_degree=4), 6),
        ConfigError,
        "q_len must be a multiple of cp_degree, got 6 and 4; pad the prompt",
    ),
    "pieces of a row": (
        lambda: packed(layer_of(tp_degree=4, sequence_parallel=True), 6),
        ConfigError,
        "q_len must be a multiple of tp_degree for sequence_parallel, got 6 and 4",
    ),
    "two rows": (
        lambda: packed(layer_of(tp_degree=2), 4, batch=2),
        ShapeError,
        "hidden_states must be one row of at least 4 tokens, got (2, 4)",
    ),
    "too few tokens": (
        lambda: packed(layer_of(tp_degree=2), 2),
        ShapeError,
        "hidden_states must be one row of at least 4 tokens, got (1, 2)",
    ),
    "caches": (
        lambda: packed(
            layer_of(tp_degree=2), 4, caches=[empty_cache(heads(2, 1), batch=2, max_length=4)]
        ),
        ShapeError,
        "caches must be one per rank, 2, got 1",
    ),
    "rows of caches": (
        lambda: packed(
            layer_of(tp_degree=2, attention_dp_degree=2),
            4,
            caches=layer_of(tp_degree=2).empty_caches(batch=2, max_length=4),
        ),
        ShapeError,
        "the caches must have a row per sequence, 2, got 4",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_packed_rows_that_cannot_be_are_named(what: str) -> None:
    make, kind, message = REFUSED[what]
    with pytest.raises(kind, match=re.escape(message)):
        make()
