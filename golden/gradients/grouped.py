"""Products of a matrix of scores' shape with queries, keys or values, and how they were summed."""

from __future__ import annotations

import numpy as np

from golden.attention import grouped_matmul
from golden.stages import Accumulation, Array, Observer
from golden.tiles import BoolArray


def masked_product(coefficients: Array, rows: Array, visible: BoolArray) -> Array:
    """Return coefficients times rows, where what is not visible multiplies nothing (G3, G4).

    Args:
        coefficients: `(batch, num_attention_heads, m, n)`, zero where not visible.
        rows: `(batch, heads, n, channels)`, heads divides num_attention_heads.
        visible: shaped like `coefficients`.

    Returns:
        `(batch, num_attention_heads, m, channels)`; NaN where a visible row is not finite.
    """
    finite = np.isfinite(rows)
    if finite.all():
        return grouped_matmul(coefficients, rows)
    product = grouped_matmul(coefficients, np.where(finite, rows, 0.0))
    met = grouped_matmul(visible.astype(np.float64), (~finite).astype(np.float64))
    return np.where(met > 0, np.nan, product)


def masked_sum(coefficients: Array, rows: Array, visible: BoolArray) -> Accumulation:
    """Return how `masked_product` was summed; takes what that takes."""
    return Accumulation(
        coefficients.shape[-1],
        lambda: grouped_matmul(np.square(coefficients), np.square(rows)),
        lambda: np.count_nonzero(visible, axis=-1, keepdims=True).astype(np.float64),
    )


def gathered(
    name: str,
    coefficients: Array,
    rows: Array,
    visible: BoolArray,
    kv_heads: int,
    observe: Observer,
) -> Array:
    """Sum rows over queries, and over the query heads that share a key/value head (G1).

    Args:
        name: `d_k` or `d_v`.
        coefficients: `(batch, num_attention_heads, q_len, kv_len)`, zero where not visible.
        rows: `(batch, num_attention_heads, q_len, channels)`.
        visible: shaped like `coefficients`.
        kv_heads: key/value heads.
        observe: sees `{name}_heads`, if heads share, and `{name}`.

    Returns:
        `(batch, num_key_value_heads, kv_len, channels)`.
    """
    turned, seen = coefficients.swapaxes(-1, -2), visible.swapaxes(-1, -2)
    per_head = masked_product(turned, rows, seen)
    group = per_head.shape[1] // kv_heads
    if group > 1:
        per_head = observe(f"{name}_heads", per_head)
    terms = masked_sum(turned, rows, seen)
    return observe(
        name,
        sum_groups(per_head, group),
        Accumulation(
            group * terms.length,
            lambda: sum_groups(terms.squares(), group),
            lambda: sum_groups(terms.count(), group),
        ),
    )


def sum_groups(per_head: Array, group: int) -> Array:
    """Add up the heads of each group, `(batch, kv_heads * group, ...)`."""
    batch, heads = per_head.shape[:2]
    total: Array = per_head.reshape(batch, heads // group, group, *per_head.shape[2:]).sum(axis=2)
    return total
