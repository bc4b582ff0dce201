"""Predicts, from a precision profile and the inputs, how large a correct subject's error is.

The golden is run again with every stage that the profile stores rounded at random (Monte Carlo
arithmetic). Stochastic rounding keeps values of the format exact; over the place of a value between
its neighbours its mean squared error is nearly twice that of rounding to nearest, so all injected
noise is given that much more variance and every error is divided by `EXCESS`. One more run rounds
to nearest: a correct subject in its own right, which covers inputs whose values fall on ties.

Source: Parker (1997), UCLA CSD-970002; Sohier et al. (2021), arXiv 1807.09655, for Monte Carlo
arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from conformance.precision import PrecisionProfile
from conformance.score_tests import Direction, ScoreTest, score_tests
from conformance.sums import accumulation_scale
from golden import FORMATS, Accumulation, Array

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
_MARGIN = 1 / 16
"""Share of a gap on either side of a value of the format from which nothing is rounded away.

Plain stochastic rounding sends a value that lies 1e-5 gaps from a neighbour to the other one once
in 1e5 draws: an error that rounding to nearest never makes, and that alone would set a limit.
"""
EXCESS = math.sqrt(1.0 + (1.0 - 2.0 * _MARGIN) ** 2)
"""Standard deviation of what the runs inject over that of rounding to nearest."""

_SIGNIFICAND_BITS = 52
_EXP_CELLS = 64
"""Intervals of the significand within which an approximation of exp errs alike."""
_DERIVATIVE_ROUNDOFF = 2.0**-32
"""Error of a derivative taken over a step of 2**-20, as a share of the row's largest value."""
_FLUSHED = 2.0**-126
"""Smallest normal float32: many a unit takes what is smaller for zero."""
_GOLDEN_ROUNDOFF = 2.0**-46
"""Golden's own error per row, as a share of the row's largest value: 2**-53 times 128 roundings."""


@dataclass(slots=True)
class Dither:
    """Observer that rounds each stored stage at random, at `EXCESS` times nearest's error.

    Attributes:
        profile: where to round, and to what.
        rng: source of the randomness.
    """

    profile: PrecisionProfile
    rng: np.random.Generator

    def __call__(
        self, stage: str, value: Array, accumulation: Accumulation | None = None, /
    ) -> Array:
        """Return the value with one random draw of the stage's errors."""
        stored = self.profile.stores.get(stage)
        if stored is None:
            return value
        if accumulation is not None and stored == self.profile.accumulation:
            value = value + self._normal(
                accumulation_scale(self.profile, stage, value, accumulation)
            )
        if stage == "exp" and self.profile.exp_ulps:
            width = EXCESS * self.profile.exp_ulps * FORMATS[stored].ulp(value)
            noise = self.rng.uniform(-1.0, 1.0, size=value.shape) * width
            value = np.where(value == 0.0, 0.0, value + noise)
        return FORMATS[stored].stochastic(value, self.rng, margin=_MARGIN)

    def _normal(self, scale: Array) -> Array:
        return self.rng.standard_normal(scale.shape) * (EXCESS * scale)


@dataclass(frozen=True, slots=True)
class Nearest:
    """Observer that rounds each stored stage to nearest: a correct subject of this profile.

    Attributes:
        profile: where to round, and to what.
        reference: factor on unnormalised weights while they are rounded. A kernel with tiles
            stores them relative to the largest score so far, and so between other neighbours.
        rng: source of one function for the error of exp within `exp_ulps`; None is no error.
    """

    profile: PrecisionProfile
    reference: float = 1.0
    rng: np.random.Generator | None = None

    def __call__(
        self, stage: str, value: Array, accumulation: Accumulation | None = None, /
    ) -> Array:
        """Return the value rounded as the profile stores it."""
        stored = self.profile.stores.get(stage)
        if stored is None:
            return value
        if stage == "exp" and self.rng is not None:
            value = value + self._approximation(value, self.rng) * FORMATS[stored].ulp(value)
        if stage == "unnormalised_weights" and self.reference != 1.0:
            return FORMATS[stored].nearest(value * self.reference) / self.reference
        return FORMATS[stored].nearest(value)

    def _approximation(self, exps: Array, rng: np.random.Generator) -> Array:
        """Return the error of an approximation of exp, in ulps: a function of its argument.

        Range reduction leaves the fractional part of the exponent to base 2, which is the
        significand of the result: equal leading bits err alike, in every row.
        """
        errors = rng.uniform(-1.0, 1.0, size=_EXP_CELLS) * self.profile.exp_ulps
        bits = np.ascontiguousarray(exps).view(np.uint64) >> np.uint64(_SIGNIFICAND_BITS - 6)
        found: Array = errors[(bits & np.uint64(_EXP_CELLS - 1)).astype(np.intp)]
        return np.where(exps == 0.0, 0.0, found)


@dataclass(frozen=True, slots=True, eq=False)
class ErrorScale:
    """Predicted errors of one output.

    Attributes:
        row_sigma: standard deviation of the error of each row, pooled along the last axis.
        sigma: of each element: half the row's variance, half the element's own.
        row_squares: per run, every row's mean squared error over its variance as the other runs
            give it, `(runs, rows...)`; 0 where the row is exact. The run to nearest comes last.
        largest_square: per run, the largest squared error of an element over its variance as the
            other runs give it.
        score_tests: directions in which a wrong parameter would move this output.
        sampled: rows that the Monte Carlo runs evaluated, shaped like the rows; None is all.
    """

    row_sigma: Array
    sigma: Array
    row_squares: Array
    largest_square: Array
    score_tests: tuple[ScoreTest, ...] = ()
    sampled: RowMask | None = None


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
    """
    errors: dict[str, list[Array]] = {name: [] for name in rows}
    for run in range(runs):
        rng = np.random.Generator(np.random.SFC64([seed, run]))
        observed = evaluate(observe=Dither(profile, rng))
        for name, collected in errors.items():
            collected.append((observed[name] - expected[name]) / EXCESS)
    for observer in nearest_runs(profile, seed):
        nearest = evaluate(observe=observer)
        for name, collected in errors.items():
            collected.append(nearest[name] - expected[name])
    drawn = {name: np.stack(collected) for name, collected in errors.items()}
    scales = {name: _scale(drawn[name][: runs + 1], expected[name], rows[name]) for name in rows}
    tests = score_tests(
        directions,
        drawn,
        {name: weighing(scale.row_sigma, expected[name]) for name, scale in scales.items()},
        rows,
        runs=runs,
        independent_rows=independent_rows,
    )
    return {
        name: replace(scale, score_tests=tuple(t for t in tests if t.output == name))
        for name, scale in scales.items()
    }


def weighing(row_sigma: Array, expected: Array) -> Array:
    """Return row scales to weigh a derivative by: not below what its difference resolves."""
    floor = _DERIVATIVE_ROUNDOFF * np.abs(expected).max(axis=-1, initial=0.0)
    return np.where(row_sigma > 0, np.maximum(row_sigma, floor), 0.0)


def nearest_runs(profile: PrecisionProfile, seed: int) -> Iterator[Nearest]:
    """Yield correct subjects that round to nearest: a plain one, then three with a bias of theirs.

    Those store unnormalised weights relative to other scores, a quarter of a binade apart, and
    compute exp by approximations of their own.
    """
    yield Nearest(profile)
    for quarter in (1, 2, 3):
        rng = np.random.Generator(np.random.SFC64([seed, quarter, 0]))
        yield Nearest(profile, 2.0 ** (-quarter / 4), rng)


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
    return ErrorScale(np.sqrt(row_variance), np.sqrt(variance), row_squares, largest)


def ratio(value: Array, scale: Array, counted: RowMask) -> Array:
    """Return value over scale where it counts and there is one, 0 elsewhere."""
    return np.divide(value, scale, out=np.zeros_like(value), where=counted & (scale > 0))
