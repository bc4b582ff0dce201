"""Says how the judge treats correct kernels: spread, distance from the limits, false alarms."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from rich.table import Table

from conformance.calibration_runs import Run
from conformance.generated import markdown_table

LOWEST, HIGHEST = 0.80, 1.15
"""Where the spread, RMS(z), of a kernel that matches its profile should lie."""

_HEAD = ("runs", "RMS(z) 5 %", "median", "95 %", "within", "false alarms")


def spread(run: Run) -> float | None:
    """Return RMS(z) of a run, None where its output has no error at all."""
    return next((value for name, value, _ in run.statistics if name == "spread" and value), None)


def _cells(label: str, runs: Sequence[Run]) -> tuple[str, ...]:
    spreads = np.array([s for run in runs if (s := spread(run)) is not None])
    alarms = sum(not run.conforms for run in runs)
    if not len(spreads):
        return label, str(len(runs)), "-", "-", "-", "-", str(alarms)
    low, middle, high = np.quantile(spreads, (0.05, 0.5, 0.95))
    within = float(((spreads >= LOWEST) & (spreads <= HIGHEST)).mean())
    return (
        label,
        str(len(runs)),
        *(f"{value:.2f}" for value in (low, middle, high)),
        f"{within:.1%}",
        str(alarms),
    )


def _grouped(runs: Iterable[Run], label: Callable[[Run], str]) -> list[tuple[str, ...]]:
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[label(run)].append(run)
    return [_cells(name, groups[name]) for name in sorted(groups)]


def rich_table(runs: Sequence[Run]) -> Table:
    """Return figures by dtype and kernel for a terminal."""
    table = Table(box=None)
    table.add_column("dtype, kernel")
    for column in _HEAD:
        table.add_column(column, justify="right")
    for row in (*_grouped(runs, lambda run: f"{run.dtype}, {run.kernel}"), _cells("all", runs)):
        table.add_row(*row)
    return table


def markdown(runs: Sequence[Run]) -> str:
    """Return the tables of the calibration page."""
    matching = [run for run in runs if run.matches]
    cases = {run.case_id for run in runs}
    return "\n\n".join(
        [
            f"{len(runs)} runs on {len(cases)} cases, {_alarms(runs)} false alarms. *Within* is "
            f"the share of runs whose RMS(z) lies in {LOWEST:.2f}..{HIGHEST:.2f}, of those with "
            "any error at all.",
            "Kernels that round and sum as their profile says, by dtype:",
            markdown_table(("dtype", *_HEAD), _grouped(matching, lambda run: run.dtype)),
            "The same by dtype and regime:",
            markdown_table(
                ("dtype, regime", *_HEAD),
                _grouped(matching, lambda run: f"{run.dtype}, {run.regime}"),
            ),
            "All kernels, by kernel, 16-bit formats:",
            markdown_table(
                ("kernel", *_HEAD),
                _grouped((r for r in runs if r.dtype != "float32"), lambda run: run.kernel),
            ),
            "All kernels, by kernel, float32:",
            markdown_table(
                ("kernel", *_HEAD),
                _grouped((r for r in runs if r.dtype == "float32"), lambda run: run.kernel),
            ),
            "Every statistic as a share of its limit:",
            _ratios(runs),
            *_alarm_list(runs),
        ]
    )


def _alarms(runs: Iterable[Run]) -> int:
    return sum(not run.conforms for run in runs)


def _ratios(runs: Iterable[Run]) -> str:
    shares: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        for name, value, limit in run.statistics:
            if limit > 0:
                shares[name.split(":")[0]].append(value / limit)
    rows = [
        (name, str(len(shares[name])), *(f"{q:.2f}" for q in np.quantile(shares[name], _QUANTILES)))
        for name in sorted(shares)
    ]
    return markdown_table(("statistic", "runs", "median", "95 %", "99.9 %", "largest"), rows)


_QUANTILES = (0.5, 0.95, 0.999, 1.0)


def _alarm_list(runs: Iterable[Run]) -> list[str]:
    lines = [f"* {run.kernel}, `{run.case_id}`: {run.reason}" for run in runs if not run.conforms]
    return ["False alarms:", "\n".join(lines)] if lines else []
