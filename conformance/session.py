"""Runs the pytest suites from the command line: progress while they run, a table afterwards."""

from __future__ import annotations

import contextlib
import io
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from conformance import suites
from reports.records import VERDICTS, CaseRecord, Results


class _ProgressBar:
    """Pytest plugin that moves a progress bar on with every judged case."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("judging", total=total, failed="")
        self._failed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed += 1
            self._progress.update(self._task, failed=f"{self._failed} failed")
        # a test whose process died has no end, and pytest-xdist reports "???"
        if report.when not in ("setup", "call"):
            self._progress.advance(self._task)


def run_session(options: Sequence[str], *, total: int, jobs: int, console: Console) -> bool:
    """Run the suites in this process, or in `jobs` processes under it.

    Args:
        options: options of the plugin.
        total: number of cases they select.
        jobs: processes.
        console: where the progress bar goes, and pytest's own output if the session fails.

    Returns:
        Whether every case was judged, whatever the verdicts.
    """
    settings = Path(suites.__file__).with_name("pytest.ini")
    arguments = ["-c", str(settings), "--pyargs", "conformance.suites", "-q", *options]
    if jobs > 1:
        # each process keeps to one core; set before they start, for that is when BLAS reads it
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, "1")
        arguments += ["-n", str(jobs)]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[red]{task.fields[failed]}"),
    )
    output = io.StringIO()
    with Progress(*columns, console=console) as progress:
        bar = _ProgressBar(progress, total)
        with contextlib.redirect_stdout(output):
            code = pytest.main(arguments, plugins=[bar])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        console.print(output.getvalue(), markup=False, highlight=False)
        return False
    return True


def summary_table(results: Results) -> Table:
    """Return verdicts counted by suite, with the worst statistic as a multiple of its limit."""
    table = Table(title=f"{results.environment.get('subject', '')}: verdicts", title_justify="left")
    seen = [verdict for verdict in VERDICTS if any(c.verdict == verdict for c in results.cases)]
    several = len({case.subject for case in results.cases}) > 1
    if several:
        table.add_column("subject")
    table.add_column("suite")
    table.add_column("cases", justify="right")
    for verdict in seen:
        bad = verdict not in ("CONFORMS", "UNSUPPORTED")
        table.add_column(verdict, justify="right", style="red" if bad else None)
    table.add_column("worst / limit", justify="right")
    by_suite: dict[tuple[str, str], list[CaseRecord]] = {}
    for case in results.cases:
        by_suite.setdefault((case.subject, case.suite), []).append(case)
    for (subject, suite), cases in by_suite.items():
        counts = Counter(case.verdict for case in cases)
        worst = max(case.worst_ratio for case in cases)
        numbers = [str(counts[verdict]) for verdict in seen]
        names = (subject, suite) if several else (suite,)
        table.add_row(*names, str(len(cases)), *numbers, f"{worst:.2f}")
    return table
