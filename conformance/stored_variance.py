"""The variance of storing values, by what is known of their place between their neighbours."""

from __future__ import annotations

import math

import numpy as np

from conformance.rounding_runs import EXCESS, MARGIN
from golden import Array
from golden.formats import Format

_EXPONENT = np.uint32(0xFF << 23)
"""Bits of the exponent of float32."""
_ONE = np.float32(1.0).view(np.uint32)


def drawn_variance(place: Array) -> Array:
    """Return the variance that the runs give a value at its place between neighbours, 0 to 1.

    In squared gaps. They go up with probability `(f - t) / (1 - 2 t)`, clipped, and what they err
    by is divided by `EXCESS`.
    """
    up = np.clip((place - MARGIN) / (1.0 - 2.0 * MARGIN), 0.0, 1.0)
    variance: Array = (np.square(place) * (1.0 - up) + np.square(1.0 - place) * up) / EXCESS**2
    return variance


def anywhere_variance(form: Format, x: Array) -> Array:
    """Return `ulp(x)**2 / 12`: of values that may lie anywhere between their neighbours.

    Zero for zero; subnormals are left to the gap of normal numbers.

    Args:
        form: stores the values.
        x: float32.
    """
    variance: Array = (x.view(np.uint32) & _EXPONENT).view(np.float32)
    variance *= 2.0 ** (1 - form.precision) / math.sqrt(12.0)
    variance *= variance
    return variance


def relative_variance(form: Format, x: Array) -> Array:
    """Return `anywhere_variance` over `x**2`, which keeps its size however small `x` is.

    That is a function of the significand alone; zero and subnormals have that of a power of two.

    Args:
        form: stores the values.
        x: float32.
    """
    bits = x.view(np.uint32) & ~_EXPONENT
    bits |= _ONE
    variance: Array = bits.view(np.float32)  # from 1 to 2, with the value's sign
    np.divide(2.0 ** (1 - form.precision) / math.sqrt(12.0), variance, out=variance)
    variance *= variance
    return variance


def settling_variance(form: Format, x: Array, before: Array) -> Array:
    """Return the variance of storing values that were moved before by errors of a variance.

    Moved by nothing, they lie where golden has them; moved by a third of an ulp, anywhere. In
    between the first term of the Fourier series of a rounding error's square decays by
    `exp(-2 pi**2 variance / ulp**2)`.
    """
    gap = form.ulp(x)
    known = drawn_variance(np.mod(x / gap, 1.0))
    share = np.exp(-2 * np.pi**2 * before / np.square(gap))
    variance: Array = (share * known + (1.0 - share) / 12) * np.square(gap)
    return np.where(x == 0.0, 0.0, variance)


def unknown_variance(stage: str, form: Format, x: Array) -> Array:
    """Return the variance of storing values of a stage, zero for values of the format.

    Normalised weights are stored as golden has them, and those within a sixteenth of a gap from a
    neighbour, such as a saturated softmax has, go there. All else a kernel may have moved, or
    stores relative to another score: `ulp(x)**2 / 12`, or `x**2` where it goes to zero.
    """
    variance = np.zeros_like(x)
    told = (x != 0.0) & np.isfinite(x)
    values = x[told]
    gap, error = form.ulp(values), np.abs(form.nearest(values) - values)
    spread = np.minimum(gap**2 / 12, values**2)
    known = error == 0 if stage != "weights" else error < gap / 16
    variance[told] = np.where(known, error**2, spread)
    return variance


def rounding_variance(form: Format, x: Array) -> Array:
    """Return `(x - lower)(upper - x) / 2`, its neighbours in a format on either side.

    That is half the variance of stochastic rounding. Infinity gives 0. Subnormals of float16 have
    their fixed gap; those of bfloat16 are left to the gap of normal numbers, 2**-252 at most.
    """
    drop = np.uint64(53 - form.precision)
    bits = np.ascontiguousarray(x).view(np.uint64)
    low = bits >> drop << drop
    variance: Array = (low + (np.uint64(1) << drop)).view(np.float64)
    with np.errstate(invalid="ignore"):  # infinity less itself
        variance -= x
        variance *= x - low.view(np.float64)
    variance *= 0.5
    variance[~np.isfinite(x)] = 0.0
    if form.min_exponent > -126:
        tiny = np.abs(x) < 2.0**form.min_exponent
        gap = 2.0 ** (form.min_exponent - (form.precision - 1))
        part = x[tiny] / gap - np.floor(x[tiny] / gap)
        variance[tiny] = part * (1.0 - part) * gap**2 / 2
    return variance
