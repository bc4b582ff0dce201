"""The section of one case as plain blocks of text.

The static page and the script that fills in the rest both draw these blocks, so numbers are
formatted and chosen in one place, here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from reports.formatting import cut, duration, exact, flatten, number, place, ratio
from reports.records import CaseRecord, RankRecord, Statistic, Worst

LONGEST_TRACEBACK = 20_000
"""Characters of a traceback that are shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """A list of names and values."""

    kind: ClassVar[str] = "facts"
    title: str
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A table; `marked` holds the rows that exceed their limit."""

    kind: ClassVar[str] = "grid"
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """Text to be read or copied as it stands."""

    kind: ClassVar[str] = "code"
    title: str
    text: str


Block = Facts | Grid | Code


def blocks(case: CaseRecord) -> Iterator[Block]:
    """Yield everything the record says beyond its verdict and reason, in reading order."""
    if case.ranks:
        yield _ranks(case.ranks)
    if case.worst is not None:
        yield _worst(case.worst)
    if case.statistics:
        yield _statistics(case.statistics)
    if case.power:
        found = tuple((name, number(size)) for name, size in case.power.items())
        yield Facts(title="Smallest error found", pairs=found)
    if case.vacuous:
        yield Facts(
            title="Vacuous",
            pairs=tuple((output, "zeros would pass here too") for output in case.vacuous),
        )
    if case.undetected:
        yield Facts(title="Known defects not rejected here", pairs=tuple(case.undetected.items()))
    if case.traceback:
        yield Code(title="Traceback", text=cut(case.traceback, LONGEST_TRACEBACK))
    if case.reproduce:
        yield Code(title="Reproduce", text=case.reproduce)
    yield Facts(title="Case", pairs=tuple(_identity(case)))
    yield Facts(title="Workload", pairs=tuple(flatten(case.workload)))
    yield Facts(title="Configuration", pairs=tuple(flatten(case.config)))
    yield Facts(
        title=f"Precision profile {case.profile}".rstrip(),
        pairs=tuple(flatten(case.profile_stages)),
    )
    if case.seconds:
        times = tuple((step, duration(seconds)) for step, seconds in case.seconds.items())
        yield Facts(title="Time", pairs=times)


def _ranks(ranks: tuple[RankRecord, ...]) -> Grid:
    return Grid(
        title="Ranks",
        header=("rank", "verdict", "wrong first", "why"),
        rows=tuple(
            (f"rank {rank.rank}", rank.verdict, "yes" if rank.first else "", rank.reason)
            for rank in ranks
        ),
        marked=tuple(place for place, rank in enumerate(ranks) if rank.first),
    )


def _worst(worst: Worst) -> Facts:
    return Facts(
        title="Worst element",
        pairs=(
            ("element", f"{worst.output}{place(worst.index)}"),
            ("observed", exact(worst.observed)),
            ("expected", exact(worst.expected)),
            ("error", number(worst.error)),
            ("sigma", number(worst.sigma)),
            ("z = error / sigma", number(worst.z)),
        ),
    )


def _statistics(statistics: tuple[Statistic, ...]) -> Grid:
    return Grid(
        title="Statistics",
        header=("output", "statistic", "value", "limit", "ratio", "where", "limit comes from"),
        rows=tuple(
            (
                statistic.output,
                statistic.name,
                number(statistic.value),
                number(statistic.limit),
                ratio(statistic.ratio),
                place(statistic.where),
                statistic.derivation,
            )
            for statistic in statistics
        ),
        marked=tuple(place for place, item in enumerate(statistics) if item.ratio > 1),
    )


def _identity(case: CaseRecord) -> Iterator[tuple[str, str]]:
    yield "subject", case.subject
    yield "suite", case.suite
    yield "features", ", ".join(case.features)
    if case.model or case.layer:
        yield "model", case.model
        yield "layer", case.layer
    yield "phase", case.phase
    yield "dtype", case.dtype
    yield "regime", case.regime
    yield "seed", str(case.seed)
