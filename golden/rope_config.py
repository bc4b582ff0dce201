"""Which rotary position embedding a layer uses: base, pairing, share of the head, scaling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from golden.checks import require, require_count, require_positive
from golden.rope_length_config import (
    DynamicNTKScaling,
    LongRopeScaling,
    ProportionalScaling,
)

__all__ = [
    "DynamicNTKScaling",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "ProportionalScaling",
    "RopeConfig",
    "RopeScaling",
    "YarnScaling",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearScaling:
    """Position interpolation: every frequency divided by `factor`."""

    factor: float

    def __post_init__(self) -> None:
        require_positive("factor", self.factor)


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short kept, a ramp between.

    Attributes:
        factor: divisor of frequencies whose wavelength exceeds `original_max / low_freq_factor`.
        low_freq_factor: see above; the ramp starts here.
        high_freq_factor: wavelengths under `original_max / high_freq_factor` are kept; equal to
            `low_freq_factor` there is no ramp but a cut.
        original_max_position_embeddings: context length the model was trained at.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        require_positive("factor", self.factor)
        require(
            0 < self.low_freq_factor <= self.high_freq_factor,
            "low_freq_factor must be positive and at most high_freq_factor, got "
            f"{self.low_freq_factor} and {self.high_freq_factor}",
        )
        require_count("original_max_position_embeddings", self.original_max_position_embeddings)


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnScaling:
    """YaRN: interpolation by parts, and a factor on cos and sin.

    Attributes:
        factor: divisor of the frequencies that are interpolated fully.
        original_max_position_embeddings: context length the model was trained at.
        beta_fast: rotations over that context above which a frequency is kept.
        beta_slow: rotations under which a frequency is interpolated fully.
        truncate: whether the ramp's ends are rounded outwards to whole channels.
        attention_factor: factor on cos and sin; 0 means `0.1 * log(factor) + 1`.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 0.0

    def __post_init__(self) -> None:
        require_positive("factor", self.factor)
        require(self.factor >= 1, f"factor must be at least 1, got {self.factor}")
        require_count("original_max_position_embeddings", self.original_max_position_embeddings)
        require(
            0 <= self.attention_factor < math.inf,
            f"attention_factor must be finite and not negative, got {self.attention_factor}",
        )
        require(
            0 < self.beta_slow < self.beta_fast,
            f"beta_slow must lie between 0 and beta_fast, got {self.beta_slow} "
            f"and {self.beta_fast}",
        )


RopeScaling: TypeAlias = (
    LinearScaling
    | Llama3Scaling
    | YarnScaling
    | DynamicNTKScaling
    | LongRopeScaling
    | ProportionalScaling
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary position embedding of queries and keys.

    Attributes:
        theta: base of the frequencies `theta ** (-2 i / rotary_dim)`.
        pairing: `half` rotates channel `i` with `i + rotary_dim/2` (rotate_half);
            `interleaved` rotates channels `2 i` and `2 i + 1` (polar).
        rotary_dim: leading channels of the head that rotate; 0 means all of them.
        scaling: change of the frequencies for long contexts, None for none.
        mrope_section: channel pairs per position axis (time, height, width) of multimodal
            M-RoPE; empty for positions of one axis.
        mrope_interleaved: whether those axes alternate pair by pair instead of standing in blocks.
    """

    theta: float = 10000.0
    pairing: Literal["half", "interleaved"] = "half"
    rotary_dim: int = 0
    scaling: RopeScaling | None = None
    mrope_section: tuple[int, ...] = ()
    mrope_interleaved: bool = False

    def __post_init__(self) -> None:
        require_positive("theta", self.theta)
        require(
            self.pairing in ("half", "interleaved"),
            f"pairing must be 'half' or 'interleaved', got {self.pairing!r}",
        )
        require(
            not isinstance(self.scaling, YarnScaling) or self.theta > 1,
            f"theta must be above 1 for YaRN, which divides by its logarithm, got {self.theta}",
        )
        require(
            isinstance(self.rotary_dim, int) and self.rotary_dim >= 0 and self.rotary_dim % 2 == 0,
            f"rotary_dim must be even and not negative, got {self.rotary_dim}",
        )
        require(
            not self.mrope_section or min(self.mrope_section) >= 0,
            f"mrope_section must hold channel pairs per axis, got {self.mrope_section}",
        )
        require(
            bool(self.mrope_section) or not self.mrope_interleaved,
            "mrope_interleaved requires mrope_section, got none",
        )
        require(
            self.rotary_dim == 0
            or not self.mrope_section
            or sum(self.mrope_section) == self.rotary_dim // 2,
            f"mrope_section must sum to rotary_dim / 2 = {self.rotary_dim // 2} pairs, got "
            f"{self.mrope_section}",
        )
