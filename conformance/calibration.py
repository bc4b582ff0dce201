"""The calibration: how often the judge is wrong about correct kernels, and how sharp its scale is.

`run` draws cases until it has enough runs and can be stopped: it keeps what is done in a JSON
Lines file and goes on from there. Delete the file when golden, the error model or the judge
change.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from conformance.calibration_runs import Run, append_runs, read_runs, runs_of
from conformance.calibration_table import markdown as tables
from conformance.calibration_table import rich_table
from conformance.generated import write_measured
from conformance.processes import in_processes
from conformance.terminal import console

RUNS_PER_CASE = 12
"""Kernels that support a case, about."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a calibration found.

    Attributes:
        runs: every correct kernel on every case.
    """

    runs: tuple[Run, ...]

    @property
    def false_alarms(self) -> tuple[Run, ...]:
        """Runs that the judge rejected though the kernel is correct."""
        return tuple(run for run in self.runs if not run.conforms)


def run(
    markdown: Path | None,
    runs: int,
    *,
    records: Path | None = None,
    jobs: int = os.cpu_count() or 1,
) -> Calibration:
    """Judge correct kernels and print how the judge treats them.

    Args:
        markdown: page whose measured part is replaced, None for none.
        runs: kernels times cases, at least.
        records: JSON Lines file to keep runs in and to go on from, None for none.
        jobs: processes.
    """
    output = console()
    found = [] if records is None else read_runs(records)
    done = {one.index for one in found}
    left = [index for index in range(-(-runs // RUNS_PER_CASE)) if index not in done]
    for judged in in_processes(runs_of, left, jobs=jobs, title="calibration", console=output):
        found += judged
        if records is not None:
            append_runs(records, judged)
    found.sort(key=lambda one: (one.index, one.kernel))
    output.print(rich_table(found))
    for alarm in (one for one in found if not one.conforms):
        output.print(f"{alarm.kernel}, {alarm.case_id}: {alarm.reason}", highlight=False)
    if markdown is not None:
        write_measured(markdown, tables(found))
    return Calibration(tuple(found))
