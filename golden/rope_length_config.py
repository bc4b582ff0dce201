"""RoPE scalings that look at the sequence's length, or at each channel pair, as values."""

from __future__ import annotations

from dataclasses import dataclass

from golden.checks import require, require_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicNTKScaling:
    """NTK-aware scaling whose base grows with the length of the sequence.

    Attributes:
        factor: weight of the growth; 1 stretches the base by `seq_len / original_max` alone.
        original_max_position_embeddings: length up to which nothing is scaled.
        seq_len: length that sets the base; 0 takes each row's largest position plus 1, call by
            call, so that keys cached earlier keep the base they were rotated with.
    """

    factor: float
    original_max_position_embeddings: int
    seq_len: int = 0

    def __post_init__(self) -> None:
        require_positive("factor", self.factor)
        _require_lengths(self.original_max_position_embeddings, self.seq_len)


@dataclass(frozen=True, kw_only=True, slots=True)
class LongRopeScaling:
    """LongRoPE: a divisor per channel pair, one set for short sequences and one for long.

    Attributes:
        short_factor: divisors of the frequencies up to the original length, one per pair.
        long_factor: divisors beyond it.
        factor: how many times longer than the original the context is; sets the factor on cos
            and sin.
        original_max_position_embeddings: context length the model was trained at.
        attention_factor: factor on cos and sin; 0 means
            `sqrt(1 + log(factor) / log(original_max))`, and 1 for a `factor` up to 1.
        seq_len: length that picks the set; 0 takes each row's largest position plus 1.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    factor: float
    original_max_position_embeddings: int
    attention_factor: float = 0.0
    seq_len: int = 0

    def __post_init__(self) -> None:
        require(
            len(self.short_factor) == len(self.long_factor),
            "short_factor and long_factor must have one number per channel pair, got "
            f"{len(self.short_factor)} and {len(self.long_factor)}",
        )
        require(
            all(x > 0 for x in (*self.short_factor, *self.long_factor)),
            "short_factor and long_factor must be positive divisors",
        )
        require_positive("factor", self.factor)
        _require_lengths(self.original_max_position_embeddings, self.seq_len)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProportionalScaling:
    """Proportional RoPE (Gemma 4): only the fastest pairs turn, at their full-width frequencies.

    Unlike partial rotation (`rotary_dim`), pairs span the whole head and exponents divide by its
    width: the pairs beyond the share have frequency zero.

    Attributes:
        proportion: share of the pairs that turn, above 0 and at most 1.
        factor: divisor of their frequencies.
    """

    proportion: float
    factor: float = 1.0

    def __post_init__(self) -> None:
        require(
            0 < self.proportion <= 1,
            f"proportion must lie above 0 and be at most 1, got {self.proportion}",
        )
        require_positive("factor", self.factor)


def _require_lengths(original: int, seq_len: int) -> None:
    require(original > 1, f"original_max_position_embeddings must exceed 1, got {original}")
    require(seq_len >= 0, f"seq_len must be positive or 0 (each row's own), got {seq_len}")
