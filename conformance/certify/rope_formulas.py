"""Rotary position embedding in tracked arithmetic, from the formulas of its papers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from conformance.certify.arithmetic import Arithmetic
from conformance.certify.frequency_formulas import cos_sin_factor, scaled_frequencies
from conformance.certify.tracked import Tracked, tracked
from golden import RopeConfig


def cos_sin(
    rope: RopeConfig, rotary_dim: int, positions: NDArray[np.int64], arithmetic: Arithmetic
) -> tuple[Tracked, Tracked]:
    """Return cosine and sine of position times frequency, times YaRN's or LongRoPE's factor.

    Args:
        rope: which embedding.
        rotary_dim: channels that rotate.
        positions: `(batch, length)`, or `(axes, batch, length)` for M-RoPE.
        arithmetic: what to compute in.

    Returns:
        Two arrays `(batch, length, rotary_dim / 2)`.

    Source: Su et al. (2021), arXiv 2104.09864, section 3.4.2; scalings as below.
    """
    if positions.ndim == 2:
        positions = positions[None]
    axes = [_axis(rope, pair) for pair in range(rotary_dim // 2)]
    lengths = positions.max(axis=(0, 2)) + 1
    rows = [scaled_frequencies(rope, rotary_dim, int(length), arithmetic) for length in lengths]
    frequencies = Tracked(
        np.stack([row.exact for row in rows]), np.stack([row.error for row in rows])
    )[:, None]
    angles = tracked(np.moveaxis(positions[axes], 0, -1), arithmetic) * frequencies
    factor = cos_sin_factor(rope, arithmetic)
    return angles.cos() * factor, angles.sin() * factor


def _axis(rope: RopeConfig, pair: int) -> int:
    """Return which position axis turns a channel pair (Qwen2-VL and Qwen3-VL, M-RoPE)."""
    section = rope.mrope_section
    if not section:
        return 0
    if rope.mrope_interleaved:
        axis = pair % len(section)
        return axis if pair < len(section) * section[axis] else 0
    return next(a for a in range(len(section)) if pair < sum(section[: a + 1]))


def rotated(x: Tracked, cos: Tracked, sin: Tracked, pairing: str) -> Tracked:
    """Rotate the leading channels: `(a, b) -> (a cos - b sin, b cos + a sin)`.

    Args:
        x: `(batch, heads, length, head_dim)`.
        cos: `(batch, length, r / 2)`.
        sin: like `cos`.
        pairing: `half` pairs channel `i` with `i + r / 2`, `interleaved` `2 i` with `2 i + 1`.
    """
    pairs = cos.shape[-1]
    one = np.arange(pairs) if pairing == "half" else 2 * np.arange(pairs)
    two = one + (pairs if pairing == "half" else 1)
    cos, sin = cos[:, None], sin[:, None]
    a, b = x[..., one], x[..., two]
    turned = x.replaced((..., one), a * cos - b * sin)
    return turned.replaced((..., two), b * cos + a * sin)
