"""A verdict from few Monte Carlo runs, from many before it condemns, from most where it is close.

A scale drawn from few runs may know a row's error too little to condemn anything: where one score
dominates a row, its error has one degree of freedom, and `K` runs know its variance as a mean of
`K` squares, `chi2(K) / K` of the truth. With chance 1e-6 a row's scale from `MANY_RUNS` is low by
`ACQUITTABLE` or more, so a case whose worst figure exceeds its limit by less may owe that to the
runs, and one that exceeds it by more does not.

Every look judges by a scale of its own, and the last one taken decides: a correct subject fails
only if all of them fail it, so further looks can but lower its chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from scipy.special import chdtri

from conformance.error_model import MANY_RUNS, ErrorScale, Outputs, fewest_runs
from conformance.judge import Judgement

MOST_RUNS = 128
"""Runs behind a verdict that finds something near its limit."""
ACQUITTABLE = math.sqrt(MANY_RUNS / float(chdtri(MANY_RUNS, 1.0 - 1e-6)))
"""Worst share of a limit after `MANY_RUNS` that more runs may bring within it: 2.13."""
LARGE = 1 << 20
"""Values of all outputs together from which on `MOST_RUNS` would take gigabytes to hold."""


def look(
    expected: Outputs,
    predict: Callable[[int], Mapping[str, ErrorScale]],
    judge: Callable[[Mapping[str, ErrorScale]], Judgement],
) -> tuple[Judgement, Mapping[str, ErrorScale]]:
    """Judge with few runs; with more if that finds something that few runs may be wrong about.

    A scale from a covariance rests on no run, and a large output has no third look.

    Args:
        expected: golden's outputs.
        predict: the error scale of each output from a number of runs.
        judge: the verdict by a scale.

    Returns:
        The verdict, and the scale it was found with.
    """
    runs = fewest_runs(expected)
    while True:
        scales = predict(runs)
        judgement = judge(scales)
        drawn = any(scale.covariance is None for scale in scales.values())
        if judgement.conforms or not drawn:
            return judgement, scales
        if runs < MANY_RUNS:
            runs = MANY_RUNS
        elif runs < MOST_RUNS and _close(judgement) and _held(expected):
            runs = MOST_RUNS
        else:
            return judgement, scales


def _close(judgement: Judgement) -> bool:
    return max(statistic.ratio for statistic in judgement.statistics) <= ACQUITTABLE


def _held(expected: Outputs) -> bool:
    return sum(value.size for value in expected.values()) < LARGE
