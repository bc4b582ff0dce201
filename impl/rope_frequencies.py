"""Rotary frequencies from Hugging Face's `rope_parameters`.

Everything here is Python floats, that is float64, computed once when a layer is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from impl import rope_scalings
from impl.errors import ConfigError, explain
from impl.rope_axes import position_axes

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")
# What older Qwen2-VL configurations call the default kind with mrope_section.
_ALIASES = {"mrope": "default"}


@dataclass(frozen=True, kw_only=True, slots=True)
class RotaryFrequencies:
    """Angles per position, and the factor on their cosines and sines.

    Attributes:
        inv_freq: `rotary_dim / 2` angles in radians per position.
        attention_scaling: factor on cos and sin; 1 but for yarn and longrope.
        long_inv_freq: angles in rows longer than `original_length` (longrope); None: no others.
        growth: dynamic NTK: in a row of `n > original_length` positions, pair `i` of `r / 2` turns
            `inv_freq[i] * (1 + growth * (n / original_length - 1)) ** (-2 i / (r - 2))`, which is
            the base grown as in Hugging Face's `dynamic`; None: the length changes nothing.
        original_length: positions the model was trained at; read with the two above.
        axes: axis of multimodal positions that turns each pair; empty: positions have one axis.
        axis_count: axes of those positions.
    """

    inv_freq: tuple[float, ...]
    attention_scaling: float = 1.0
    long_inv_freq: tuple[float, ...] | None = None
    growth: float | None = None
    original_length: float = 0.0
    axes: tuple[int, ...] = ()
    axis_count: int = 1

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that rotate, the first ones."""
        return 2 * len(self.inv_freq)

    @property
    def by_length(self) -> bool:
        """Whether the length of a row changes its angles."""
        return self.growth is not None or self.long_inv_freq is not None

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
            rope_parameters: `rope_type` and what that type needs; also `rope_theta`,
                `partial_rotary_factor`, `mrope_section` and `mrope_interleaved`. None is the
                default kind.
            rope_theta: base where `rope_parameters` names none.
            max_position_embeddings: lets yarn and longrope derive an absent `factor`, and stands
                in for an absent `original_max_position_embeddings` of dynamic.

        Returns:
            The frequencies.

        Raises:
            ConfigError: an unknown `rope_type`, a missing parameter, parameters of several layer
                types, sections that do not fit, or an odd rotary width.
        """
        given = dict(rope_parameters or {})
        by_layer = sorted(name for name, value in given.items() if isinstance(value, Mapping))
        if by_layer:
            raise ConfigError(
                explain(
                    "rope_parameters",
                    "be those of one layer type",
                    by_layer,
                    f"pass rope_parameters[{by_layer[0]!r}]",
                )
            )
        kind = given.get("rope_type", given.get("type", "default"))
        kind = _ALIASES.get(kind, kind)
        if kind not in ROPE_TYPES:
            raise ConfigError(explain("rope_type", f"be one of {ROPE_TYPES}", repr(kind)))
        base = float(given.get("rope_theta") or rope_theta)
        if not base > 1:
            raise ConfigError(explain("rope_theta", "exceed 1", base))
        rotary_dim = _rotary_dim(head_dim, given, kind)
        plain = [base ** (-i / rotary_dim) for i in range(0, rotary_dim, 2)]
        values = _scaled(plain, base, given, kind, max_position_embeddings)
        axes = position_axes(given, len(plain))
        return cls(axes=axes, axis_count=len(given.get("mrope_section") or (1,)), **values)


def _rotary_dim(head_dim: int, given: Mapping[str, Any], kind: str) -> int:
    share = 1.0 if kind == "proportional" else float(given.get("partial_rotary_factor") or 1.0)
    rotary_dim = int(head_dim * share)
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
        raise ConfigError(
            explain(
                "head_dim * partial_rotary_factor",
                "be an even number from 2 to head_dim",
                f"{rotary_dim} of {head_dim}",
            )
        )
    return rotary_dim


def _scaled(
    plain: list[float],
    base: float,
    given: Mapping[str, Any],
    kind: str,
    max_position_embeddings: int | None,
) -> dict[str, Any]:
    """Return the fields of `RotaryFrequencies` that the kind of RoPE sets."""
    if kind == "linear":
        factor = rope_scalings.number(given, "factor", kind)
        return {"inv_freq": tuple(f / factor for f in plain)}
    if kind == "llama3":
        return {"inv_freq": tuple(rope_scalings.llama3(plain, given))}
    if kind == "proportional":
        return {"inv_freq": tuple(rope_scalings.proportional(plain, given))}
    if kind == "yarn":
        scaled, scaling = rope_scalings.yarn(plain, base, given, max_position_embeddings)
        return {"inv_freq": tuple(scaled), "attention_scaling": scaling}
    if kind == "longrope":
        short, long, scaling = rope_scalings.longrope(plain, given, max_position_embeddings)
        return {
            "inv_freq": tuple(short),
            "long_inv_freq": tuple(long),
            "attention_scaling": scaling,
            "original_length": rope_scalings.original_length(given, kind),
        }
    if kind == "dynamic":
        if len(plain) < 2:
            raise ConfigError(
                explain("rope_type", "not be dynamic for 2 rotated channels", repr(kind))
            )
        return {
            "inv_freq": tuple(plain),
            "growth": rope_scalings.number(given, "factor", kind),
            "original_length": rope_scalings.original_length(given, kind, max_position_embeddings),
        }
    return {"inv_freq": tuple(plain)}
