"""Gradients of attention in tracked arithmetic, written from the formulas."""

from __future__ import annotations

import numpy as np

from conformance.certify.attention_formula import AttentionFormula, BoolArray
from conformance.certify.tracked import Tracked, gamma


def attention_gradients(
    forward: AttentionFormula,
    q: Tracked,
    k: Tracked,
    v: Tracked,
    d_output: Tracked,
    visible: BoolArray,
    *,
    scale: float,
    sinks: Tracked | None = None,
    d_logsumexp: Tracked | None = None,
    levelled: bool = True,
) -> dict[str, Tracked]:
    """Return the gradients of `q`, `k`, `v` and, if given, `sinks`.

    Args:
        forward: attention evaluated on the same arrays.
        q: `(batch, num_attention_heads, q_len, head_dim)`.
        k: `(batch, num_key_value_heads, kv_len, head_dim)`.
        v: `(batch, num_key_value_heads, kv_len, value_dim)`.
        d_output: cotangent of the output.
        visible: `(batch, num_attention_heads, q_len, kv_len)`.
        scale: factor on the dot products.
        sinks: `(num_attention_heads,)`, None for none.
        d_logsumexp: cotangent of the log-sum-exp, None for zeros.
        levelled: whether `dP` is taken relative to that of the row's largest weight, as golden
            does; the exact values are the same without, the bounds of peaked rows far larger.

    Source: Dao et al. (2022), arXiv 2205.14135, appendix B.2.
    """
    batch, kv_heads = k.shape[:2]
    group = q.shape[1] // kv_heads
    reached: BoolArray = np.asarray(visible.any(axis=-1, keepdims=True))
    d_output = d_output.where(reached)
    share = None if sinks is None else (sinks[:, None] - forward.logsumexp).exp()
    d_weights = (d_output @ v.repeat(group, 1).swapaxes(2, 3)).where(visible)
    level = d_weights.where(np.zeros(d_weights.shape, dtype=np.bool_)).sum(-1)
    if levelled:
        d_weights, level = _levelled(d_weights, forward.weights, share)
    d_row = -(forward.weights * d_weights).sum(-1)
    if share is not None:
        d_row = d_row + share * level
    if d_logsumexp is not None:
        d_row = d_logsumexp + d_row
    d_scores = forward.weights * (d_weights + d_row[..., None])
    if forward.tanh is not None:
        one = q.like(1.0)
        d_scores = d_scores * (one - forward.tanh) * (one + forward.tanh)
    d_scores = d_scores.where(visible) * q.like(scale)

    def over_the_group(per_head: Tracked) -> Tracked:
        return per_head.reshape(batch, kv_heads, group, *per_head.shape[2:]).sum(2)

    gradients = {
        "q": d_scores @ k.repeat(group, 1),
        "k": over_the_group(d_scores.swapaxes(2, 3) @ q),
        "v": over_the_group(forward.weights.swapaxes(2, 3) @ d_output),
    }
    if share is not None:
        gradients["sinks"] = (share * (d_row - level)).sum((0, 2))
    return gradients


def _levelled(
    d_weights: Tracked, weights: Tracked, share: Tracked | None
) -> tuple[Tracked, Tracked]:
    """Return `dP` less its value at the row's largest weight, and that value (E10).

    Where it is certain which weight (or the sink's share, whose `dP` is 0) is the largest, its
    difference is zero without error. Where it is not, the level may be that of any key, so the
    differences carry the largest error of the row and are rounded at its largest magnitude.

    Returns:
        Shaped like `d_weights`, and like its rows.
    """
    low, high = weights.size - weights.error, weights.size + weights.error
    sink_size = np.zeros((*weights.shape[:-1], 1)) if share is None else share.size[..., None]
    sink_error = np.zeros_like(sink_size) if share is None else share.error[..., None]
    order = np.concatenate([weights.size, sink_size], axis=-1)
    top = order.argmax(axis=-1, keepdims=True)
    at_top = np.arange(order.shape[-1]) == top
    lows = np.concatenate([low, sink_size - sink_error], axis=-1)
    highs = np.concatenate([high, sink_size + sink_error], axis=-1)
    others = np.where(at_top, 0.0, highs).max(axis=-1, keepdims=True)
    certain = np.where(at_top, lows, 0.0).max(axis=-1, keepdims=True) > others
    zero = d_weights.where(np.zeros(d_weights.shape, dtype=np.bool_))[..., :1]
    with_sink = Tracked(
        np.concatenate([d_weights.exact, zero.exact], axis=-1),
        np.concatenate([d_weights.error, zero.error], axis=-1),
    )
    exact = np.take_along_axis(with_sink.exact, top, axis=-1)
    error = np.take_along_axis(with_sink.error, top, axis=-1)
    largest = with_sink.error.max(axis=-1, keepdims=True)
    level = Tracked(exact, np.where(certain, error, largest))
    difference = d_weights - level
    spread = 2.0 * gamma(1) * d_weights.size.max(axis=-1, keepdims=True)
    known = certain & at_top[..., :-1]
    errors = np.where(known, 0.0, difference.error + np.where(certain, 0.0, spread))
    return Tracked(difference.exact, errors), level[..., 0]
