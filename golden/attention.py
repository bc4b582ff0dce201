"""`attend()`: what attention means, written out densely next to its formula."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from golden.arrays import Positions, as_float64, as_positions, positive_scale, real_qkv
from golden.errors import ShapeError
from golden.masks import Mask
from golden.stages import Accumulation, Array, Observer, unobserved
from golden.tiles import BoolArray


class Attended(NamedTuple):
    """Result of `attend`.

    Attributes:
        output: `(batch, num_attention_heads, q_len, head_dim)`, float64.
        logsumexp: natural log of each row's sum of exponentials, sink included,
            `(batch, num_attention_heads, q_len)`; -inf for a row that sees nothing, not even a
            sink.
    """

    output: Array
    logsumexp: Array


def attend(
    q: Any,
    k: Any,
    v: Any,
    *,
    q_positions: Any,
    kv_positions: Any,
    mask: Mask,
    softmax_scale: float | None = None,
    sinks: Any = None,
    softcap: float | None = None,
    observe: Observer = unobserved,
) -> Attended:
    """Attend from queries to keys and mix their values.

    With `x_ij = softmax_scale * q_i . k_j` (soft-capped if asked) and `V_i` the keys row `i` may
    see::

        o_i = sum_{j in V_i} exp(x_ij) v_j / (sum_{j in V_i} exp(x_ij) + exp(sink))

    A1: query head `h` reads key/value head `h // group`, group = query heads per key/value head.
    A2: scores are shifted by the row's largest visible score or sink, so exp never overflows.
    A3: the soft cap acts on scaled scores, before the mask.
    A4: a sink adds to the denominator only; it has no value.
    A5: a row that sees no key gives zeros, with and without a sink.
    A6: a masked key changes no bit of the row, not even if it holds NaN or infinity.

    Args:
        q: `(batch, num_attention_heads, q_len, head_dim)`, BHSD.
        k: `(batch, num_key_value_heads, kv_len, head_dim)`, BHSD.
        v: `(batch, num_key_value_heads, kv_len, value_dim)`, BHSD.
        q_positions: `(batch, q_len)`, int; -1 marks a padded query, which sees nothing.
        kv_positions: `(batch, kv_len)`, int; -1 marks an empty slot, which nothing sees.
        mask: which keys a query may see; True = attend.
        softmax_scale: factor on the dot products; None is `head_dim ** -0.5`.
        sinks: `(num_attention_heads,)`, one logit per query head; None for none.
        softcap: `c` in `c * tanh(x / c)`; None for none.
        observe: sees and may change each stage (`golden.STAGES`).

    Returns:
        Output and log-sum-exp in float64.

    Raises:
        ShapeError: an array has the wrong shape or dtype.
        ConfigError: heads do not divide, or a scale or cap is not positive.

    Source: Vaswani et al. (2017), arXiv 1706.03762, section 3.2; sinks as in the GPT-OSS model
    card (2025); log-sum-exp as in Blanchard, Higham and Higham (2021), IMA J. Numer. Anal. 41(4).
    """
    q, k, v = _check_qkv(q, k, v)
    batch, num_heads, q_len, head_dim = q.shape
    kv_len = k.shape[2]
    q_positions = as_positions("q_positions", q_positions, (batch, q_len))
    kv_positions = as_positions("kv_positions", kv_positions, (batch, kv_len))
    scale = positive_scale(softmax_scale, softcap, head_dim)
    visible = visible_keys(mask, q_positions, kv_positions)
    if visible.shape[1] not in (1, num_heads):
        raise ShapeError(
            f"mask must speak of 1 or {num_heads} heads (num_attention_heads), got "
            f"{visible.shape[1]}"
        )

    with np.errstate(invalid="ignore", over="ignore"):  # A6: masked keys may hold anything
        scores = _scores(q, k, scale, softcap, observe)
    scores = np.where(visible, scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    if sinks is not None:
        sink = as_float64("sinks", sinks, (num_heads,), "(num_attention_heads,)")
        top = np.maximum(top, sink[:, None, None])
    top = np.where(np.isneginf(top), 0.0, top)
    with np.errstate(invalid="ignore"):  # a visible infinity leaves NaN, which is its answer
        shifted = observe("shifted_scores", scores - top)
    exps = observe("exp", np.exp(shifted))
    total = exps.sum(axis=-1, keepdims=True)
    sunk: Array | float = 0.0
    if sinks is not None:
        with np.errstate(invalid="ignore"):  # a sink of infinity leaves NaN likewise
            sunk = np.exp(sink[:, None, None] - top)
            total = total + sunk

    def seen() -> Array:
        return np.count_nonzero(visible, axis=-1, keepdims=True).astype(np.float64)

    total = observe(
        "denominator",
        total,
        Accumulation(
            kv_len,
            lambda: np.square(exps).sum(axis=-1, keepdims=True) + np.square(sunk),
            lambda: seen() + (sinks is not None),  # the sink is a term of its own
            lambda: total - np.maximum(exps.max(axis=-1, keepdims=True, initial=0.0), sunk),
            terms=lambda: itertools.chain(
                (exps[..., key] for key in _each(kv_len)),
                [] if sinks is None else [np.broadcast_to(sunk, top.shape)],
            ),
        ),
    )
    exps = observe("unnormalised_weights", exps)
    weights = np.divide(exps, total, out=np.zeros_like(exps), where=total != 0)
    weights = observe("weights", weights)
    squares = functools.cache(lambda: _mix(np.square(weights), _squared(v), visible))
    output = observe(
        "attn",
        _mix(weights, v, visible),
        Accumulation(
            kv_len,
            squares,
            lambda: seen() if v.all() else _terms(np.broadcast_to(visible, weights.shape), v),
            lambda: _but_the_largest(weights, v, squares()),
            terms=lambda: (
                _mix(weights[..., key], v[:, :, key], visible[..., key]) for key in _each(kv_len)
            ),
        ),
    )
    with np.errstate(divide="ignore"):
        logsumexp = (np.log(total) + top)[..., 0]
    return Attended(output, logsumexp)


def visible_keys(mask: Mask, q_positions: Positions, kv_positions: Positions) -> BoolArray:
    """Apply a mask and hide empty slots from every query and everything from padded queries.

    Returns:
        Bool, broadcastable to `(batch, num_attention_heads, q_len, kv_len)`, True = attend.
    """
    occupied = (q_positions >= 0)[:, None, :, None] & (kv_positions >= 0)[:, None, None, :]
    return mask.visible(q_positions, kv_positions) & occupied


def _check_qkv(q: Any, k: Any, v: Any) -> tuple[Array, ...]:
    return tuple(array.astype(np.float64, copy=False) for array in real_qkv(q, k, v))


def _scores(q: Array, k: Array, scale: float, softcap: float | None, observe: Observer) -> Array:
    products = observe(
        "qk",
        grouped_matmul(q, k.swapaxes(-1, -2)),
        Accumulation(
            q.shape[-1],
            lambda: grouped_matmul(np.square(q), np.square(k).swapaxes(-1, -2)),
            terms=lambda: (
                grouped_matmul(q[..., channel], k[..., channel].swapaxes(-1, -2))
                for channel in _each(q.shape[-1])
            ),
        ),
    )
    scores = observe("scores", products * scale)
    if softcap is not None:
        ratio = observe("softcap_ratio", scores / softcap)
        scores = observe("softcap", softcap * observe("softcap_tanh", np.tanh(ratio)))
    return scores


def _each(count: int) -> Iterator[slice]:
    """Cut so many neighbours into slices of one."""
    return (slice(index, index + 1) for index in range(count))


def grouped_matmul(rows: Array, columns: Array) -> Array:
    """Multiply each query head's rows with its group's columns (A1), without repeating them.

    Args:
        rows: `(batch, num_attention_heads, m, inner)`.
        columns: `(batch, num_key_value_heads, inner, n)`.

    Returns:
        `(batch, num_attention_heads, m, n)`, float64.
    """
    batch, heads, m, inner = rows.shape
    kv_heads, n = columns.shape[1], columns.shape[3]
    grouped = rows.reshape(batch, kv_heads, heads // kv_heads * m, inner)
    return (grouped @ columns).reshape(batch, heads, m, n)


def _terms(visible: BoolArray, v: Array) -> Array:
    """Count the visible values other than zero, which adds nothing, `(batch, heads, q_len, d)`."""
    return grouped_matmul(visible.astype(np.float64), (v != 0).astype(np.float64))


def _but_the_largest(weights: Array, v: Array, squares: Array) -> Array:
    """Return the root of the sum of squared terms without that of a row's largest weight."""
    group = weights.shape[1] // v.shape[1]
    heads = np.arange(weights.shape[1])[None, :, None] // group
    foremost = weights.argmax(axis=-1)
    value = v[np.arange(len(v))[:, None, None], heads, foremost]
    weight = np.take_along_axis(weights, foremost[..., None], axis=-1)
    rest = squares - np.square(weight * value)
    root: Array = np.sqrt(np.maximum(rest, 0.0))
    return root


def _squared(v: Array) -> Array:
    with np.errstate(over="ignore"):  # masked values may be huge; `_mix` keeps them out
        return np.square(v)


def _mix(weights: Array, v: Array, visible: BoolArray) -> Array:
    """Return weights times values, where a weight of a masked key multiplies nothing (A6)."""
    finite = np.isfinite(v)
    if finite.all():
        return grouped_matmul(weights, v)
    output = grouped_matmul(weights, np.where(finite, v, 0.0))
    group = weights.shape[1] // v.shape[1]
    visible = np.broadcast_to(visible, weights.shape)
    for key in np.flatnonzero(~finite.all(axis=(0, 1, 3))):
        value = np.where(finite[:, :, key], 0.0, v[:, :, key]).repeat(group, axis=1)
        with np.errstate(invalid="ignore"):
            term = weights[..., key, None] * value[:, :, None, :]
        output += np.where(visible[..., key, None], term, 0.0)
    return output
