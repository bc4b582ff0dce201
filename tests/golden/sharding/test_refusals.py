"""Every combination that the module documents as invalid says so, in one sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from golden import AttentionConfig, ConfigError, ShapeError, empty_cache
from golden.sharding import (
    Parallelism,
    RankCapture,
    ShardedLayer,
    all_to_all,
    core_cache,
    encode_sharded,
    generate_sharded,
    reduce_scatter,
    shard,
)
from tests.golden.layers import LAYERS, integer_weights, small_integers

PLAIN = LAYERS["gqa-bias-rms"]


def layer(config: AttentionConfig = PLAIN, **degrees: Any) -> ShardedLayer:
    return shard(config, integer_weights(config), Parallelism(**degrees))


def heads(count: int, kv_heads: int, **options: Any) -> AttentionConfig:
    return replace(PLAIN, num_attention_heads=count, num_key_value_heads=kv_heads, **options)


def encode(sharded: ShardedLayer, batch: int, q_len: int, **options: Any) -> Any:
    states = small_integers(0, batch, q_len, sharded.config.hidden_size)
    return encode_sharded(sharded, states, **({"position_ids": np.arange(q_len)} | options))


def generate(sharded: ShardedLayer, batch: int, **options: Any) -> Any:
    states = small_integers(0, batch, 1, sharded.config.hidden_size)
    caches = sharded.empty_caches(batch=batch, max_length=4)
    given = {"position_ids": np.zeros((batch, 1), int), "caches": caches} | options
    return generate_sharded(sharded, states, **given)


CHUNKED = LAYERS["chunk-post-norm"]

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "tp % cp": (
        lambda: Parallelism(tp_degree=6, cp_degree=4),
        "tp_degree must be a multiple of cp_degree, got 6 and 4",
    ),
    "tp % dp": (
        lambda: Parallelism(tp_degree=6, attention_dp_degree=4),
        "tp_degree must be a multiple of attention_dp_degree, got 6 and 4",
    ),
    "cp < dp": (
        lambda: Parallelism(tp_degree=8, cp_degree=2, attention_dp_degree=4),
        "cp_degree must be a multiple of attention_dp_degree when both exceed 1, got 2 and 4",
    ),
    "cp % dp": (
        lambda: Parallelism(tp_degree=12, cp_degree=3, attention_dp_degree=2),
        "cp_degree must be a multiple of attention_dp_degree when both exceed 1, got 3 and 2",
    ),
    "degree 0": (lambda: Parallelism(tp_degree=0), "tp_degree must be positive, got 0"),
    "strided without cp": (
        lambda: Parallelism(tp_degree=2, strided=True),
        "strided requires cp_degree above 1, got 1",
    ),
    "flash decoding with cp": (
        lambda: Parallelism(tp_degree=4, cp_degree=2, cores_per_group=2),
        "cores_per_group above 1 (flash decoding) requires cp_degree and attention_dp_degree of 1",
    ),
    "dispatch": (
        lambda: Parallelism(ep_dispatch="AG"),  # type: ignore[arg-type]
        "ep_dispatch must be one of AR_AG, RS_AG, AG_AR, got 'AG'",
    ),
    "exchange": (
        lambda: Parallelism(kv_exchange="send"),  # type: ignore[arg-type]
        "kv_exchange must be one of all_gather, ring, got 'send'",
    ),
    "reduction dtype": (
        lambda: Parallelism(reduce_dtype="float12"),
        "format must be one of float64, float32",
    ),
    "dp needs as many heads as tp": (
        lambda: layer(heads(16, 16), tp_degree=8, attention_dp_degree=2),
        "DP configuration is not supported: a rank must have as many key/value heads in prefill "
        "as in decode, got 2 and 4 of 16",
    ),
    "cp decode needs world >= kv": (
        lambda: layer(heads(8, 8), tp_degree=4, cp_degree=2),
        "tp_degree must be at least num_key_value_heads for decode after a context-parallel "
        "prefill, got 4 and 8",
    ),
    "cp and dp need world / dp >= kv": (
        lambda: layer(heads(8, 8), tp_degree=8, cp_degree=4, attention_dp_degree=2),
        "tp_degree / attention_dp_degree must be at least num_key_value_heads after a "
        "context-parallel prefill of another degree, got 4 and 8",
    ),
    "copies of heads": (
        lambda: layer(heads(6, 3), tp_degree=40, cp_degree=8, attention_dp_degree=2),
        "prefill must leave as many copies of a key/value head as decode needs, got 8 and 12 with "
        "cp_degree 8 and attention_dp_degree 2",
    ),
    "sinks on padded heads": (
        lambda: layer(heads(6, 2, learned_sinks_size=1), tp_degree=4),
        "num_attention_heads must be a multiple of the ranks of a row when a layer has learned "
        "sinks, got 6 and 4",
    ),
    "sinks on padded heads of decode": (
        lambda: layer(heads(2, 1, learned_sinks_size=1), tp_degree=4, cp_degree=2),
        "sinks, got 2 and 4",
    ),
    "strided with a window": (
        lambda: layer(replace(PLAIN, sliding_window=3), tp_degree=2, cp_degree=2, strided=True),
        "strided requires a layer without sliding_window, got 3",
    ),
    "strided with chunks": (
        lambda: layer(
            replace(CHUNKED, attention_chunk_size=4), tp_degree=2, cp_degree=2, strided=True
        ),
        "strided requires a layer without attention_chunk_size",
    ),
    "chunks with dp": (
        lambda: layer(CHUNKED, tp_degree=2, attention_dp_degree=2),
        "attention_dp_degree must be 1 for a layer with attention_chunk_size, got 2",
    ),
    "chunks with flash decoding": (
        lambda: layer(CHUNKED, tp_degree=2, cores_per_group=2),
        "cores_per_group must be 1 (no flash decoding) for a layer with attention_chunk_size",
    ),
    "chunk % cp": (
        lambda: layer(CHUNKED, tp_degree=2, cp_degree=2),
        "attention_chunk_size must be a multiple of cp_degree, got 3 and 2",
    ),
    "interleave without chunks": (
        lambda: layer(tp_degree=2, cp_degree=2, interleave="between"),
        "interleave 'between' requires attention_chunk_size and cp_degree above 1, got None and 2",
    ),
    "interleave unknown": (
        lambda: Parallelism(interleave="both"),  # type: ignore[arg-type]
        "interleave must be one of none, after_global, between, before_global, got 'both'",
    ),
    "flash decoding needs replication": (
        lambda: layer(tp_degree=4, cores_per_group=2, strategy="convert-to-mha"),
        "flash decoding requires strategy 'replicate-to-tp-degree'",
    ),
    "flash decoding needs replicas": (
        lambda: layer(tp_degree=2, cores_per_group=2),
        "cores_per_group must divide the ranks that share a key/value head, got 2 and 1",
    ),
    "batch % dp in prefill": (
        lambda: encode(layer(tp_degree=4, attention_dp_degree=2), 3, 4),
        "the batch must be a multiple of attention_dp_degree, got 3 and 2",
    ),
    "batch % dp in decode": (
        lambda: generate(layer(tp_degree=4, attention_dp_degree=2), 3),
        "the batch must be a multiple of attention_dp_degree, got 3 and 2",
    ),
    "batch % tp with RS_AG": (
        lambda: generate(layer(tp_degree=4, attention_dp_degree=2, ep_dispatch="RS_AG"), 2),
        "ep_dispatch RS_AG requires a batch that is a multiple of tp_degree, got 2 and 4",
    ),
    "q_len % cp": (
        lambda: encode(layer(tp_degree=2, cp_degree=2), 1, 7),
        "q_len must be a multiple of cp_degree, got 7 and 2; pad the prompt",
    ),
    "last chunk % cp": (
        lambda: encode(
            layer(replace(CHUNKED, attention_chunk_size=4), tp_degree=2, cp_degree=2), 1, 7
        ),
        "q_len % attention_chunk_size must be a multiple of cp_degree, got 3 and 2",
    ),
    "q_len % tp with sequence parallel": (
        lambda: encode(layer(tp_degree=4, cp_degree=2, sequence_parallel=True), 1, 6),
        "q_len must be a multiple of tp_degree for sequence_parallel, got 6 and 4",
    ),
    "stage": (
        lambda: RankCapture(frozenset({"o_sum"})),
        "got o_sum",
    ),
    "positions beyond a core": (
        lambda: core_cache(PLAIN, batch=1, max_length=4, core=0, cores=2).write(
            np.zeros((1, 2, 1, 4)), np.zeros((1, 2, 1, 4)), np.array([[4]])
        ),
        "positions must be below 4, 2 cores of 2 slots, got 4",
    ),
    "core": (
        lambda: core_cache(PLAIN, batch=1, max_length=4, core=2, cores=2),
        "core below cores, got 1, 4, core 2 of 2",
    ),
    "flash decoding's caches": (
        lambda: generate(
            layer(heads(2, 1), tp_degree=2, cores_per_group=2),
            1,
            caches=[empty_cache(heads(1, 1), batch=1, max_length=4)] * 2,
        ),
        "caches must be those of ShardedLayer.empty_caches for flash decoding, got "
        "ContiguousCache on rank 0",
    ),
}


@pytest.mark.parametrize("rule", REFUSED)
def test_an_invalid_combination_says_which_rule_it_breaks(rule: str) -> None:
    make, message = REFUSED[rule]
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()


SHAPES: dict[str, tuple[Callable[[], Any], str]] = {
    "caches in prefill": (
        lambda: encode(layer(tp_degree=2), 1, 4, caches=[]),
        "caches must be one per rank, 2, got 0",
    ),
    "caches in decode": (
        lambda: generate(layer(tp_degree=2), 1, caches=[]),
        "caches must be one per rank, 2, got 0",
    ),
    "seq_ids": (
        lambda: generate(layer(tp_degree=2), 2, seq_ids=np.zeros(3, int)),
        "seq_ids must be integers of shape (2,), got int64 (3,)",
    ),
    "seq_ids of another type": (
        lambda: encode(layer(tp_degree=2), 2, 4, seq_ids=np.zeros(2)),
        "seq_ids must be integers of shape (2,), got float64 (2,)",
    ),
    "hidden_states": (
        lambda: encode_sharded(layer(), np.zeros((1, 4, 9)), position_ids=np.arange(4)),
        "hidden_states must have shape (any, any, 8), (batch, q_len, hidden), got (1, 4, 9)",
    ),
    "reduce-scatter": (
        lambda: reduce_scatter([np.zeros((3, 4))] * 2, 0),
        "axis 0 must divide by the 2 ranks of the group, got length 3",
    ),
    "all-to-all": (
        lambda: all_to_all([np.zeros((3, 4))] * 2, 0, 1),
        "axis 0 must divide by the 2 ranks of the group, got length 3",
    ),
}


@pytest.mark.parametrize("what", SHAPES)
def test_arrays_that_do_not_fit_are_named(what: str) -> None:
    make, message = SHAPES[what]
    with pytest.raises(ShapeError, match=re.escape(message)):
        make()
