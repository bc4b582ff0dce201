"""How far NumPy's elementary functions on this machine are from exact: the bounds' one assumption.

Every other rounding of float64 is fixed by IEEE 754; the error of `exp` and its like is not.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from conformance.certify.tracked import Tracked, tracked
from golden import FORMATS, Array

_FUNCTIONS: dict[
    str, tuple[Callable[[Array], NDArray[np.float64]], Callable[[Tracked], Tracked], float, float]
] = {
    "exp": (np.exp, Tracked.exp, -700.0, 0.0),
    "log": (np.log, Tracked.log, 1e-3, 1e3),
    "log1p": (np.log1p, Tracked.log1p, 0.0, 1e6),
    "tanh": (np.tanh, Tracked.tanh, -4.0, 4.0),
    "cos": (np.cos, Tracked.cos, 0.0, 131072.0),
    "sin": (np.sin, Tracked.sin, 0.0, 131072.0),
    "x ** -0.5": (lambda x: x**-0.5, Tracked.inverse_root, 1e-6, 1e3),
    "10000 ** x": (lambda x: 10000.0**x, lambda x: x.power_of(x.like(10000.0)), 0.0, 1.0),
}
"""Function, its exact form, and the range of arguments that golden gives it."""


def elementary_ulps(samples: int) -> dict[str, float]:
    """Return each function's worst error in ulps of its result, over uniform random arguments.

    Raises:
        UsageError: mpmath is not installed.
    """
    rng = np.random.default_rng(0)
    worst = {}
    for name, (computed, exact, low, high) in _FUNCTIONS.items():
        x = rng.uniform(low, high, samples)
        want = exact(tracked(x, "mpmath")).exact
        error = np.abs(tracked(computed(x), "mpmath").exact - want).astype(np.float64)
        ulps = error / FORMATS["float64"].ulp(want.astype(np.float64))
        worst[name] = float(ulps.max())
    return worst
