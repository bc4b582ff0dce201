"""Agreement of two float64 evaluations of the same formula, to a stated limit."""

from __future__ import annotations

from typing import Any

import numpy as np

UNIT_ROUNDOFF = 2.0**-53
"""Of float64: half the gap between 1 and the next number."""


def roundoff(*, terms: int, score: float = 0.0) -> float:
    """Return how far two float64 evaluations may lie apart, relative to their largest value.

    Each evaluation rounds `terms` times on the way to a value (a sum of n products counts n), and
    each rounding is off by at most one unit roundoff of the terms' magnitudes. A score of
    magnitude `score` is off by that many times as much, and exp turns an absolute error of a
    score into a relative error of its weight; hence the factor `1 + score`.

    Source: Higham (2002), Accuracy and Stability of Numerical Algorithms, section 3.1.
    """
    return 2 * terms * (1.0 + score) * UNIT_ROUNDOFF


def assert_agrees(name: str, observed: Any, expected: Any, *, limit: float) -> float:
    """Assert `max |observed - expected| <= limit * max |expected|`, element for element.

    An all-zero expectation therefore has to be met exactly, and so does every shape. Nothing that
    is not finite agrees with anything, not even with itself.

    Args:
        name: what is compared; opens the message.
        observed: real array.
        expected: real array of the same shape.
        limit: permitted error relative to the largest expected magnitude.

    Returns:
        The error relative to the largest expected magnitude, for reports.

    Raises:
        AssertionError: names the worst index, both values, the error and its bound.
    """
    got = np.asarray(observed, dtype=np.float64)
    want = np.asarray(expected, dtype=np.float64)
    assert got.shape == want.shape, f"{name}: got shape {got.shape}, expected {want.shape}"
    assert np.isfinite(want).all(), f"{name}: expected values must be finite"
    magnitude = float(np.abs(want).max(initial=0.0))
    bound = limit * magnitude
    with np.errstate(invalid="ignore"):
        error = np.abs(got - want)
    error = np.where(np.isfinite(error), error, np.inf)
    if error.size and float(error.max()) > bound:
        worst = np.unravel_index(int(error.argmax()), error.shape)
        raise AssertionError(
            f"{name}[{', '.join(str(i) for i in worst)}]: got {float(got[worst])!r}, expected "
            f"{float(want[worst])!r}, error {error[worst]:.1e} exceeds bound {bound:.1e}; "
            f"{int((error > bound).sum())} of {error.size} elements"
        )
    return float(error.max(initial=0.0)) / magnitude if magnitude else 0.0
