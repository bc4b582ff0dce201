"""Binary floating-point formats: spacing, rounding to nearest, stochastic rounding.

Values of every format are held in float64, which contains all of them exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from golden.errors import ConfigError
from golden.stages import Array

_SIGNIFICAND_BITS = 52  # of float64, without the hidden bit
_EXPONENT = np.uint64(0x7FF) << np.uint64(_SIGNIFICAND_BITS)


@dataclass(frozen=True, slots=True)
class Format:
    """A binary floating-point format.

    Attributes:
        name: as torch and ml_dtypes spell it.
        precision: bits of the significand, the hidden one included.
        min_exponent: exponent of the smallest normal number.
        largest: largest finite number.
    """

    name: str
    precision: int
    min_exponent: int
    largest: float

    @property
    def unit_roundoff(self) -> float:
        """Largest relative error of rounding a normal number to nearest: `2 ** -precision`."""
        return 2.0**-self.precision

    def ulp(self, x: Array) -> Array:
        """Return the gap between neighbouring values of this format at `x`, elementwise."""
        power = (np.asarray(x, dtype=np.float64).view(np.uint64) & _EXPONENT).view(np.float64)
        gap: Array = np.maximum(power, 2.0**self.min_exponent) * 2.0 ** (1 - self.precision)
        return gap

    def nearest(self, x: Array) -> Array:
        """Round to nearest, ties to even; beyond the largest number to infinity.

        Works on the bits of float64: adding just under half of the last kept bit, and one more
        where that bit is odd, carries into it exactly when nearest does. Subnormals of the format
        have a fixed gap instead, which `rint` serves.
        """
        drop = _SIGNIFICAND_BITS - (self.precision - 1)
        if drop == 0:
            return x
        bits = np.ascontiguousarray(x).view(np.uint64)
        odd = (bits >> np.uint64(drop)) & np.uint64(1)
        return self._cut(x, bits + (odd + np.uint64((1 << (drop - 1)) - 1)), np.rint)

    def holds(self, x: Array) -> NDArray[np.bool_]:
        """Tell which values are of the format: those that `nearest` leaves as they are, but NaN."""
        drop = _SIGNIFICAND_BITS - (self.precision - 1)
        cut = np.uint64((1 << drop) - 1)
        held: NDArray[np.bool_] = (np.ascontiguousarray(x).view(np.uint64) & cut) == 0
        if held.any():  # beyond the range of the format other bits count
            held[held] = self.nearest(x[held]) == x[held]
        return held

    def stochastic(self, x: Array, rng: np.random.Generator, *, margin: float = 0.0) -> Array:
        """Round down or up at random.

        With `f` the place of `x` between its neighbours, from 0 to 1, it goes up with probability
        `(f - margin) / (1 - 2 margin)`, clipped to [0, 1]: without a margin the mean is exact, with
        one a value that lies so close to a neighbour always goes there, as rounding to nearest
        takes it. A value of the format stays as it is. The mean squared error over `f` is
        `(1 + (1 - 2 margin)**2) / 12` squared ulps.

        Works on the bits of float64: adding a uniform random integer below the cut and then
        dropping the bits below it carries into the kept bits with just that probability.
        Subnormals of the format have a fixed gap instead.

        Args:
            x: float64.
            rng: source of the randomness.
            margin: below 0.5.

        Raises:
            ConfigError: `margin` is negative or not below 0.5.
        """
        if not 0 <= margin < 0.5:
            raise ConfigError(f"margin must lie from 0 to below 0.5, got {margin}")
        drop = _SIGNIFICAND_BITS - (self.precision - 1)
        if drop == 0:
            return x
        low = round(margin * (1 << drop))
        bits = np.ascontiguousarray(x).view(np.uint64)
        noise = rng.integers(low, (1 << drop) - low, size=bits.shape, dtype=np.uint64)

        def whole(gaps: Array) -> Array:
            return np.floor(gaps + rng.uniform(margin, 1.0 - margin, size=gaps.shape))

        return self._cut(x, bits + noise, whole)

    def _cut(self, x: Array, bits: NDArray[np.uint64], whole: Callable[[Array], Array]) -> Array:
        """Drop the bits below the significand; round subnormals, in units of their gap, by `whole`.

        Infinity and NaN stay as they are.
        """
        drop = _SIGNIFICAND_BITS - (self.precision - 1)
        rounded: Array = (bits & ~np.uint64((1 << drop) - 1)).view(np.float64)
        magnitude = np.abs(x)
        if not magnitude.min(initial=np.inf) >= 2.0**self.min_exponent:
            tiny = magnitude < 2.0**self.min_exponent
            tiny &= magnitude > 0.0  # a softmax has many zeros, whose bits are right already
            if tiny.any():
                gap = 2.0 ** (self.min_exponent - (self.precision - 1))
                rounded[tiny] = whole(x[tiny] / gap) * gap
        if magnitude.max(initial=0.0) <= self.largest / 2:  # rounding at most doubles it
            return rounded
        over = np.abs(rounded) > self.largest
        over &= magnitude < np.inf  # masked scores, whose bits are right too
        if over.any():
            rounded[over] = np.copysign(np.inf, x[over])
        unknown = np.isnan(x)
        if unknown.any():
            rounded[unknown] = x[unknown]
        return rounded


FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format("float64", 53, -1022, float(np.finfo(np.float64).max)),
        Format("float32", 24, -126, float(np.finfo(np.float32).max)),
        Format("tensorfloat32", 11, -126, (2.0 - 2.0**-10) * 2.0**127),
        Format("bfloat16", 8, -126, (2.0 - 2.0**-7) * 2.0**127),
        Format("float16", 11, -14, 65504.0),
        Format("float8_e4m3fn", 4, -6, 448.0),
        Format("float8_e5m2", 3, -14, 57344.0),
    )
}
"""Formats by name."""


def format_named(name: str) -> Format:
    """Return the format of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]
