"""Any stage of any rank can be asked for, and is the rank's part of the whole layer's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from golden import (
    STAGES,
    Accumulation,
    Array,
    AttentionConfig,
    Capture,
    Observer,
    context_encoding,
)
from golden.sharding import (
    COLLECTIVE_STAGES,
    PADDING,
    Parallelism,
    RankCapture,
    encode_sharded,
    generate_sharded,
    shard,
    token_plan,
)
from tests.golden.layers import LAYERS, assert_within, gamma, integer_weights, small_integers
from tests.golden.sharding.drawn import encoded

Q_STAGES = ("q_product", "q_proj", "q_clip")
KV_STAGES = ("k_product", "k_proj", "k_clip", "v_product", "v_proj", "v_clip")
HEAD_STAGES = ("q_rope", "q_temperature")
ROW_STAGES = ("qk", "scores", "softcap", "exp", "denominator", "weights", "attn")


def capture_both(
    config: AttentionConfig, parallelism: Parallelism, *, batch: int = 2, q_len: int = 8
) -> tuple[dict[str, Array], dict[tuple[int, str], Array]]:
    """Return the stages of the whole layer and those of every rank."""
    weights = integer_weights(config)
    states = small_integers(1, batch, q_len, config.hidden_size)
    whole, ranks = Capture(), RankCapture()
    options = {"position_ids": np.arange(q_len)}
    context_encoding(config, weights, states, observe=whole, **options)
    encode_sharded(shard(config, weights, parallelism), states, observe=ranks, **options)
    return whole.values, ranks.values


def taken(value: Array, heads: tuple[int, ...], axis: int, width: int) -> tuple[Array, Array]:
    """Return the blocks of heads that are no padding, and which of the rank's they are."""
    kept = [slot for slot, head in enumerate(heads) if head != PADDING]
    blocks = np.stack(np.split(value, value.shape[axis] // width, axis=axis))
    return blocks[[heads[slot] for slot in kept]], np.array(kept, dtype=np.int64)


def stage_limits(config: AttentionConfig, values: dict[str, Array]) -> dict[str, float]:
    """Bound by how much a stage may differ between arrays of another shape.

    Integers project exactly and elementwise steps round alike, so only sums that BLAS may order
    otherwise differ: products of queries and keys by `2 gamma(head_dim) |q| |k|`, scores by that
    times the scale, and what follows an exponential by the relative error `2 delta` that two scores
    `delta` apart leave in a weight, with the roundings of sums over the keys.
    """
    q, k = (np.linalg.norm(values[name], axis=-1).max() for name in (queries(config), "k_cache"))
    n, d = values["qk"].shape[-1], config.head_dim
    product = 2.0 * gamma(d) * q * k
    score = config.softmax_scale * product + gamma(8) * config.softmax_scale * q * k
    weight = float(np.expm1(4.0 * score + gamma(2 * n + 16)))
    after = dict.fromkeys(("exp", "denominator", "weights", "attn"), weight)
    sizes = {"denominator": float(n), "attn": float(np.abs(values["v_cache"]).max())}
    limits = {name: size * sizes.get(name, 1.0) for name, size in after.items()}
    return limits | {"qk": product, "scores": score, "softcap": score}


def queries(config: AttentionConfig) -> str:
    if config.temperature_tuning is not None:
        return "q_temperature"
    post = config.qk_norm is not None and config.qk_norm.placement == "post_rope"
    return "q_norm" if post else "q_rope"


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "degrees",
    [
        Parallelism(tp_degree=2),
        Parallelism(tp_degree=3),
        Parallelism(tp_degree=8, cp_degree=4),
        Parallelism(tp_degree=4, cp_degree=2, sequence_parallel=True),
        Parallelism(tp_degree=4, attention_dp_degree=2),
    ],
    ids=["tp2", "tp3-padded", "tp2-cp4", "tp2-cp2-sp", "tp4-dp2"],
)
def test_a_ranks_stages_are_its_heads_and_tokens_of_the_layers(
    layer: str, degrees: Parallelism
) -> None:
    config = LAYERS[layer]
    if config.attention_chunk_size is not None:
        if degrees.attention_dp_degree > 1:
            return  # refused: see test_refusals
        config = replace(config, attention_chunk_size=4)
    if config.learned_sinks_size is not None and degrees.tp_degree in (3, 8):
        return
    whole, ranks = capture_both(config, degrees)
    sharded = shard(config, integer_weights(config), degrees)
    stage, plan = sharded.prefill, token_plan(config, degrees, 8)
    compared, limits = 0, stage_limits(config, whole)
    for (rank, name), got in ranks.items():
        q, kv = (f(stage.part(rank)) for f in (stage.layout.q_part, stage.layout.kv_part))
        tokens = plan.queries[rank]
        if name in Q_STAGES + KV_STAGES:
            heads = q if name in Q_STAGES else kv
            want, kept = taken(whole[name][:, tokens], heads, 2, config.head_dim)
            mine, _ = taken(got, tuple(range(len(heads))), 2, config.head_dim)
        elif name in HEAD_STAGES + ROW_STAGES:
            want, kept = taken(whole[name][:, :, tokens], q, 1, 1)
            mine, _ = taken(got, tuple(range(len(q))), 1, 1)
        elif name in ("k_cache", "v_cache", "k_gathered", "v_gathered"):
            source = whole[name.replace("gathered", "cache")]
            source = source if "gathered" in name else source[:, :, tokens]
            want, kept = taken(source, kv, 1, 1)
            mine, _ = taken(got, tuple(range(len(kv))), 1, 1)
        else:
            continue
        compared += 1
        limit = limits.get(name, 0.0)
        assert (np.abs(mine[kept] - want) <= limit).all(), f"rank {rank}, stage {name}"
    assert compared >= 12 * degrees.tp_degree


def test_the_shares_of_a_row_add_up_to_the_product_and_one_bias() -> None:
    config = LAYERS["gqa-bias-rms"]
    whole, ranks = capture_both(config, Parallelism(tp_degree=4, cp_degree=2))
    weights = integer_weights(config)
    bound = encoded(config, weights, small_integers(1, 2, 8, config.hidden_size), parts=2)[1]
    bias = weights.o_bias
    assert bias is not None
    for row, tokens in (((0, 1), slice(0, 4)), ((2, 3), slice(4, 8))):
        total = sum(ranks[rank, "o_product"] for rank in row)
        for rank in row:
            assert np.array_equal(ranks[rank, "o_reduced"], total)
            assert np.array_equal(ranks[rank, "o_proj"], total + bias)
            assert ranks[rank, "returned"].shape == (2, 8, 8)
        assert_within(total, whole["o_product"][:, tokens], bound[:, tokens])


def test_every_collective_stage_is_seen_by_some_rank() -> None:
    config = replace(LAYERS["chunk-post-norm"], attention_chunk_size=4)
    seen = {stage for _, stage in capture_both(config, Parallelism(tp_degree=4, cp_degree=2))[1]}
    plain = LAYERS["mha"]
    ring = Parallelism(tp_degree=2, cp_degree=2, kv_exchange="ring")
    seen |= {stage for _, stage in capture_both(plain, ring)[1]}
    capture = RankCapture()
    flash = replace(plain, num_key_value_heads=1)
    layer = shard(flash, integer_weights(flash), Parallelism(tp_degree=2, cores_per_group=2))
    caches = layer.empty_caches(batch=1, max_length=4)
    generate_sharded(layer, np.ones((1, 1, 8)), position_ids=[[0]], caches=caches, observe=capture)
    seen |= {stage for _, stage in capture.values}
    prior, alone = RankCapture(), shard(plain, integer_weights(plain), Parallelism())
    caches: Any = alone.empty_caches(batch=1, max_length=2)
    for at in range(2):
        given: dict[str, Any] = {"position_ids": [at], "caches": caches, "observe": prior}
        caches = encode_sharded(alone, np.ones((1, 1, 8)), **given).caches
    seen |= {stage for _, stage in prior.values}
    assert seen - STAGES.keys() == COLLECTIVE_STAGES.keys()


def test_a_capture_keeps_the_ranks_and_stages_it_was_asked_for() -> None:
    config, capture = LAYERS["mha"], RankCapture(frozenset({"q_rope", "o_reduced"}), frozenset({1}))
    layer = shard(config, integer_weights(config), Parallelism(tp_degree=2))
    encode_sharded(layer, np.ones((1, 4, 8)), position_ids=np.arange(4), observe=capture)
    assert sorted(capture.values) == [(1, "o_reduced"), (1, "q_rope")]


def test_an_observer_changes_its_rank_alone_until_ranks_meet() -> None:
    config = LAYERS["mha"]
    layer = shard(config, integer_weights(config), Parallelism(tp_degree=2))
    states, positions = small_integers(0, 1, 4, 8), np.arange(4)
    before, after = RankCapture(), RankCapture()

    def doubled(rank: int) -> Observer:
        keep = after(rank)

        def observe(stage: str, value: Array, how: Accumulation | None = None, /) -> Array:
            return keep(stage, 2.0 * value if (rank, stage) == (1, "attn") else value, how)

        return observe

    encode_sharded(layer, states, position_ids=positions, observe=before)
    encode_sharded(layer, states, position_ids=positions, observe=doubled)
    changed = {
        key for key, value in before.values.items() if not np.array_equal(value, after.values[key])
    }
    joined = {(rank, stage) for rank in (0, 1) for stage in ("o_reduced", "o_proj", "returned")}
    assert changed == {(1, "attn"), (1, "o_product")} | joined
