"""Normalisation: of queries and keys, and of the layer's input with its residual."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from golden.arrays import as_float64
from golden.config import QKNorm
from golden.stages import Accumulation, Array, Observer, unobserved


def normalise(
    x: Array,
    norm: QKNorm,
    weight: Array | None,
    bias: Array | None,
    *,
    observe: Observer = unobserved,
    name: str = "q",
    whole: Array | None = None,
) -> Array:
    """Normalise along the last axis.

    N1: `rms` returns `x / sqrt(mean(x**2) + eps)` (Zhang and Sennrich 2019, arXiv 1910.07467).
    N2: `layer` subtracts the mean first (Ba et al. 2016, arXiv 1607.06450).
    N3: the learned weight is `weight_offset + weight`; the bias follows it.
    N6: mean and mean square are those of the whole row, also where `x` is one rank's part of it.

    Args:
        x: float64, normalised along the last axis.
        norm: kind, eps and weight offset.
        weight: `(x.shape[-1],)` or None for none.
        bias: `(x.shape[-1],)` or None for none.
        observe: sees `{name}_norm_scale`, `{name}_norm_unit` and `{name}_norm`.
        name: `q`, `k` or `input`.
        whole: the rows of which `x` is a part, `(..., whole width)`; None means `x` is whole.

    Returns:
        Normalised, shaped like `x`.
    """
    rows = x if whole is None else whole
    if norm.kind == "layer":
        mean = rows.mean(axis=-1, keepdims=True)
        x, rows = x - mean, rows - mean
    width = rows.shape[-1]
    power = np.square(rows).mean(axis=-1, keepdims=True) + norm.eps

    def squares() -> Array:  # the terms of the mean, carried through d(power ** -0.5) = 0.5 / power
        fourth: Array = np.square(np.square(rows) / width).sum(axis=-1, keepdims=True)
        slope: Array = np.square(0.5 * power**-1.5)
        return fourth * slope

    scale = observe(f"{name}_norm_scale", power**-0.5, Accumulation(width, squares))
    unit = observe(f"{name}_norm_unit", x * scale)
    if weight is not None:
        unit = unit * (norm.weight_offset + weight)
    if bias is not None:
        unit = unit + bias
    return observe(f"{name}_norm", unit)


class NormedInput(NamedTuple):
    """Result of `add_and_normalise`.

    Attributes:
        hidden_states: `(batch, q_len, hidden_size)`, float64, what the projections read.
        residual: like it; the sum before the norm, to which the attention's output is added.
    """

    hidden_states: Array
    residual: Array


def add_and_normalise(
    hidden_states: Any,
    *,
    weight: Any,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    residual: Any = None,
    observe: Observer = unobserved,
) -> NormedInput:
    """Add the residual, then take the root mean square norm: what a fused projection does first.

    N4: `s = hidden_states + residual`; the projections read `rms(s) * (weight_offset + weight)`.
    N5: the residual that goes on is `s`. With the stream `x` before a layer left as two summands,
        the last block's output `h` and the stream `r` before it, `x = h + r`; the layer computes
        `x + attention(norm(x))`, and its caller adds the attention's output to what comes back
        here. Handing back `h` or `r` alone would drop the other from every later layer.

        The public module means the same, though its code reads otherwise: it returns the tensor
        of the hidden states it was given, into which, by its own comment, the fused kernel has
        written the sum. A kernel that does not write it back, which nki-library's documentation
        of `qkv` leaves open, would have to return it apart.

    Args:
        hidden_states: `(batch, q_len, hidden_size)`.
        weight: `(hidden_size,)`.
        eps: added to the mean square under the root.
        weight_offset: added to the weight; Gemma stores `w - 1` and sets this to 1.
        residual: like `hidden_states`; None for none.
        observe: sees `input_sum` (with a residual) and the stages of the norm.

    Raises:
        ShapeError: arrays do not fit each other.
        ConfigError: `eps` is negative.

    Source: Zhang and Sennrich (2019), arXiv 1910.07467; neuronx-distributed-inference's fused
    RMSNorm and residual addition of the QKV kernel.
    """
    hidden = as_float64("hidden_states", hidden_states, (None, None, None), "(batch, q_len, width)")
    weight = as_float64("weight", weight, (hidden.shape[2],), "(hidden_size,)")
    if residual is not None:
        other = as_float64("residual", residual, hidden.shape, "(batch, q_len, width)")
        hidden = observe("input_sum", hidden + other)
    norm = QKNorm(eps=eps, weight_offset=weight_offset)
    normed = normalise(hidden, norm, weight, None, observe=observe, name="input")
    return NormedInput(normed, hidden)
