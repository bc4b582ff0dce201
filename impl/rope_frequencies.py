"""Rotary frequencies from Hugging Face's `rope_parameters`: default, linear, llama3 and yarn.

Everything here is Python floats, that is float64, computed once when a layer is built.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from impl.errors import ConfigError, explain

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True, slots=True)
class RotaryFrequencies:
    """Angles per position, and the factor on their cosines and sines.

    Attributes:
        inv_freq: `rotary_dim / 2` angles in radians per position.
        attention_scaling: factor on cos and sin; 1 but for yarn.
    """

    inv_freq: tuple[float, ...]
    attention_scaling: float = 1.0

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that rotate, the first ones."""
        return 2 * len(self.inv_freq)

    @classmethod
    def from_parameters(
        cls,
        head_dim: int,
        rope_parameters: Mapping[str, Any] | None = None,
        *,
        rope_theta: float = 10000.0,
        max_position_embeddings: int | None = None,
    ) -> RotaryFrequencies:
        """Read `rope_parameters` as Hugging Face does.

        Args:
            head_dim: width of a head.
            rope_parameters: `rope_type` and what that type needs; also `rope_theta` and
                `partial_rotary_factor`. None is the default kind.
            rope_theta: base where `rope_parameters` names none.
            max_position_embeddings: lets yarn derive an absent `factor`.

        Returns:
            The frequencies.

        Raises:
            ConfigError: an unknown `rope_type`, a missing parameter, or an odd rotary width.
        """
        given = dict(rope_parameters or {})
        kind = given.get("rope_type", given.get("type", "default"))
        base = float(given.get("rope_theta") or rope_theta)
        if not base > 1:
            raise ConfigError(explain("rope_theta", "exceed 1", base))
        rotary_dim = int(head_dim * float(given.get("partial_rotary_factor") or 1.0))
        if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
            raise ConfigError(
                explain(
                    "head_dim * partial_rotary_factor",
                    "be an even number from 2 to head_dim",
                    f"{rotary_dim} of {head_dim}",
                )
            )
        plain = [base ** (-i / rotary_dim) for i in range(0, rotary_dim, 2)]
        if kind == "default":
            return cls(inv_freq=tuple(plain))
        if kind == "linear":
            factor = _number(given, "factor", kind)
            return cls(inv_freq=tuple(f / factor for f in plain))
        if kind == "llama3":
            return cls(inv_freq=tuple(_llama3(plain, given)))
        if kind == "yarn":
            return _yarn(plain, base, given, max_position_embeddings)
        raise ConfigError(explain("rope_type", f"be one of {ROPE_TYPES}", repr(kind)))


def _number(given: Mapping[str, Any], name: str, kind: str) -> float:
    value = given.get(name)
    if value is None:
        raise ConfigError(explain(f"rope_parameters[{name!r}]", f"be given for {kind} RoPE", None))
    return float(value)


def _llama3(plain: list[float], given: Mapping[str, Any]) -> list[float]:
    """Keep short wavelengths, divide long ones by `factor`, blend in between; equal ends cut."""
    factor = _number(given, "factor", "llama3")
    low = _number(given, "low_freq_factor", "llama3")
    high = _number(given, "high_freq_factor", "llama3")
    original = _number(given, "original_max_position_embeddings", "llama3")
    if high < low:
        raise ConfigError(
            explain("high_freq_factor", "be at least low_freq_factor", f"{high} and {low}")
        )
    scaled = []
    for frequency in plain:
        turns = original * frequency / (2 * math.pi)
        kept = float(turns >= low)
        if high > low:
            kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        scaled.append((1 - kept) * frequency / factor + kept * frequency)
    return scaled


def _yarn(
    plain: list[float],
    base: float,
    given: Mapping[str, Any],
    max_position_embeddings: int | None,
) -> RotaryFrequencies:
    """Keep fast channels, divide slow ones by `factor`, ramp between, and scale cos and sin."""
    original = _number(given, "original_max_position_embeddings", "yarn")
    factor = given.get("factor")
    if factor is None and max_position_embeddings is not None:
        factor = max_position_embeddings / original
    if factor is None:
        factor = _number(given, "factor", "yarn")
    factor = float(factor)

    half, dim = len(plain), 2 * len(plain)

    def channel_turning(times: float) -> float:
        """Channel that turns this many times over the original context."""
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))

    first = channel_turning(float(given.get("beta_fast") or 32))
    last = channel_turning(float(given.get("beta_slow") or 1))
    if given.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001  # As Hugging Face: a ramp of no width would divide by zero.

    scaled = []
    for i in range(half):
        interpolated = min(max((i - first) / (last - first), 0.0), 1.0)
        scaled.append(plain[i] / factor * interpolated + plain[i] * (1 - interpolated))
    return RotaryFrequencies(
        inv_freq=tuple(scaled), attention_scaling=_yarn_attention_scaling(factor, given)
    )


def _yarn_attention_scaling(factor: float, given: Mapping[str, Any]) -> float:
    """`attention_factor` if given, else the ratio of the two mscales, else `0.1 ln(factor) + 1`."""
    explicit = given.get("attention_factor")
    if explicit is not None:
        return float(explicit)

    def concentration(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, all_dim = given.get("mscale"), given.get("mscale_all_dim")
    if mscale and all_dim:
        return concentration(float(mscale)) / concentration(float(all_dim))
    return concentration(1.0)
