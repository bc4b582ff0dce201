"""How near their limits the conforming cases sit: a histogram as inline SVG geometry."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from reports.formatting import count, ratio
from reports.links import fragment
from reports.records import CaseRecord

BINS = 20
"""Bins between a ratio of 0 and the limit, a ratio of 1."""

BAR_WIDTH = 34
BAR_HEIGHT = 72


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One bin.

    Attributes:
        amount: cases in it.
        x: left edge.
        height: height; 0 when empty, at least 2 otherwise.
        title: the bin in words.
        link: fragment of the filter that shows exactly these cases.
    """

    amount: int
    x: int
    height: int
    title: str
    link: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Distribution:
    """The histogram and what it says in words.

    Attributes:
        bars: one per bin, from 0 to the limit.
        measured: conforming cases that hold a ratio.
        summary: median, 90th percentile and closest case, in words.
        beyond: conforming cases whose own ratio exceeds 1; such records contradict themselves.
    """

    bars: tuple[Bar, ...]
    measured: int
    summary: str
    beyond: int

    @property
    def width(self) -> int:
        """Width of all bars."""
        return BINS * BAR_WIDTH


def _bin(value: float) -> int:
    return min(max(int(value * BINS), 0), BINS - 1)


def distribution(cases: Iterable[CaseRecord]) -> Distribution:
    """Collect the worst ratio of every conforming case that has one."""
    ratios = sorted(
        case.worst_ratio for case in cases if case.verdict == "CONFORMS" and case.statistics
    )
    within = [value for value in ratios if value <= 1]
    amounts = [0] * BINS
    for value in within:
        amounts[_bin(value)] += 1
    tallest = max(amounts)
    summary = ""
    if within:
        median, high = within[len(within) // 2], within[len(within) * 9 // 10]
        summary = (
            f"{count(len(within), 'conforming case')}: median {ratio(median)} of the limit, "
            f"nine in ten up to {ratio(high)}, closest {ratio(within[-1])}"
        )
    return Distribution(
        bars=tuple(_bar(place, amount, tallest) for place, amount in enumerate(amounts)),
        measured=len(within),
        summary=summary,
        beyond=len(ratios) - len(within),
    )


def _bar(place: int, amount: int, tallest: int) -> Bar:
    low, high = f"{place / BINS:.2f}", f"{(place + 1) / BINS:.2f}"
    from_low = f"ratio>={low} " if place else ""
    below_high = f"ratio<{high}" if place < BINS - 1 else "ratio<=1"
    return Bar(
        amount=amount,
        x=place * BAR_WIDTH,
        height=max(2, round(BAR_HEIGHT * amount / tallest)) if amount else 0,
        title=f"{count(amount, 'case')} between {low} and {high} of the limit",
        link=fragment(verdict="CONFORMS", q=from_low + below_high),
    )
