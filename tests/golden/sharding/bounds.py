"""How far a rank's output may lie from the whole layer's: at worst, and in all likelihood.

Both hold for layers whose weights and inputs are small integers: projections are exact however
their sums are cut, and what follows them element by element rounds alike on every rank
(`test_rank_stages.py` holds those stages to equal bits). What differs is the order of sums: of a
score, of a row's softmax and its mix of values, of partial softmaxes that are joined, and of the
output projection over the ranks.
"""

from __future__ import annotations

import math

import numpy as np

from golden import Array, AttentionConfig, AttentionWeights, Lora, Positions, layer_mask
from golden.attention import grouped_matmul
from tests.golden.layers import U, attend_bound, final_queries, gamma, seen

LOW_RANK = 2
"""Rank of the adapters."""

DEVIATIONS = 7.0
"""A normal variable lies further out once in 4e11 draws: once in 10,000 runs of 4e7 elements."""


def worst_case(
    config: AttentionConfig,
    weights: AttentionWeights,
    lora: Lora | None,
    values: dict[str, Array],
    positions: Positions,
    *,
    parts: int,
) -> Array:
    """Bound the difference whatever the roundings.

    Attention differs by `attend_bound`, doubled where it was joined of `parts` partial softmaxes,
    whose shares `exp(l_p - l)` err by twice the bound of a logsumexp and a few roundings each and
    mix outputs no larger than the largest value; so bounded, rows may also see fewer keys. The
    output projection sums the same `num_attention_heads * head_dim` terms and the low-rank ones in
    another order over the ranks: `gamma` of their number of the sum of magnitudes, on either side.
    Heads of zeros add nothing.

    Args:
        config: the layer.
        weights: small integers.
        lora: adapters of small integers, None for none.
        values: every stage of the whole layer.
        positions: `(batch, length)`.
        parts: partial softmaxes that a rank joins; 1 for none.

    Returns:
        `(batch, length, hidden_size)`.
    """
    q, k, v = final_queries(config, values), values["k_cache"], values["v_cache"]
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    visible = seen(layer_mask(config), positions, positions, shape)
    largest = np.broadcast_to(np.abs(v).max(axis=2, keepdims=True), v.shape)
    inner = attend_bound(
        q,
        k,
        largest if parts > 1 else v,
        visible,
        scale=config.softmax_scale,
        softcap=config.softcap,
        sinks=weights.sinks,
    )
    errors = inner.output
    if parts > 1:
        share = np.expm1(4.0 * inner.logsumexp + gamma(2 * parts + 8))[..., None]
        group = q.shape[1] // k.shape[1]
        errors = 2.0 * errors + share * np.repeat(largest[:, :, :1], group, axis=1)
    own = 2.0 * gamma(config.q_size + LOW_RANK + 4)
    errors = errors + own * (np.abs(values["attn"]) + errors)
    bound: Array = projected(errors, weights, lora)
    if weights.o_bias is not None:
        bound = bound + own * np.abs(weights.o_bias)
    return bound


def few_ulps(
    config: AttentionConfig,
    weights: AttentionWeights,
    lora: Lora | None,
    values: dict[str, Array],
    *,
    parts: int,
) -> Array:
    """Bound the difference by a few ulps: roundings as a random walk.

    Two evaluations round `N = 2 (2 kv_len + 2 q_size + low rank + 8 parts + 8)` times on the way
    from scores to an output, each time by an error spread evenly over half an ulp either way of a
    partial sum that is no larger than the sum of magnitudes `M`: a walk of standard deviation
    `sqrt(N / 12) ulp(M)` at most, with `ulp(M) <= 2 u M`. The `2 head_dim` roundings of a score,
    each relative to at most `scale |q| |k|`, move a weight by as much of itself, and so does
    dividing by the sum that they enter: twice that size joins the walk. `DEVIATIONS` of these are
    allowed.

    Takes and returns what `worst_case` does.

    Source: Higham and Mary (2019), SIAM J. Sci. Comput. 41(5) A2815, rounding errors as independent
    random variables of mean zero.
    """
    q, k = final_queries(config, values), values["k_cache"]
    kv_len = k.shape[2]
    steps = 2 * (2 * kv_len + 2 * config.q_size + LOW_RANK + 8 * parts + 8)
    norms = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max()
    scores = 2.0 * config.softmax_scale * norms * math.sqrt(4 * config.head_dim / 12)
    walk = math.sqrt(steps / 12) + scores
    sizes = projected(grouped_matmul(values["weights"], np.abs(values["v_cache"])), weights, lora)
    if weights.o_bias is not None:
        sizes = sizes + np.abs(weights.o_bias)
    bound: Array = DEVIATIONS * walk * 2.0 * U * sizes
    return bound


def projected(heads: Array, weights: AttentionWeights, lora: Lora | None) -> Array:
    """Carry sizes of the heads' outputs, BHSD, through the magnitudes of the output projection."""
    flat = heads.swapaxes(1, 2).reshape(heads.shape[0], heads.shape[2], -1)
    magnitudes = np.broadcast_to(np.abs(weights.o_proj), (len(flat), *weights.o_proj.shape))
    if lora is not None:
        down, up, scaling = lora.adapters["o"]
        used = np.maximum(lora.adapter_ids, 0)
        magnitudes = magnitudes + np.abs(up[used]) @ np.abs(down[used]) * scaling[used, None, None]
    carried: Array = flat @ magnitudes.swapaxes(1, 2)
    return carried
