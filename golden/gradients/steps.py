"""Vector-Jacobian products of the layer's steps: projection, clip, norm, rotation.

Each takes what the forward step computed and the cotangent of its result.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from golden.arrays import Positions
from golden.config import QKNorm, TemperatureTuning
from golden.rope import rotate
from golden.stages import Accumulation, Array, Observer, unobserved

Summed: TypeAlias = tuple[Array, Accumulation]
"""A sum, and what an observer needs to know of it."""


def projection_vjp(x: Array, weight: Array, d_product: Array) -> tuple[Summed, Summed]:
    """Differentiate `x @ weight.T`: `d_x = d_y @ weight`, `d_weight = sum_tokens d_y x`.

    Args:
        x: `(batch, length, width_in)`.
        weight: `(width_out, width_in)`.
        d_product: `(batch, length, width_out)`.

    Returns:
        Gradients of `x` and of `weight`, each with how it was summed.
    """
    tokens, read = d_product.reshape(-1, d_product.shape[-1]), x.reshape(-1, x.shape[-1])
    d_x = Accumulation(weight.shape[0], lambda: np.square(d_product) @ np.square(weight))
    d_weight = Accumulation(
        len(tokens),
        lambda: np.square(tokens).T @ np.square(read),
        lambda: np.array(float(_live_rows(tokens))),
    )
    return (d_product @ weight, d_x), (tokens.T @ read, d_weight)


def bias_vjp(d_sum: Array) -> Summed:
    """Differentiate the bias added to every row: the sum of cotangents, and how it was summed.

    Args:
        d_sum: `(..., width)`.
    """
    rows = d_sum.reshape(-1, d_sum.shape[-1])
    return rows.sum(axis=0), Accumulation(
        len(rows),
        lambda: np.square(rows).sum(axis=0),
        lambda: np.array(float(_live_rows(rows))),
    )


def _live_rows(rows: Array) -> int:
    """Count the rows that hold something: those of padding add nothing."""
    return int(np.count_nonzero(rows.any(axis=-1)))


def clip_vjp(x: Array, bound: float, d_clipped: Array) -> Array:
    """Differentiate the clamp of `x` to `[-bound, bound]`.

    G6: the gradient passes where `|x| <= bound` and stops elsewhere; at the bound itself, where
    every number of [0, 1] is a subgradient, it passes, as `torch.clamp` has it.
    """
    return np.where(np.abs(x) <= bound, d_clipped, 0.0)


def norm_vjp(
    norm: QKNorm,
    weight: Array | None,
    unit: Array,
    scale: Array,
    d_result: Array,
    observe: Observer = unobserved,
    name: str = "q",
) -> tuple[Array, Array, Array]:
    """Differentiate `golden.norms.normalise` along the last axis of `n` channels.

    With `s = (mean(x**2) + eps) ** -0.5`, `z = s x` and `y = (offset + w) z + b`, `ds/dx_i` is
    `-s**3 x_i / n`, hence for `g = (offset + w) d_y`::

        d_x = s (g - z mean(g z))         rms (G7)
        d_x = that minus its mean         layer: x enters as x - mean(x) (G8)
        d_w = sum d_y z,  d_b = sum d_y   over all rows

    G9: a row whose cotangent is zero has a gradient of zero, whatever the row holds.

    Args:
        norm: kind and weight offset.
        weight: `(n,)`, None for none.
        unit: `z`, `(..., n)`.
        scale: `s`, `(..., 1)`.
        d_result: `(..., n)`.
        observe: sees the stages `d_{name}_norm...` and `grad_{name}_norm...`.
        name: `q` or `k`.

    Returns:
        Gradients of `x`, of the weight and of the bias, the last two `(n,)`.

    Source: Zhang and Sennrich (2019), arXiv 1910.07467, section 4; Ba et al. (2016), arXiv
    1607.06450, appendix.
    """
    live = (d_result != 0).any(axis=-1, keepdims=True)
    unit, scale = np.where(live, unit, 0.0), np.where(live, scale, 0.0)
    g = d_result if weight is None else d_result * (norm.weight_offset + weight)
    g = observe(f"d_{name}_norm_unit", g)
    parts, width = g * unit, unit.shape[-1]
    mean = observe(
        f"d_{name}_norm_mean",
        parts.mean(axis=-1, keepdims=True),
        Accumulation(width, lambda: np.square(parts / width).sum(axis=-1, keepdims=True)),
    )
    d_x = scale * (g - unit * mean)
    if norm.kind == "layer":
        d_x = d_x - d_x.mean(axis=-1, keepdims=True)
    terms = observe(f"d_{name}_norm_terms", d_result * unit)
    return (
        observe(f"d_{name}_norm", d_x),
        observe(f"grad_{name}_norm", *bias_vjp(terms)),
        observe(f"grad_{name}_norm_bias", *bias_vjp(d_result)),
    )


def rotate_vjp(
    d_rotated: Array,
    cos: Array,
    sin: Array,
    *,
    pairing: str,
    observe: Observer = unobserved,
    name: str = "q",
) -> Array:
    """Differentiate `golden.rotate` with respect to what it rotates; angles are constants.

    G10: the transpose of a rotation turns back: `rotate(d, cos, -sin)`. The attention factor of
    YaRN, which `cos` and `sin` carry, multiplies the gradient as it multiplies the value.

    Args:
        d_rotated: `(batch, heads, length, head_dim)`, BHSD.
        cos: `(batch, length, r / 2)`.
        sin: like `cos`.
        pairing: `half` or `interleaved`.
        observe: sees `d_{name}_rope_cos`, `d_{name}_rope_sin` and `d_{name}_rope`.
        name: `q` or `k`.
    """
    return rotate(d_rotated, cos, -sin, pairing=pairing, observe=observe, name=f"d_{name}")


def temperature_factor(tuning: TemperatureTuning, positions: Positions) -> Array:
    """Return the factor on each query, `(batch, length)`; it is a constant of the position."""
    steps = np.floor((positions + 1) / tuning.floor_scale)
    factor: Array = 1.0 + tuning.attn_scale * np.log1p(steps)
    return factor
