"""Exact values that carry a bound on the error of their float64 evaluation.

A `Tracked` array holds what a formula is worth (to 50 digits, or in extended precision) and how far
a float64 evaluation of the same formula can lie from it, whatever the order of its sums. Each
operation adds the rounding it makes to the errors that its operands hand on: running error
analysis (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.3). The rules are
listed in docs/certification.md under the names E1 to E9 used here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conformance.certify.arithmetic import (
    Arithmetic,
    apply,
    arithmetic_of,
    held_in,
    pi,
    size_of,
)
from golden import Array

U = 2.0**-53
"""Unit roundoff of float64."""

ELEMENTARY_ULPS = 4.0
"""Error of an elementary function, in units of the last place of its result: what NumPy's own tests
allow their vectorised versions; the C library's are below 1."""

_TINY = 2.0**-1074
"""Smallest subnormal number, the error of a product or exponential that underflows."""


def gamma(roundings: float) -> float:
    """Return `n u / (1 - n u)`, the relative error of `n` roundings (Higham 2002, lemma 3.1)."""
    return roundings * U / (1.0 - roundings * U)


class Tracked:
    """Exact values and bounds on the errors of their float64 evaluation.

    Attributes:
        exact: the values; mpmath numbers (dtype object), longdouble or float64.
        error: bound on |float64 evaluation - exact|, shaped alike, float64.
    """

    __slots__ = ("error", "exact")

    def __init__(self, exact: NDArray[Any], error: Array | float = 0.0) -> None:
        self.exact = np.asarray(exact)
        self.error = np.broadcast_to(np.asarray(error, dtype=np.float64), self.exact.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.exact.shape

    @property
    def size(self) -> Array:
        """Magnitudes, float64."""
        return size_of(self.exact)

    @property
    def arithmetic(self) -> Arithmetic:
        """What the exact values are held in."""
        return arithmetic_of(self.exact)

    def like(self, values: Any, error: Array | float = 0.0) -> Tracked:
        """Return float64 values, or integers, in this array's arithmetic."""
        return tracked(values, self.arithmetic, error)

    def _rounded(self, exact: NDArray[Any], passed: Array, roundings: float = 1.0) -> Tracked:
        """E1: add the roundings of a result whose operands hand on the error `passed`."""
        return Tracked(exact, passed + gamma(roundings) * (size_of(exact) + passed))

    def __neg__(self) -> Tracked:
        return Tracked(-self.exact, self.error)

    def __add__(self, other: Tracked) -> Tracked:
        return self._rounded(self.exact + other.exact, self.error + other.error)

    def __sub__(self, other: Tracked) -> Tracked:
        return self + (-other)

    def __mul__(self, other: Tracked) -> Tracked:
        """E2: `|x| e_y + e_x |y| + e_x e_y`, and one rounding."""
        passed = self.size * other.error + self.error * (other.size + other.error)
        return self._rounded(self.exact * other.exact, passed + _TINY)

    def __truediv__(self, other: Tracked) -> Tracked:
        """E3: `(e_x + |x / y| e_y) / (|y| - e_y)`, and one rounding."""
        exact = self.exact / other.exact
        room = other.size - other.error
        assert (room > 0).all(), "a divisor is not known to be other than zero"
        return self._rounded(exact, (self.error + size_of(exact) * other.error) / room + _TINY)

    def __matmul__(self, other: Tracked) -> Tracked:
        """E4: `n` products summed in any order, fused or not: `gamma(n) |x| |y|`."""
        terms = self.exact.shape[-1]
        left, right = self.size, other.size
        passed = left @ other.error + self.error @ (right + other.error)
        sums = gamma(terms) * ((left + self.error) @ (right + other.error))
        return Tracked(self.exact @ other.exact, passed + sums + terms * _TINY)

    def sum(self, axis: int | tuple[int, ...], keepdims: bool = False) -> Tracked:
        """E5: `n` terms summed in any order: `gamma(n - 1)` of their magnitudes."""
        axes = (axis,) if isinstance(axis, int) else axis
        terms = math.prod(self.shape[a] for a in axes)
        passed = self.error.sum(axis=axis, keepdims=keepdims)
        sizes = (self.size + self.error).sum(axis=axis, keepdims=keepdims)
        total = np.asarray(self.exact.sum(axis=axis, keepdims=keepdims))
        return Tracked(total, passed + gamma(max(terms - 1, 0)) * sizes)

    def mean(self, axis: int = -1) -> Tracked:
        """Sum along an axis, kept, divided by its length."""
        total = self.sum(axis, keepdims=True)
        return total / total.like(self.shape[axis])

    def _elementary(self, name: str, passed: Array) -> Tracked:
        """E6: an elementary function is right to `ELEMENTARY_ULPS`, so `2 ELEMENTARY_ULPS u`."""
        return self._rounded(apply(name, self.exact), passed + _TINY, 2.0 * ELEMENTARY_ULPS)

    def exp(self) -> Tracked:
        """E7: an error of `d` in `x` multiplies the result by `1 + expm1(d)`."""
        return self._elementary("exp", size_of(apply("exp", self.exact)) * np.expm1(self.error))

    def log(self) -> Tracked:
        """E7: the difference of logarithms is at most `e / (x - e)`."""
        return self._elementary("log", self.error / (self.size - self.error))

    def log1p(self) -> Tracked:
        """E7: as `log`, for arguments that are not negative."""
        return self._elementary("log1p", self.error)

    def tanh(self) -> Tracked:
        """E7: slope `1 / cosh(x)**2`, largest at the end nearer to zero."""
        nearest = np.maximum(self.size - self.error, 0.0)
        return self._elementary("tanh", self.error / np.cosh(np.minimum(nearest, 300.0)) ** 2)

    def cos(self) -> Tracked:
        """E7: slope at most 1."""
        return self._elementary("cos", np.minimum(self.error, 2.0))

    def sin(self) -> Tracked:
        """E7: slope at most 1."""
        return self._elementary("sin", np.minimum(self.error, 2.0))

    def inverse_root(self) -> Tracked:
        """E7: `x ** -0.5`, slope `x ** -1.5 / 2`, largest at the smaller end."""
        exact = self.like(1.0).exact / apply("sqrt", self.exact)
        passed = 0.5 * self.error * (self.size - self.error) ** -1.5
        return self._rounded(exact, passed, 2.0 * ELEMENTARY_ULPS)

    def root(self) -> Tracked:
        """E7: square root, rounded once, slope `x ** -0.5 / 2`."""
        passed = 0.5 * self.error * (self.size - self.error) ** -0.5
        return self._rounded(apply("sqrt", self.exact), passed)

    def power_of(self, base: Tracked) -> Tracked:
        """E7: `base ** x`, that is `exp(x log(base))` exactly, by one elementary function."""
        log_base = apply("log", base.exact)
        exact = apply("exp", self.exact * log_base)
        by_base = (self.size + self.error) * -np.log1p(-base.error / base.size)
        passed = size_of(exact) * np.expm1(self.error * size_of(log_base) + by_base)
        return self._rounded(exact, passed, 2.0 * ELEMENTARY_ULPS)

    def clip(self, low: float, high: float) -> Tracked:
        """E8: no rounding; an error that stays beyond a bound is cut off whole."""
        exact = np.minimum(np.maximum(self.exact, self.like(low).exact), self.like(high).exact)
        value = self.exact.astype(np.float64)
        settled = (value - self.error >= high) | (value + self.error <= low)
        return Tracked(exact, np.where(settled, 0.0, self.error))

    def where(self, condition: NDArray[np.bool_], other: float = 0.0) -> Tracked:
        """Return these values where the condition holds and a constant elsewhere."""
        exact = np.where(condition, self.exact, self.like(other).exact)
        return Tracked(exact, np.where(condition, self.error, 0.0))

    def __getitem__(self, index: Any) -> Tracked:
        return Tracked(self.exact[index], self.error[index])

    def reshape(self, *shape: int) -> Tracked:
        """Reshape values and errors."""
        return Tracked(self.exact.reshape(shape), self.error.reshape(shape))

    def swapaxes(self, one: int, two: int) -> Tracked:
        """Swap two axes of values and errors."""
        return Tracked(self.exact.swapaxes(one, two), self.error.swapaxes(one, two))

    def repeat(self, times: int, axis: int) -> Tracked:
        """Repeat each entry along an axis."""
        return Tracked(self.exact.repeat(times, axis), self.error.repeat(times, axis))

    def replaced(self, index: Any, values: Tracked) -> Tracked:
        """Return a copy with other entries at `index`."""
        exact, error = self.exact.copy(), np.array(self.error)
        exact[index], error[index] = values.exact, values.error
        return Tracked(exact, error)


def tracked(values: Any, arithmetic: Arithmetic, error: Array | float = 0.0) -> Tracked:
    """Return float64 values, or integers, as exact values of an arithmetic (E9).

    Raises:
        UsageError: mpmath is not installed.
    """
    return Tracked(held_in(arithmetic, values), error)


def two_pi(arithmetic: Arithmetic) -> Tracked:
    """Return 2 pi, whose float64 value carries one rounding (E9)."""
    return Tracked(np.asarray(2 * pi(arithmetic)), 2.0 * math.pi * U)
