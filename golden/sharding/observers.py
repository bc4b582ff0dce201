"""Observers by rank: any stage of any rank can be captured, rounded or changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from golden.errors import ConfigError
from golden.stages import STAGES, Accumulation, Array, Observer, unobserved

COLLECTIVE_STAGES: dict[str, str] = {
    "hidden_gathered": "hidden states that the rank's projections read, (batch, q_len, hidden)",
    "k_gathered": "keys of the whole prompt for the rank's heads, in order, BHSD",
    "v_gathered": "values likewise",
    "k_prior": "cached keys that a prefill reads, of the rank's prefill heads and every row, BHSD",
    "v_prior": "values likewise",
    "q_gathered": "queries of the ranks that share a key/value head in flash decoding, BHSD",
    "logsumexp_sent": "of the rank's own keys in flash decoding, without sinks, for its group's "
    "queries, (batch, heads of the group, q_len); -inf where a query sees none of them",
    "attn_merged": "outputs of the rank's heads after joining partial ones by logsumexp, BHSD",
    "attn_gathered": "outputs of the rank's heads for the whole prompt, in order, BHSD",
    "o_reduced": "sum of `o_product` over the row, or the rank's piece of it",
    "returned": "what the layer returns on the rank",
}
"""What a rank receives from others, between the stages of `golden.STAGES`.

`o_product` is a rank's share of the sum over all heads; `o_proj` is the sum with its bias.
"""

RankObserver: TypeAlias = Callable[[int], Observer]
"""Gives each global rank its observer."""


def unobserved_ranks(rank: int) -> Observer:
    """Leave every rank alone: the exact model."""
    return unobserved


@dataclass(slots=True)
class RankCapture:
    """Keeps stages of ranks and changes nothing.

    Attributes:
        only: stages to keep; empty keeps all.
        ranks: ranks to keep; empty keeps all.
        values: `(rank, stage)` to the stage's value on that rank; the latest, if seen twice.

    Raises:
        ConfigError: a stage is neither in `golden.STAGES` nor in `COLLECTIVE_STAGES`.
    """

    only: frozenset[str] = frozenset()
    ranks: frozenset[int] = frozenset()
    values: dict[tuple[int, str], Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_stages(self.only)

    def __call__(self, rank: int) -> Observer:
        """Return the observer of one rank."""
        if self.ranks and rank not in self.ranks:
            return unobserved

        def observe(stage: str, value: Array, accumulation: Accumulation | None = None, /) -> Array:
            if not self.only or stage in self.only:
                self.values[rank, stage] = value.copy()
            return value

        return observe


def check_stages(stages: Iterable[str]) -> None:
    """Require names of stages that a rank has.

    Raises:
        ConfigError: a name is unknown.
    """
    unknown = sorted(set(stages) - STAGES.keys() - COLLECTIVE_STAGES.keys())
    if unknown:
        raise ConfigError(
            f"stages must be among {', '.join([*STAGES, *COLLECTIVE_STAGES])}, got "
            f"{', '.join(unknown)}"
        )
