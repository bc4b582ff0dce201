"""Rotary position embedding: frequencies, their scalings for long contexts, and the rotation."""

from __future__ import annotations

import math

import numpy as np

from golden.arrays import Positions
from golden.errors import ConfigError, ShapeError
from golden.rope_config import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    RopeConfig,
    YarnScaling,
)
from golden.rope_scalings import (
    dynamic_ntk_theta,
    longrope_attention_factor,
    longrope_frequencies,
    position_axes,
    proportional_frequencies,
)
from golden.stages import Array, Observer, unobserved


def rope_frequencies(
    rope: RopeConfig, rotary_dim: int, *, seq_len: int = 0, observe: Observer = unobserved
) -> Array:
    """Return the angle each channel pair turns per position, after scaling.

    R1: unscaled, pair `i` turns `theta ** (-2 i / rotary_dim)` radians per position.
    R2: linear scaling divides all by `factor` (Chen et al. 2023, arXiv 2306.15595).
    R3: llama3 scaling divides wavelengths beyond `original_max / low_freq_factor` by `factor`,
        keeps those under `original_max / high_freq_factor`, and blends linearly in
        `original_max / wavelength` between (Llama 3.1 model code, 2024).
    R4: YaRN blends by channel between kept and divided frequencies; the ramp runs from the channel
        that turns `beta_fast` times over the original context to the one that turns `beta_slow`
        times (Peng et al. 2023, arXiv 2309.00071, section 3.2).
    R6 to R8: dynamic NTK, LongRoPE and proportional scaling, see `golden.rope_scalings`.

    Args:
        rope: which embedding.
        rotary_dim: channels that rotate, even.
        seq_len: length of the sequence, read by dynamic NTK and LongRoPE unless their own
            `seq_len` is set.
        observe: sees `rope_exponents` to `rope_scaled_frequencies`.

    Returns:
        `(rotary_dim / 2,)`, float64, radians per position.

    Raises:
        ConfigError: `rotary_dim` is odd or not positive.
    """
    if rotary_dim < 2 or rotary_dim % 2:
        raise ConfigError(f"rotary_dim must be even and positive, got {rotary_dim}")
    exponents = observe("rope_exponents", np.arange(0, rotary_dim, 2) / rotary_dim)
    scaling, theta = rope.scaling, rope.theta
    if isinstance(scaling, DynamicNTKScaling):
        theta = dynamic_ntk_theta(theta, rotary_dim, scaling, scaling.seq_len or seq_len)
    frequencies = observe("rope_frequencies", 1.0 / observe("rope_powers", theta**exponents))
    if scaling is None:
        return frequencies
    if isinstance(scaling, LinearScaling):
        scaled = frequencies / scaling.factor
    elif isinstance(scaling, Llama3Scaling):
        scaled = _llama3(frequencies, scaling)
    elif isinstance(scaling, YarnScaling):
        scaled = _yarn(frequencies, rope.theta, rotary_dim, scaling)
    elif isinstance(scaling, LongRopeScaling):
        scaled = longrope_frequencies(frequencies, scaling, scaling.seq_len or seq_len)
    elif isinstance(scaling, ProportionalScaling):
        scaled = proportional_frequencies(frequencies, scaling)
    else:
        scaled = frequencies  # R6 changed the base
    return observe("rope_scaled_frequencies", scaled)


def _llama3(frequencies: Array, scaling: Llama3Scaling) -> Array:
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    if span == 0:
        return np.where(turns >= scaling.low_freq_factor, frequencies, frequencies / scaling.factor)
    kept: Array = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return (1.0 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn(frequencies: Array, theta: float, rotary_dim: int, scaling: YarnScaling) -> Array:
    def channel(turns: float) -> float:
        context = scaling.original_max_position_embeddings
        return rotary_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    if high < 0 or low < high == 0:  # even the fastest channel turns less than beta_slow times
        return frequencies / scaling.factor
    if low > rotary_dim - 1:  # even the slowest turns more than beta_fast times
        return frequencies
    low, high = max(low, 0.0), min(high, rotary_dim - 1.0)
    if low == high:
        high += 0.001  # the ramp would divide by zero; the model code of the paper does the same
    ramp: Array = np.clip((np.arange(rotary_dim // 2) - low) / (high - low), 0.0, 1.0)
    return frequencies / scaling.factor * ramp + frequencies * (1.0 - ramp)


def attention_factor(rope: RopeConfig) -> float:
    """Return the factor on cos and sin: YaRN's concentration, LongRoPE's, 1 for all others.

    Source: arXiv 2309.00071, equation 22: `0.1 log(factor) + 1`; `longrope_attention_factor`.
    """
    if isinstance(rope.scaling, LongRopeScaling):
        return longrope_attention_factor(rope.scaling)
    if not isinstance(rope.scaling, YarnScaling):
        return 1.0
    return rope.scaling.attention_factor or 0.1 * math.log(rope.scaling.factor) + 1.0


def rope_cos_sin(
    rope: RopeConfig, rotary_dim: int, positions: Positions, *, observe: Observer = unobserved
) -> tuple[Array, Array]:
    """Return cosine and sine of every position's angles, times the attention factor.

    Args:
        rope: which embedding.
        rotary_dim: channels that rotate, even.
        positions: `(batch, length)`, or `(axes, batch, length)` for M-RoPE, int64; positions of
            one axis stand for all of M-RoPE's.
        observe: sees the `rope_` stages.

    Returns:
        Two arrays `(batch, length, rotary_dim / 2)`, float64.

    Raises:
        ShapeError: positions have axes that the embedding has not.
    """
    frequencies = _frequencies_by_row(rope, rotary_dim, positions, observe)
    turned_by = positions[..., None]
    if positions.ndim == 3:
        if positions.shape[0] != len(rope.mrope_section):
            raise ShapeError(
                f"positions must have {len(rope.mrope_section) or 'no'} axes, one per entry of "
                f"mrope_section, got shape {positions.shape}"
            )
        turned_by = np.moveaxis(positions[position_axes(rope, rotary_dim // 2)], 0, -1)
    angles = observe("rope_angles", turned_by * frequencies)
    factor = attention_factor(rope)
    cos = observe("rope_cos", np.cos(angles) * factor)
    return cos, observe("rope_sin", np.sin(angles) * factor)


def _frequencies_by_row(
    rope: RopeConfig, rotary_dim: int, positions: Positions, observe: Observer
) -> Array:
    """Return `(rotary_dim / 2,)`, or `(batch, 1, rotary_dim / 2)` if rows set their own."""
    scaling = rope.scaling
    if not isinstance(scaling, (DynamicNTKScaling, LongRopeScaling)) or scaling.seq_len:
        return rope_frequencies(rope, rotary_dim, observe=observe)
    rows = np.moveaxis(positions, -2, 0).reshape(positions.shape[-2], -1)
    lengths = rows.max(axis=1, initial=-1) + 1
    return np.stack(
        [rope_frequencies(rope, rotary_dim, seq_len=int(n), observe=observe) for n in lengths]
    )[:, None]


def rotate(
    x: Array,
    cos: Array,
    sin: Array,
    *,
    pairing: str,
    observe: Observer = unobserved,
    name: str = "q",
) -> Array:
    """Rotate the leading channels of each head; the rest pass unchanged.

    R5: `half` turns the pair (i, i + r/2), `interleaved` the pair (2 i, 2 i + 1), by
        `(a, b) -> (a cos - b sin, b cos + a sin)`; r is the number of rotated channels.

    Args:
        x: `(batch, heads, length, head_dim)`, BHSD, float64.
        cos: `(batch, length, r / 2)`, float64.
        sin: like `cos`.
        pairing: `half` or `interleaved`.
        observe: sees `{name}_rope_cos`, `{name}_rope_sin` and `{name}_rope`.
        name: `q` or `k`.

    Returns:
        Rotated, shaped like `x`.

    Raises:
        ShapeError: `cos` holds more channel pairs than `x` has, or `sin` is shaped otherwise.
        ConfigError: `pairing` is neither word.

    Source: Su et al. (2021), arXiv 2104.09864, equation 34.
    """
    pairs = cos.shape[-1]
    if 2 * pairs > x.shape[-1]:
        raise ShapeError(f"cos must hold at most {x.shape[-1] // 2} channel pairs, got {pairs}")
    if sin.shape != cos.shape:
        raise ShapeError(f"sin must be shaped like cos, {cos.shape}, got {sin.shape}")
    if pairing not in ("half", "interleaved"):
        raise ConfigError(f"pairing must be 'half' or 'interleaved', got {pairing!r}")
    rotated, passed = x[..., : 2 * pairs], x[..., 2 * pairs :]
    first, second = _channel_pairs(pairs, pairing)
    cos_full = np.empty((*cos.shape[:2], 2 * pairs))
    sin_full = np.empty_like(cos_full)
    cos_full[..., first] = cos_full[..., second] = cos
    sin_full[..., first] = sin_full[..., second] = sin
    turned = np.empty_like(rotated)
    turned[..., first] = -rotated[..., second]
    turned[..., second] = rotated[..., first]
    along = observe(f"{name}_rope_cos", rotated * cos_full[:, None])
    across = observe(f"{name}_rope_sin", turned * sin_full[:, None])
    return observe(f"{name}_rope", np.concatenate([along + across, passed], axis=-1))


def _channel_pairs(pairs: int, pairing: str) -> tuple[slice, slice]:
    if pairing == "half":
        return slice(0, pairs), slice(pairs, 2 * pairs)
    return slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
