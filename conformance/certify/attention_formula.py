"""Attention in tracked arithmetic, written from its formula.

Nothing here calls golden's arithmetic; what golden does in another order of sums is within the
same bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from conformance.certify.tracked import Tracked
from golden import AttentionConfig

BoolArray: TypeAlias = NDArray[np.bool_]
IntArray: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class AttentionFormula:
    """Attention evaluated, with what its gradient needs.

    Attributes:
        output: `(batch, num_attention_heads, q_len, value_dim)`.
        logsumexp: `(batch, num_attention_heads, q_len)`; 0 in rows that see nothing.
        weights: `(batch, num_attention_heads, q_len, kv_len)`, zero where not visible.
        tanh: of the scores over the soft cap; None without.
        sees: rows that see a key or a sink, `(batch, num_attention_heads, q_len)`.
    """

    output: Tracked
    logsumexp: Tracked
    weights: Tracked
    tanh: Tracked | None
    sees: BoolArray


def attention(
    q: Tracked,
    k: Tracked,
    v: Tracked,
    visible: BoolArray,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tracked | None = None,
) -> AttentionFormula:
    """Evaluate softmax(scale q k) v with soft cap, sinks and rows that may see nothing.

    The shift by the row's maximum is a constant `m`: softmax and log-sum-exp are the same for any
    `m`, so an error in `m` is none of theirs; only the roundings of `x - m` count.

    Args:
        q: `(batch, num_attention_heads, q_len, head_dim)`.
        k: `(batch, num_key_value_heads, kv_len, head_dim)`.
        v: `(batch, num_key_value_heads, kv_len, value_dim)`.
        visible: `(batch, num_attention_heads, q_len, kv_len)`, True = attend.
        scale: factor on the dot products, exact.
        softcap: exact, None for none.
        sinks: `(num_attention_heads,)`, None for none.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat(group, 1), v.repeat(group, 1)
    scores = (q @ k.swapaxes(2, 3)) * q.like(scale)
    tanh = None
    if softcap is not None:
        tanh = (scores / q.like(softcap)).tanh()
        scores = q.like(softcap) * tanh
    top = np.where(visible, scores.exact.astype(np.float64), -np.inf).max(axis=-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.reshape(-1, 1, 1)
        top = np.maximum(top, sinks.exact.astype(np.float64))
    shift = q.like(np.where(np.isneginf(top), 0.0, top))
    # masked scores may be larger than the maximum by any amount, so they go before exp sees them
    exps = (scores.where(visible) - shift.where(visible)).exp().where(visible)
    total = exps.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + (sinks - shift).exp()
    sees: BoolArray = np.asarray(visible.any(axis=-1) | (sinks is not None))
    weights = exps / total.where(sees[..., None], 1.0)
    logsumexp = total.where(sees[..., None], 1.0).log() + shift
    return AttentionFormula(weights @ v, logsumexp[..., 0], weights, tanh, sees)


def visible_pairs(config: AttentionConfig, queries: IntArray, keys: IntArray) -> BoolArray:
    """Return which key positions a decoder layer's queries see, pair by pair.

    Args:
        config: for its window or chunk.
        queries: `(batch, q_len)`, -1 for none.
        keys: `(batch, kv_len)`, -1 for none.

    Returns:
        `(batch, num_attention_heads, q_len, kv_len)`, True = attend.
    """
    window, chunk = config.sliding_window, config.attention_chunk_size

    def sees(i: int, j: int) -> bool:
        if not 0 <= j <= i:
            return False
        return (window is None or i - j < window) and (chunk is None or i // chunk == j // chunk)

    table = np.array(
        [
            [[sees(int(i), int(j)) for j in ks] for i in qs]
            for qs, ks in zip(queries, keys, strict=True)
        ]
    )
    return np.repeat(table[:, None], config.num_attention_heads, axis=1)
