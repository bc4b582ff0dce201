"""What a run of ranks ended in: each rank's state, and one sentence that says what went wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["finished", "raised", "died", "stopped"]


@dataclass(frozen=True, slots=True)
class Collective:
    """A collective that a rank took part in.

    Attributes:
        ranks: the group's ranks.
        what: operation, dtype and shape of this rank's tensor.
    """

    ranks: tuple[int, ...]
    what: str


@dataclass(frozen=True, slots=True)
class RankReport:
    """One rank at the end of a run.

    Attributes:
        rank: which.
        state: it returned; it raised; its process ended by itself; it still ran and was stopped.
        detail: the exception, or how the process ended.
        collectives: those it began, in order.
        waiting: the last of them was not over.
        result: what its function returned.
    """

    rank: int
    state: State
    detail: str = ""
    collectives: tuple[Collective, ...] = ()
    waiting: bool = False
    result: Any = field(default=None, compare=False)

    def __str__(self) -> str:
        words = f"rank {self.rank} {self.state}"
        if self.detail:
            words += f": {self.detail}"
        return f"{words}; {self.place}"

    @property
    def place(self) -> str:
        """How far it came."""
        if not self.collectives:
            return "before its first collective"
        last = self.collectives[-1]
        tense = "inside" if self.waiting else "after"
        return f"{tense} collective {len(self.collectives)}, {last.what} among {list(last.ranks)}"


@dataclass(frozen=True, slots=True)
class RunReport:
    """A run of ranks.

    Attributes:
        ranks: every rank, in order.
        seconds: wall time.
    """

    ranks: tuple[RankReport, ...]
    seconds: float

    @property
    def results(self) -> list[Any]:
        """What each rank's function returned.

        Raises:
            RanksFailed: a rank did not return, or the ranks were out of step.
        """
        if self.verdict:
            raise RanksFailed(str(self))
        return [rank.result for rank in self.ranks]

    @property
    def verdict(self) -> str:
        """What went wrong first, naming the rank; empty if nothing did.

        Ranks out of step come first, since their deaths and errors follow from that; then a rank
        whose process ended, then one that raised, then those that were still running.
        """
        odd = out_of_step(self.ranks)
        if odd:
            return odd
        for state in ("died", "raised"):
            found = [rank for rank in self.ranks if rank.state == state]
            if found:
                # an error in reaching a rank that is gone follows from the rank that went first
                causes = [rank for rank in found if not _lost_peer(rank.detail)] or found
                return str(causes[0])
        hung = [rank for rank in self.ranks if rank.state == "stopped"]
        if not hung:
            return ""
        behind = min(hung, key=lambda rank: (rank.waiting, len(rank.collectives)))
        numbers = ", ".join(str(rank.rank) for rank in hung)
        return f"ranks {numbers} did not finish in {self.seconds:.0f} s; furthest behind: {behind}"

    def __str__(self) -> str:
        return "\n".join([self.verdict, *map(str, self.ranks)])


class RanksFailed(RuntimeError):
    """A run of ranks that did not end well; the text is the verdict and every rank's state."""


def out_of_step(ranks: Sequence[RankReport]) -> str:
    """Say where ranks of one group first began different collectives; empty if nowhere."""
    groups = {c.ranks for rank in ranks for c in rank.collectives}
    for group in sorted(groups):
        lists = {
            rank.rank: [c.what for c in rank.collectives if c.ranks == group]
            for rank in ranks
            if rank.rank in group
        }
        for step in range(max(map(len, lists.values()), default=0)):
            begun = {rank: what[step] for rank, what in lists.items() if step < len(what)}
            if len(set(begun.values())) > 1:
                return _disagreement(step, group, begun)
        done = {rank.rank for rank in ranks if rank.state == "finished"}
        most = max(map(len, lists.values()))
        short = [r for r, what in lists.items() if r in done and len(what) < most]
        if short:
            return (
                f"rank {short[0]} is out of step: it finished after {len(lists[short[0]])} "
                f"collectives among {list(group)}, others began {most}"
            )
    return ""


def _disagreement(step: int, group: tuple[int, ...], begun: dict[int, str]) -> str:
    kinds = list(begun.values())
    usual = max(set(kinds), key=lambda kind: (kinds.count(kind), -kinds.index(kind)))
    odd = next(rank for rank, what in begun.items() if what != usual)
    return (
        f"rank {odd} is out of step: its collective {step + 1} among {list(group)} is "
        f"{begun[odd]}, that of others is {usual}"
    )


def _lost_peer(detail: str) -> bool:
    return any(word in detail for word in ("peer", "Connection", "timed out", "Timed out"))
