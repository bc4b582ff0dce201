"""Predicts, from a precision profile and the inputs, how large a correct subject's error is.

The golden is run again with every stage that the profile stores rounded at random (Monte Carlo
arithmetic). One more run rounds to nearest: a correct subject in its own right, which covers inputs
whose values fall on ties. Where the output's own rounding is known to come last, it is taken from
golden's value and its internal error as a subject's is: to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from conformance.covariance import RowCovariance
from conformance.ordered_sums import Path
from conformance.precision import PrecisionProfile
from conformance.rounding_runs import EXCESS, MARGIN, Dither, nearest_runs
from conformance.score_tests import Direction, ScoreTest, score_tests
from golden import FORMATS, Array

Outputs: TypeAlias = Mapping[str, Array]
Evaluate: TypeAlias = Callable[..., Outputs]
RowMask: TypeAlias = NDArray[np.bool_]

FEW_RUNS = 8
"""Monte Carlo runs behind a verdict that finds nothing."""
MANY_RUNS = 32
"""Runs behind any verdict that finds something, and behind small outputs in any case."""
SMALL = 1 << 12
"""Outputs of fewer elements are small."""

_SHARE = 4.0
"""How far leaving a run out may lower a variance: where it alone erred, the rest is silent."""
_DERIVATIVE_ROUNDOFF = 2.0**-32
"""Error of a derivative taken over a step of 2**-20, as a share of the row's largest value."""
_FLUSHED = 2.0**-126
"""Smallest normal float32: many a unit takes what is smaller for zero."""
_GOLDEN_ROUNDOFF = 2.0**-46
"""Golden's own error per row, as a share of the row's largest value: 2**-53 times 128 roundings."""


@dataclass(frozen=True, slots=True, eq=False)
class ErrorScale:
    """Predicted errors of one output.

    Attributes:
        row_sigma: standard deviation of the error of each row, pooled along the last axis.
        sigma: of each element: half the row's variance, half the element's own.
        row_squares: per run, every row's mean squared error over its variance as the other runs
            give it, `(all runs, rows...)`; 0 where the row is exact. Those that round to nearest
            come last.
        largest_square: per run, the largest squared error of an element over its variance as the
            other runs give it.
        runs: how many are Monte Carlo runs.
        score_tests: directions in which a wrong parameter would move this output.
        sampled: rows that the Monte Carlo runs evaluated, shaped like the rows; None is all.
        covariance: of every row; None where only sizes are predicted.
        rounded: error of rows without spread, which are golden's stored to nearest; None is 0.
    """

    row_sigma: Array
    sigma: Array
    row_squares: Array
    largest_square: Array
    runs: int
    score_tests: tuple[ScoreTest, ...] = ()
    sampled: RowMask | None = None
    covariance: RowCovariance | None = None
    rounded: Array | None = None

    def standardised(self, error: Array, noisy: RowMask) -> tuple[Array, Array]:
        """Return every element's error in units of its standard deviation, and rows' mean squares.

        With covariances it is the part of the error that the row's other elements do not explain.

        Args:
            error: shaped like the output.
            noisy: rows to look at; 0 elsewhere.
        """
        if self.covariance is not None:
            z, mean_square = self.covariance.standardised(error)
            return np.where(noisy[..., None], z, 0.0), np.where(noisy, mean_square, 0.0)
        z = ratio(error, self.sigma, noisy[..., None])
        return z, ratio(np.square(error).mean(axis=-1), np.square(self.row_sigma), noisy)


def fewest_runs(expected: Outputs) -> int:
    """Return how many runs a first look takes: more where an output is small."""
    return FEW_RUNS if max(value.size for value in expected.values()) >= SMALL else MANY_RUNS


def predict_scale(
    evaluate: Evaluate,
    expected: Outputs,
    rows: Mapping[str, RowMask],
    profile: PrecisionProfile,
    *,
    seed: int,
    runs: int,
    directions: Iterable[Direction] = (),
    independent_rows: bool = False,
    last: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, ErrorScale]:
    """Predict the error scale of every output of a case.

    Args:
        evaluate: runs the golden; called with `observe=`.
        expected: its exact outputs, by name.
        rows: per output, which rows (all axes but the last) count.
        profile: what the subject claims.
        seed: of the Monte Carlo runs.
        runs: how many.
        directions: in which a wrong parameter moves an output.
        independent_rows: whether no rounding is shared between rows.
        last: per output, the stage whose rounding is the last thing that happens to it, where that
            is known.
    """
    drawn = draw(evaluate, expected, profile, seed=seed, runs=runs, last=last)
    scales = {
        name: _scale(drawn[name].stored[: runs + 1], expected[name], rows[name]) for name in rows
    }
    tests = score_tests(
        directions,
        {name: draws.independent for name, draws in drawn.items()},
        {name: weighing(scale.row_sigma, expected[name]) for name, scale in scales.items()},
        rows,
        runs=runs,
        independent_rows=independent_rows,
    )
    return {
        name: replace(scale, score_tests=tuple(t for t in tests if t.output == name))
        for name, scale in scales.items()
    }


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """Errors of the Monte Carlo runs and then of those that round to nearest, one output.

    Attributes:
        stored: `(all runs, rows..., elements)`; where the output's own rounding is the last it is
            that to nearest, and so alike in runs that hardly move the output before.
        independent: the same, with that rounding drawn anew in each run.
    """

    stored: Array
    independent: Array


def draw(
    evaluate: Evaluate,
    expected: Outputs,
    profile: PrecisionProfile,
    *,
    seed: int,
    runs: int,
    last: Mapping[str, str],
) -> dict[str, Draws]:
    """Run golden as often as asked, with `profile`'s roundings; takes what `predict_scale` does."""
    stored: dict[str, list[Array]] = {name: [] for name in expected}
    independent: dict[str, list[Array]] = {name: [] for name in expected}
    paths: list[Path] = []
    for run in range(runs):
        rng = np.random.Generator(np.random.SFC64([seed, run]))
        observed = evaluate(observe=Dither(profile, rng, frozenset(last.values()), paths))
        for name, exact in expected.items():
            error = (observed[name] - exact) / EXCESS
            form = FORMATS[profile.stores.get(last.get(name, ""), "float64")]
            value = exact + error
            at_random = form.stochastic(value, rng, margin=MARGIN)
            independent[name].append(error + (at_random - value) / EXCESS)
            stored[name].append(error + (form.nearest(value) - value))
    for observer in nearest_runs(profile, seed):
        nearest = evaluate(observe=observer)
        for name, exact in expected.items():
            stored[name].append(nearest[name] - exact)
            independent[name].append(stored[name][-1])
    return {name: Draws(np.stack(stored[name]), np.stack(independent[name])) for name in expected}


def weighing(row_sigma: Array, expected: Array) -> Array:
    """Return row scales to weigh a derivative by: not below what its difference resolves."""
    floor = _DERIVATIVE_ROUNDOFF * np.abs(expected).max(axis=-1, initial=0.0)
    return np.where(row_sigma > 0, np.maximum(row_sigma, floor), 0.0)


def _scale(errors: Array, expected: Array, rows: RowMask) -> ErrorScale:
    """Pool the errors of the Monte Carlo runs; the last of `errors` is the run to nearest."""
    squares = np.square(errors)
    drawn, runs = squares[:-1], len(errors) - 1
    largest_value = np.abs(expected).max(axis=-1, initial=0.0)
    floor = np.square(_GOLDEN_ROUNDOFF * largest_value) + _FLUSHED**2
    total, row_total = drawn.sum(axis=0), drawn.mean(axis=-1).sum(axis=0)
    counted = rows & (row_total > 0)

    def variances(row: Array, element: Array, of: int) -> tuple[Array, Array]:
        row_variance = np.where(counted, row / of + floor, 0.0)
        return row_variance, (row_variance[..., None] + element / of) / 2

    row_squares, largest = np.empty((runs + 1, *rows.shape)), np.empty(runs + 1)
    row_variance, variance = variances(row_total, total, runs)
    for run, square in enumerate(squares):
        of_row, of_element = row_variance, variance
        if run < runs:  # against the other runs, as a subject is: its own square would hide it
            others = row_total - square.mean(axis=-1)
            of_row, of_element = variances(others, total - square, runs - 1)
            of_row = np.maximum(of_row, row_variance / _SHARE)
            of_element = np.maximum(of_element, variance / _SHARE)
        row_squares[run] = ratio(square.mean(axis=-1), of_row, counted)
        largest[run] = ratio(square, of_element, counted[..., None]).max(initial=0.0)
    # a new error over a variance known from few has a larger mean square than 1, as theirs has
    excess = float(row_squares[:runs, counted].mean()) if counted.any() else 1.0
    return ErrorScale(
        np.sqrt(row_variance * excess),
        np.sqrt(variance * excess),
        row_squares / excess,
        largest / excess,
        runs,
    )


def ratio(value: Array, scale: Array, counted: RowMask) -> Array:
    """Return value over scale where it counts and there is one, 0 elsewhere."""
    return np.divide(value, scale, out=np.zeros_like(value), where=counted & (scale > 0))
