"""Parts of the softmax's vector-Jacobian product: the row's `D`, its level, the sink's share."""

from __future__ import annotations

from typing import Any

import numpy as np

from golden.gradients.grouped import masked_product
from golden.stages import Accumulation, Array, Observer
from golden.tiles import BoolArray

_BASE_2 = 1.0 / np.log(2.0)


def sink_share(sinks: Any, logsumexp: Array) -> Array:
    """Return `exp(sink - L)`, the share of each row that its sink takes, 0 without sinks."""
    if sinks is None:
        return np.zeros_like(logsumexp)
    sink = np.asarray(sinks).astype(np.float64, copy=False)[:, None]
    empty = np.isneginf(logsumexp)  # neither a key nor a sink
    share: Array = np.exp(sink - np.where(empty, np.inf, logsumexp))
    return share


def weights_again(exps: Array, total: Array, logsumexp: Array, observe: Observer) -> Array:
    """Return the softmax weights, as they come from the log-sum-exp that was kept: `exp(x - L)`.

    Kernels that compute weights again subtract `L` where the forward pass divided by the sum; what
    `L` was rounded by, in base 2 as they hold it, changes all weights of its row.

    Args:
        exps: `(batch, num_attention_heads, q_len, kv_len)`.
        total: their sum and the sink's, `(batch, num_attention_heads, q_len, 1)`.
        logsumexp: `(batch, num_attention_heads, q_len)`.
        observe: sees `logsumexp`.

    Returns:
        Shaped like `exps`.
    """
    weights = np.divide(exps, total, out=np.zeros_like(exps), where=total != 0)
    kept = np.where(np.isneginf(logsumexp), 0.0, logsumexp * _BASE_2)
    told = observe("logsumexp", kept)
    if told is not kept:
        weights = weights * np.exp((kept - told) / _BASE_2)[..., None]
    return weights


def level_of(weights: Array, share: Array, d_weights: Array) -> Array:
    """Return the `dP` of each row's largest weight, 0 if the sink's share is larger (G5)."""
    if weights.shape[-1] == 0:
        return np.zeros_like(share)
    top = weights.argmax(axis=-1, keepdims=True)
    largest, level = (np.take_along_axis(one, top, axis=-1) for one in (weights, d_weights))
    return np.where(largest[..., 0] >= share, level[..., 0], 0.0)


def delta_of(
    weights: Array, share: Array, d_weights: Array, level: Array, observe: Observer
) -> Array:
    """Return `D - level`, from `dP - level` (G5); the observer is shown `D`.

    Returns:
        `(batch, num_attention_heads, q_len)`.
    """
    terms = weights * d_weights
    relative: Array = terms.sum(axis=-1) - share * level
    delta = relative + level
    told = observe(
        "delta",
        delta,
        Accumulation(
            weights.shape[-1],
            lambda: np.square(terms + weights * level[..., None]).sum(axis=-1),
            lambda: np.count_nonzero(weights, axis=-1).astype(np.float64),
        ),
    )
    return relative + (told - delta)


def delta_of_output(
    weights: Array,
    v: Array,
    d_output: Array,
    visible: BoolArray,
    products: Accumulation,
    observe: Observer,
) -> Array:
    """Return what `D` is moved by if it is taken from an output that was rounded: 0 unobserved.

    `D = dO . O` holds for the output of the very weights that `dP` meets. Kernels that recompute
    weights take it from the output of the forward pass, as that was stored. Its sum and those of
    `dP` then err apart, also where one key has all the weight and `dP = D`. The sum is shown in
    base 2: a sum that a format holds may have had partial sums that it does not.

    Args:
        weights: `(batch, num_attention_heads, q_len, kv_len)`.
        v: `(batch, num_key_value_heads, kv_len, value_dim)`.
        d_output: `(batch, num_attention_heads, q_len, value_dim)`.
        visible: shaped like `weights`.
        products: how `dP` was summed.
        observe: sees `delta_weights`, `delta_output` and `delta_sum`.

    Returns:
        `(batch, num_attention_heads, q_len)`.
    """
    read = observe("delta_weights", weights)
    output = masked_product(weights, v, visible)
    made = output if read is weights else masked_product(read, v, visible)
    told = observe("delta_output", made)
    terms = told * d_output * _BASE_2

    def squares() -> Array:
        of_products = np.square(weights * _BASE_2) * products.squares()
        both: Array = np.square(terms).sum(axis=-1) + of_products.sum(axis=-1)
        return both

    total = terms.sum(axis=-1)
    summed = observe("delta_sum", total, Accumulation(terms.shape[-1], squares))
    moved: Array = ((told - output) * d_output).sum(axis=-1) + (summed - total) / _BASE_2
    return moved


def sink_gradient(share: Array, d_sink: Array, observe: Observer) -> Array:
    """Add up `p (dL - D)` over batch rows and queries."""
    terms = share * d_sink
    return observe(
        "grad_sinks",
        terms.sum(axis=(0, 2)),
        Accumulation(
            terms[:, 0].size,
            lambda: np.square(terms).sum(axis=(0, 2)),
            lambda: np.count_nonzero(terms, axis=(0, 2)).astype(np.float64),
        ),
    )
