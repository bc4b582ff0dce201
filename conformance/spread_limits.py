"""Limits of squares of errors and of their means, from the runs of the error model.

Of a largest square, `n` draws in each of `K` runs have seen the tail down to `1 / (K n)`. If `m` is
the largest, the limit is ::

    base + (m - base) * (1 + log(K / alpha) / log(K n))

which continues an exponential tail from there to `alpha / n`, where one case in `1 / alpha` would
exceed it by chance. `z**2` of a Gaussian has just such a tail and rounding errors, being bounded, a
shorter one. The base is 0 for a single square, and for means of squares their mean over the runs.

A mean over rows that err independently is a sum of many positive parts, whose variance the runs
give row by row; a gamma distribution of that mean and variance has its first two moments, and is
exact for squares of Gaussians.

Source: Satterthwaite (1946), Biometrics Bulletin 2(6), for sums of squares as one gamma variable.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammainccinv

from golden import Array


def pooled_limits(squares: Array, runs: int, labels: NDArray[np.intp], alpha: float) -> Array:
    """Return the limit on the mean of the squares of every group of rows that err independently.

    Correct subjects that round to nearest, in tiles of their own, differ in this mean by more than
    chance: by what exceeds `sqrt(2 log(2 n))` standard deviations, which `n` means reach by chance
    less often than not. Twice that is added to the mean.

    Args:
        squares: mean square of each row, Monte Carlo runs first, then those that round to nearest,
            `(all runs, rows)`.
        runs: how many are Monte Carlo runs.
        labels: group of each row, from 0, none without rows.
        alpha: chance with which a correct subject may exceed any of the limits.
    """
    drawn, nearest = squares[:runs], squares[runs:]
    size = np.bincount(labels)
    base = float(drawn.mean())
    deviation = np.square(drawn - base)
    of_rows = np.bincount(labels, weights=deviation.mean(axis=0)) / size**2
    variance = np.maximum(float(deviation.mean()) / size, of_rows)
    means = np.stack([np.bincount(labels, weights=run) / size for run in nearest])
    chance = math.sqrt(2 * math.log(2 * means.size))
    excess = max(float((means - base - chance * np.sqrt(variance)).max(initial=0.0)), 0.0)
    raised = base + 2 * excess
    shape = base**2 / np.maximum(variance, np.finfo(np.float64).tiny)
    limits: Array = raised * gammainccinv(shape, alpha / len(size)) / shape
    return np.where(variance > 0, limits, raised)


def tail_limit(
    squares: Array,
    base: float,
    count: int,
    alpha: float,
    seen: int | None = None,
    *,
    runs: int | None = None,
) -> float:
    """Continue the tail of a squared statistic from what the runs have seen to level `alpha`.

    Args:
        squares: the statistic's largest square of each Monte Carlo run, and of those that round
            to nearest.
        base: its expectation under the model, from which the tail is measured.
        count: values it is drawn from.
        alpha: chance with which a correct subject may exceed the limit.
        seen: values each run drew it from, if those were fewer.
        runs: how many are Monte Carlo runs; all but one if left out.
    """
    runs = len(squares) - 1 if runs is None else runs
    seen = count if seen is None else seen
    reach = 1.0 + math.log(runs / alpha * count / seen) / math.log(max(runs * seen, 2))
    return base + max(float(squares.max()) - base, 0.0) * reach
