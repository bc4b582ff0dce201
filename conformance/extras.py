"""What comes with a layer beyond its configuration: adapters, and the norm of its input."""

from __future__ import annotations

from dataclasses import dataclass

from conformance.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Extras:
    """What a call brings to a layer.

    Attributes:
        adapters: low-rank adapters (LoRA) on the four projections, 0 for none. Sequence `s` uses
            adapter `s`, and every `adapters + 1`-th none.
        rank: of the adapters; 0 without.
        input_norm: whether the layer applies the root mean square norm of its input itself.
        residual: whether it adds a residual before that norm.
    """

    adapters: int = 0
    rank: int = 0
    input_norm: bool = False
    residual: bool = False

    def __post_init__(self) -> None:
        if min(self.adapters, self.rank) < 0 or (self.adapters > 0) != (self.rank > 0):
            raise UsageError(
                f"adapters and their rank must be positive or both 0, got {self.adapters} and "
                f"{self.rank}"
            )
        if self.residual and not self.input_norm:
            raise UsageError("residual needs input_norm, which follows its sum")

    @property
    def features(self) -> tuple[str, ...]:
        """What they exercise."""
        named = {
            "LoRA": self.adapters > 0,
            "fused RMSNorm": self.input_norm,
            "fused residual": self.residual,
        }
        return tuple(name for name, on in named.items() if on)


NO_EXTRAS = Extras()
"""A layer by itself."""
