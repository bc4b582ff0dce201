"""Golden's own error: every feature against exact values, within bounds derived step by step.

docs/certification.md states the rules of the bounds and holds the table that `run` writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from conformance.certify.arithmetic import Arithmetic
from conformance.certify.attend_cases import AttendCase, attend_cases, long_rows
from conformance.certify.checks import Change, check_attend, check_layer, unchanged
from conformance.certify.elementary import elementary_ulps
from conformance.certify.layer_cases import layer_cases
from conformance.certify.layer_formula import LayerCase
from conformance.certify.measure import Certificate, Measured, certificate
from conformance.certify.table import markdown, show, write

__all__ = ["Certificate", "certify", "jobs", "run"]

SEEDS = (0, 1, 2)
"""Inputs of every small feature."""

LONG = 1024
"""Positions of the long cases."""

SAMPLES = 4000
"""Arguments per elementary function."""

Job = tuple[str, Arithmetic, list[Callable[[Change], dict[str, Measured]]]]


def jobs(seeds: Iterable[int] = SEEDS, *, long: int = LONG) -> Iterator[Job]:
    """Yield each feature, its arithmetic, and the checks that measure it.

    Small cases are exact to 50 digits; long ones are summed by NumPy's own loops in extended
    precision, apart from the BLAS that golden uses, where the machine has such a precision.

    Args:
        seeds: inputs of the small cases.
        long: positions of the long cases; 0 leaves them out.
    """
    drawn = [(attend_cases(seed), layer_cases(seed)) for seed in seeds]
    for feature in drawn[0][0]:
        yield feature, "mpmath", [_attend(one[feature], "mpmath") for one, _ in drawn]
    for feature in drawn[0][1]:
        yield feature, "mpmath", [_layer(one[feature], "mpmath") for _, one in drawn]
    if long and np.finfo(np.longdouble).nmant >= 63:
        for name, size in (("", 1.0), (", peaked", 8.0)):
            case = long_rows(0, kv_len=long, size=size)
            yield f"attend, {long} positions{name}", "longdouble", [_attend(case, "longdouble")]


def _attend(case: AttendCase, arithmetic: Arithmetic) -> Callable[[Change], dict[str, Measured]]:
    return lambda change: check_attend(case, arithmetic, change)


def _layer(case: LayerCase, arithmetic: Arithmetic) -> Callable[[Change], dict[str, Measured]]:
    return lambda change: check_layer(case, arithmetic, change)


def certify(job: Job, change: Change = unchanged) -> tuple[Certificate, ...]:
    """Measure one feature.

    Args:
        job: one of `jobs`.
        change: rewrites golden's results before they are measured.

    Returns:
        A certificate for each of its results.
    """
    feature, arithmetic, checks = job
    measured = [check(change) for check in checks]
    return tuple(
        certificate(feature, result, arithmetic, [one[result] for one in measured])
        for result in measured[0]
    )


def run(path: Path | None = None, console: Console | None = None) -> tuple[Certificate, ...]:
    """Certify every feature, print the tables, and write them into a page.

    Args:
        path: page with the certificate's markers, docs/certification.md; None writes nothing.
        console: where to print; None is standard output.

    Returns:
        The certificates; golden is refuted where one does not hold.

    Raises:
        UsageError: mpmath is not installed, or the page has no markers.
    """
    console = console or Console()
    functions = elementary_ulps(SAMPLES)
    found: list[Certificate] = []
    for job in track(list(jobs()), description="certifying", console=console, transient=True):
        found.extend(certify(job))
    certificates = tuple(found)
    show(certificates, functions, console)
    if path is not None:
        write(path, markdown(certificates, functions))
    return certificates
