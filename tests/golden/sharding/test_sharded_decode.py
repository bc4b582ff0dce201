"""Token generation on ranks: transitions from prefill, batches, other caches, flash decoding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from golden import (
    AttentionConfig,
    Cache,
    ContiguousCache,
    chunk_cache,
    empty_cache,
    forward,
    paged_cache,
    rolling_cache,
    sharded_cache,
)
from golden.sharding import (
    CoreCache,
    Parallelism,
    ShardedLayer,
    encode_sharded,
    generate_sharded,
    shard,
)
from tests.golden.layers import LAYERS, assert_within, integer_weights, small_integers
from tests.golden.sharding.drawn import check, drawn, encoded, plain

TRANSITIONS = [
    ((4, 2), (1, 1, 1)),
    ((14, 2), (4, 1, 1)),
    ((6, 2), (4, 2, 1)),
    ((4, 4), (8, 4, 1)),
    ((8, 2), (8, 8, 1)),
    ((7, 1), (4, 4, 1)),
    ((4, 1), (4, 1, 2)),
    ((8, 2), (8, 1, 4)),
    ((4, 2), (2, 2, 2)),
    ((14, 2), (8, 4, 4)),
    ((8, 2), (8, 4, 2)),
    ((12, 4), (16, 8, 2)),
    ((6, 3), (6, 3, 1)),
    ((8, 8), (64, 8, 1)),
    ((8, 8), (64, 16, 8)),
    ((8, 4), (64, 1, 8)),
]


@pytest.mark.parametrize(("heads", "degrees"), TRANSITIONS)
@pytest.mark.parametrize("padding", ["none", "right"])
def test_d25_prefill_on_one_mesh_and_eight_steps_on_another(
    heads: tuple[int, int], degrees: tuple[int, int, int], padding: str
) -> None:
    check(drawn(plain(heads, degrees, padding=padding, size=2), 3, steps=8))


@pytest.mark.parametrize("dispatch", ["AR_AG", "RS_AG", "AG_AR"])
@pytest.mark.parametrize("wiring", ["trn2", "switch", "pds"])
def test_d22_dispatch_orders_agree_on_every_wiring(dispatch: str, wiring: str) -> None:
    case = drawn(plain((8, 8), (64, 8, 8), ep_dispatch=dispatch), 4, steps=1)
    check(replace(case, parallelism=replace(case.parallelism, eight_by_eight=wiring)))


def test_a_rank_caches_its_heads_and_its_rows() -> None:
    config = LAYERS["gqa-bias-rms"]
    weights, states = integer_weights(config), small_integers(0, 4, 8, 8)
    whole = forward(
        config,
        weights,
        states,
        position_ids=np.arange(8),
        cache=empty_cache(config, batch=4, max_length=8),
    ).cache
    layer = shard(config, weights, Parallelism(tp_degree=8, cp_degree=4, attention_dp_degree=2))
    result = encode_sharded(layer, states, position_ids=np.arange(8))
    # integers project exactly, and norm and RoPE round each head by itself
    for rank, cache in enumerate(result.caches):
        heads = layer.decode.layout.kv_part(layer.decode.part(rank))
        rows = slice(2 * layer.decode.mesh.row_of(rank), 2 * layer.decode.mesh.row_of(rank) + 2)
        assert isinstance(cache, ContiguousCache)
        assert np.array_equal(cache.k, whole.k[rows][:, heads])
        assert np.array_equal(cache.v, whole.v[rows][:, heads])
        assert np.array_equal(cache.positions, whole.positions[rows])


CACHES: dict[str, tuple[str, Any]] = {
    "rolling": ("window-sinks", lambda config, rows: rolling_cache(config, batch=rows)),
    "chunk": ("chunk-post-norm", lambda config, rows: chunk_cache(config, batch=rows)),
    "paged": (
        "gqa-bias-rms",
        lambda config, rows: paged_cache(
            config,
            num_blocks=rows * 8,
            block_size=2,
            block_tables=np.arange(rows * 8)[::-1].reshape(rows, 8),
        ),
    ),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("degrees", [(4, 1, 1), (4, 2, 1), (4, 2, 2)])
def test_ranks_may_have_caches_of_any_kind(kind: str, degrees: tuple[int, int, int]) -> None:
    name, make = CACHES[kind]
    config = LAYERS[name]
    if kind == "chunk":
        config, degrees = replace(config, attention_chunk_size=4), (*degrees[:2], 1)
    tp, cp, dp = degrees
    weights = integer_weights(config)
    layer = shard(config, weights, Parallelism(tp_degree=tp, cp_degree=cp, attention_dp_degree=dp))
    caches = tuple(make(layer.decode.config, 2 // dp) for _ in range(tp))
    run_beside(layer, config, caches, steps=6)


def run_beside(
    layer: ShardedLayer, config: AttentionConfig, caches: tuple[Cache, ...], *, steps: int
) -> tuple[Cache, ...]:
    """Prefill 8 tokens and decode on all ranks; assert the outputs of one whole encoding."""
    states = small_integers(2, 2, 8 + steps, 8)
    parts = layer.parallelism.cores_per_group
    want, bound = encoded(config, integer_weights(config), states, parts=parts)
    result = encode_sharded(layer, states[:, :8], position_ids=np.arange(8), caches=caches)
    assert_within(result.output, want[:, :8], bound[:, :8])
    for at in range(8, 8 + steps):
        token = slice(at, at + 1)
        places = np.full((2, 1), at)
        result = generate_sharded(
            layer, states[:, token], position_ids=places, caches=result.caches
        )
        for output in result.outputs:
            assert_within(output, want[:, token], bound[:, token])
    return result.caches


def test_d20_sequences_find_the_rank_that_owns_their_row() -> None:
    config = LAYERS["gqa-bias-rms"]
    weights = integer_weights(config)
    layer = shard(config, weights, Parallelism(tp_degree=4, attention_dp_degree=2))
    caches, states = layer.empty_caches(batch=4, max_length=8), small_integers(0, 4, 5, 8)
    want, bound = encoded(config, weights, states, parts=1)
    for row, seq_id in enumerate((3, 0, 2, 1)):  # one prompt at a time, in any order
        pair = np.stack([states[row, :4], states[row, :4]])
        ids, at = np.array([seq_id, -1]), np.stack([np.arange(4), np.full(4, -1)])
        caches = encode_sharded(layer, pair, position_ids=at, caches=caches, seq_ids=ids).caches
    order = np.array([1, 0, 2, 3])  # any order within the rows of a data-parallel rank
    rows = [np.flatnonzero(np.array([3, 0, 2, 1]) == seq)[0] for seq in order]
    call: dict[str, Any] = {"position_ids": np.full((4, 1), 4), "seq_ids": order}
    got = generate_sharded(layer, states[rows, 4:], caches=caches, **call)
    for output in got.outputs:
        assert_within(output, want[rows, 4:], bound[rows, 4:])


def test_d20_a_sequence_of_another_rank_is_idle() -> None:
    config = replace(LAYERS["gqa-bias-rms"], num_key_value_heads=1)
    layer = shard(config, integer_weights(config), Parallelism(tp_degree=2, attention_dp_degree=2))
    caches = layer.empty_caches(batch=2, max_length=4)
    result = generate_sharded(
        layer,
        small_integers(0, 2, 1, 8),
        position_ids=np.zeros((2, 1), int),
        caches=caches,
        seq_ids=np.array([1, 0]),
    )
    for cache in result.caches:
        assert isinstance(cache, ContiguousCache)
        assert (cache.positions == -1).all()


@pytest.mark.parametrize("dp", [1, 2])
def test_drafts_see_each_other_as_the_tree_says(dp: int) -> None:
    config = replace(LAYERS["gqa-bias-rms"], num_key_value_heads=1)
    weights, states = integer_weights(config), small_integers(0, 2, 7, 8)
    layer = shard(config, weights, Parallelism(tp_degree=4, attention_dp_degree=dp))
    # a tree sees no more than a chain
    bound = encoded(config, weights, states, parts=2, few=False)[1][:, 4:]
    tree = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=bool)
    for mask in (tree, np.stack([tree, np.tril(np.ones((3, 3), bool))])):
        options: dict[str, Any] = {"position_ids": np.array([[4, 5, 6]] * 2), "active_mask": mask}
        whole = forward(
            config,
            weights,
            states[:, :4],
            position_ids=np.arange(4),
            cache=empty_cache(config, batch=2, max_length=8),
        ).cache
        want = forward(config, weights, states[:, 4:], cache=whole, **options).output
        caches = encode_sharded(
            layer,
            states[:, :4],
            position_ids=np.arange(4),
            caches=layer.empty_caches(batch=2, max_length=8),
        ).caches
        got = generate_sharded(layer, states[:, 4:], caches=caches, **options)
        for output in got.outputs:
            assert_within(output, want, bound)


@pytest.mark.parametrize("cores", [2, 4, 8])
@pytest.mark.parametrize("options", [{}, {"sinks": True, "mask": "window3"}, {"draft": 2}])
def test_d26_flash_decoding_over_the_ranks_of_a_head(cores: int, options: Any) -> None:
    case = drawn(plain((8, 1), (8, 1, 1), cores=2, **options), 5, steps=8)
    parallelism = replace(case.parallelism, cores_per_group=cores)
    check(replace(case, parallelism=parallelism))


def test_d21_a_group_holds_between_its_ranks_what_a_core_sharded_cache_does() -> None:
    config = replace(LAYERS["gqa-bias-rms"], num_key_value_heads=1, qk_norm=None)
    layer = shard(config, integer_weights(config), Parallelism(tp_degree=4, cores_per_group=4))
    whole: Any = sharded_cache(config, batch=2, max_length=16, cores=4)
    caches = run_beside(layer, config, layer.empty_caches(batch=2, max_length=16), steps=3)
    states = small_integers(2, 2, 11, 8)
    whole = forward(
        config, integer_weights(config), states, position_ids=np.arange(11), cache=whole
    ).cache
    for core, cache in zip(whole.cores, caches, strict=True):
        assert isinstance(cache, CoreCache)
        assert np.array_equal(cache.held.positions, core.positions)
        assert np.array_equal(cache.held.k, core.k)
