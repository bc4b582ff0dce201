"""Vector-Jacobian products of the layer's steps: projection, clip, norm, rotation.

Each takes what the forward step computed and the cotangent of its result.
"""

from __future__ import annotations

import numpy as np

from golden.arrays import Positions
from golden.config import QKNorm, TemperatureTuning
from golden.rope import rotate
from golden.stages import Array


def projection_vjp(x: Array, weight: Array, d_product: Array) -> tuple[Array, Array]:
    """Differentiate `x @ weight.T`: `d_x = d_y @ weight`, `d_weight = sum_tokens d_y x`.

    Args:
        x: `(batch, length, width_in)`.
        weight: `(width_out, width_in)`.
        d_product: `(batch, length, width_out)`.

    Returns:
        Gradients of `x` and of `weight`.
    """
    tokens = d_product.reshape(-1, d_product.shape[-1])
    return d_product @ weight, tokens.T @ x.reshape(-1, x.shape[-1])


def clip_vjp(x: Array, bound: float, d_clipped: Array) -> Array:
    """Differentiate the clamp of `x` to `[-bound, bound]`.

    G6: the gradient passes where `|x| <= bound` and stops elsewhere; at the bound itself, where
    every number of [0, 1] is a subgradient, it passes, as `torch.clamp` has it.
    """
    return np.where(np.abs(x) <= bound, d_clipped, 0.0)


def norm_vjp(
    norm: QKNorm, weight: Array | None, unit: Array, scale: Array, d_result: Array
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

    Returns:
        Gradients of `x`, of the weight and of the bias, the last two `(n,)`.

    Source: Zhang and Sennrich (2019), arXiv 1910.07467, section 4; Ba et al. (2016), arXiv
    1607.06450, appendix.
    """
    live = (d_result != 0).any(axis=-1, keepdims=True)
    unit, scale = np.where(live, unit, 0.0), np.where(live, scale, 0.0)
    g = d_result if weight is None else d_result * (norm.weight_offset + weight)
    d_x = scale * (g - unit * (g * unit).mean(axis=-1, keepdims=True))
    if norm.kind == "layer":
        d_x = d_x - d_x.mean(axis=-1, keepdims=True)
    rows = tuple(range(unit.ndim - 1))
    return d_x, (d_result * unit).sum(axis=rows), d_result.sum(axis=rows)


def rotate_vjp(d_rotated: Array, cos: Array, sin: Array, *, pairing: str) -> Array:
    """Differentiate `golden.rotate` with respect to what it rotates; angles are constants.

    G10: the transpose of a rotation turns back: `rotate(d, cos, -sin)`. The attention factor of
    YaRN, which `cos` and `sin` carry, multiplies the gradient as it multiplies the value.

    Args:
        d_rotated: `(batch, heads, length, head_dim)`, BHSD.
        cos: `(batch, length, r / 2)`.
        sin: like `cos`.
        pairing: `half` or `interleaved`.
    """
    return rotate(d_rotated, cos, -sin, pairing=pairing)


def temperature_factor(tuning: TemperatureTuning, positions: Positions) -> Array:
    """Return the factor on each query, `(batch, length)`; it is a constant of the position."""
    steps = np.floor((positions + 1) / tuning.floor_scale)
    factor: Array = 1.0 + tuning.attn_scale * np.log1p(steps)
    return factor
