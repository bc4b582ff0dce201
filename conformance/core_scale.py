"""The error scale of the attention core with the covariance of every row: 16-bit formats."""

from __future__ import annotations

import numpy as np

from conformance.cases import Case
from conformance.core_covariance import core_covariance
from conformance.directions import directions
from conformance.error_model import ErrorScale, draw
from conformance.expected import Reference, by_pieces
from conformance.inputs import CoreInputs
from conformance.precision import PrecisionProfile
from conformance.score_tests import score_tests


def predict_core(
    case: Case,
    inputs: CoreInputs,
    expected: Reference,
    profile: PrecisionProfile,
    *,
    seed: int,
    runs: int,
) -> dict[str, ErrorScale] | None:
    """Predict the error scale of a core's output, or None if its covariance is not known.

    The covariances say how to weigh errors; the Monte Carlo runs how large what is weighed gets.
    """
    form = core_covariance(expected.evaluate, inputs.v, case.config, profile)
    if form is None:
        return None
    rows = expected.rows["output"] & form.noisy
    expected = by_pieces(case, inputs, expected)
    drawn = draw(
        expected.evaluate, expected.outputs, profile, seed=seed, runs=runs, last={"output": "attn"}
    )["output"]
    largest, row_squares = [], []
    for error in drawn.stored:
        z, mean_square = form.rows.standardised(error)
        largest.append(np.square(z[rows]).max(initial=0.0))
        row_squares.append(np.where(rows, mean_square, 0.0))
    row_sigma = np.where(rows, np.sqrt(form.variance.mean(axis=-1)), 0.0)
    tests = score_tests(
        directions(case, inputs, expected),
        {"output": drawn.independent},
        {"output": row_sigma},
        {"output": rows},
        runs=runs,
        independent_rows=True,
        covariance=form.rows,
        # so does an approximation of exp, which errs alike wherever its argument is alike
        repeats=form.repeats or profile.exp_ulps > 1,
        bound=form.bound,
    )
    scale = ErrorScale(
        row_sigma=row_sigma,
        sigma=np.where(rows[..., None], np.sqrt(form.variance), 0.0),
        row_squares=np.stack(row_squares),
        largest_square=np.array(largest),
        runs=runs,
        score_tests=tests,
        covariance=form.rows,
        rounded=form.rounded,
    )
    return {"output": scale}
