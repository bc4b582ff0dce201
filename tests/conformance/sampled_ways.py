"""What the error scale from sampled rows has to share with that from runs of all rows."""

from __future__ import annotations

import numpy as np

from conformance.error_model import FEW_RUNS, ErrorScale, weighing
from golden import Array

FORM = 0.01
"""Share by which the closed form may miss the runs' variance, rows pooled: it takes places between
neighbours from golden's scores, and these change with every run. A fifth of what a case is judged
by it at all for, `AGREEMENT`, so a form that is off by that is found."""
DERIVATIVE = 2.0**-16
"""Share by which a derivative may be off that is taken over a step of 2**-20: half the step, times
the second derivative over the first. That is as the distance of scores from their row's mean, which
is below 32 here."""


def disagreement(long_way: ErrorScale, short_way: ErrorScale, rows: Array) -> tuple[float, float]:
    """Return how far the variances of both ways are apart, rows pooled, and how far they may be.

    A row's variance from `n` runs is raised to what makes the mean square of a new error over it
    1. So the mean of the truth over it is 1, but for the raise being taken from `n - 1` runs: the
    spread of the variances, `1 / (n - 1)` of which that is. Rows err independently, so the mean is
    known to their spread over the root of their number; 4 of these leave a chance of 6e-5.
    """
    ratio = np.square(short_way.row_sigma[rows]) / np.square(long_way.row_sigma[rows])
    expected = 1 - (ratio.std() / ratio.mean()) ** 2 / (FEW_RUNS - 1)
    return abs(ratio.mean() - expected), 4 * ratio.std() / np.sqrt(ratio.size) + FORM


def assert_sampled_rows_agree(
    long_way: ErrorScale, short_way: ErrorScale, exact: Array, rows: Array
) -> None:
    """Check variances, and that both ways project on the same derivatives.

    `norm**2` is a sum over rows of derivative over scale, squared. With the shares of the sum that
    `weights` tells and the scales of both ways, one norm gives the other.
    """
    found, limit = disagreement(long_way, short_way, rows)
    assert found <= limit, f"variances are apart by {found:.3g}, limit {limit:.3g}"
    weighed = (weighing(way.row_sigma, exact) for way in (short_way, long_way))
    squares = np.square(np.divide(*weighed, out=np.zeros(rows.shape), where=rows))
    tests = {test.name: test for test in short_way.score_tests}
    assert tests.keys() == {test.name for test in long_way.score_tests}
    for test in long_way.score_tests:
        short = tests[test.name]
        shares = np.square(short.weights, dtype=np.float64).sum(axis=-1)
        norm = short.norm * np.sqrt((shares * squares[short.part]).sum())
        assert abs(norm / test.norm - 1) <= DERIVATIVE, f"{test.name}: {norm} and {test.norm}"
