"""Scalings of RoPE frequencies that depend on the sequence's length or on the channel pair."""

from __future__ import annotations

import math

import numpy as np

from golden.arrays import Positions
from golden.errors import ConfigError, ShapeError
from golden.rope_config import (
    DynamicNTKScaling,
    LongRopeScaling,
    ProportionalScaling,
    RopeConfig,
    YarnScaling,
)
from golden.stages import Array


def dynamic_ntk_theta(
    theta: float, rotary_dim: int, scaling: DynamicNTKScaling, seq_len: int
) -> float:
    """Return the base for a sequence of `seq_len` positions.

    R6: with `m = original_max` and a sequence longer than that, the base is
        `theta * (factor * seq_len / m - (factor - 1)) ** (r / (r - 2))`, r rotated channels;
        a shorter sequence keeps `theta`.

    Raises:
        ConfigError: only two channels rotate, so the exponent is infinite.

    Source: "Dynamically Scaled RoPE" (Peng et al. 2023, arXiv 2309.00071, appendix B.1), in the
    form of transformers' `dynamic` rope type.
    """
    if rotary_dim <= 2:
        raise ConfigError(
            f"dynamic NTK scaling needs more than 2 rotated channels, got {rotary_dim}"
        )
    original = scaling.original_max_position_embeddings
    length = max(seq_len, original)
    growth = scaling.factor * length / original - (scaling.factor - 1.0)
    return float(theta * growth ** (rotary_dim / (rotary_dim - 2)))


def longrope_frequencies(frequencies: Array, scaling: LongRopeScaling, seq_len: int) -> Array:
    """Divide each frequency by its own number.

    R7: `long_factor` beyond `original_max` positions, `short_factor` up to them.

    Raises:
        ShapeError: the sets have another number of channel pairs.

    Source: Ding et al. (2024), LongRoPE, arXiv 2402.13753, equation 4.
    """
    long = seq_len > scaling.original_max_position_embeddings
    divisors = np.array(scaling.long_factor if long else scaling.short_factor, dtype=np.float64)
    if divisors.shape != frequencies.shape:
        raise ShapeError(
            f"short_factor and long_factor must have {frequencies.shape[0]} numbers, one per "
            f"rotated channel pair, got {divisors.shape[0]}"
        )
    return frequencies / divisors


def longrope_attention_factor(scaling: LongRopeScaling) -> float:
    """Return LongRoPE's factor on cos and sin.

    Source: arXiv 2402.13753, as in Phi-3's model code: `sqrt(1 + log(s) / log(original_max))`.
    """
    if scaling.attention_factor:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    return math.sqrt(
        1.0 + math.log(scaling.factor) / math.log(scaling.original_max_position_embeddings)
    )


def proportional_frequencies(frequencies: Array, scaling: ProportionalScaling) -> Array:
    """Stop the pairs beyond the share and divide the others.

    R8: pair `i` turns `theta ** (-2 i / r) / factor` if `i < floor(proportion * r / 2)`, else 0;
        r is the width of the whole head, not of the part that turns.

    Source: transformers' `proportional` rope type (Gemma 4, 2026).
    """
    turning = int(scaling.proportion * (2 * frequencies.shape[0]) // 2)
    pairs = np.arange(frequencies.shape[0])
    return np.where(pairs < turning, frequencies, 0.0) / scaling.factor


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Return `0.1 * mscale * log(factor) + 1`, 1 for a factor up to 1.

    R9: DeepSeek multiplies cos and sin by `yarn_mscale(factor, mscale) / yarn_mscale(factor,
        mscale_all_dim)`, and `softmax_scale` by `yarn_mscale(factor, mscale_all_dim) ** 2`.

    Source: DeepSeek-V3 model code (`yarn_get_mscale`, 2024); arXiv 2309.00071, equation 22.
    """
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def deepseek_yarn_scaling(
    *,
    factor: float,
    original_max_position_embeddings: int,
    mscale: float,
    mscale_all_dim: float,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> YarnScaling:
    """Return DeepSeek's YaRN: rounded ramp ends, and the ratio of two mscales (R9) on cos and sin.

    The layer's `softmax_scale` carries the other half, `yarn_mscale(factor, mscale_all_dim) ** 2`.
    DeepSeek rotates interleaved pairs: `RopeConfig(pairing="interleaved")`.

    Raises:
        ConfigError: a number that no scaling can have.
    """
    ratio = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=original_max_position_embeddings,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        attention_factor=ratio,
    )


def position_axes(rope: RopeConfig, pairs: int) -> Positions:
    """Return which axis of M-RoPE's positions turns each channel pair.

    R10: in blocks, the first `section[0]` pairs follow axis 0 (time), the next `section[1]`
        axis 1 (height), the rest axis 2 (width) (Wang et al. 2024, Qwen2-VL, arXiv 2409.12191,
        section 2.1).
    R11: interleaved, pair `i` follows axis `a = i % axes` if `i < axes * section[a]`, else axis 0
        (Qwen3-VL model code, 2025). Sections (3, 2, 2): 0 1 2 0 1 2 0.

    Returns:
        `(pairs,)`, int64; all zeros without sections.
    """
    section = rope.mrope_section
    if not section:
        return np.zeros(pairs, dtype=np.int64)
    if not rope.mrope_interleaved:
        return np.repeat(np.arange(len(section)), section)
    axis = np.arange(pairs) % len(section)
    reach = len(section) * np.array(section)[axis]
    return np.where(np.arange(pairs) < reach, axis, 0)
