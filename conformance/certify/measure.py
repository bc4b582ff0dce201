"""Compares what golden computed with exact values and their bounds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from conformance.certify.tracked import Tracked
from golden import FORMATS, Array

SLACK = {"mpmath": 1.0 + 2.0**-20, "longdouble": 1.0 + 2.0**-9, "float64": 1.0 + 2.0**-9}
"""Bounds are themselves sums of positive float64 numbers, right to far better than 2**-20; extended
precision errs by at most `2**-11` of what float64 may."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Errors of golden's values, element by element.

    Ulps are units in the last place of float64 at the largest exact value along the last axis: a
    small value beside large ones is a difference of large terms, and its own ulps say nothing.
    A row whose bound exceeds its largest value has no digit to count ulps in, and is left out of
    them, never out of the shares.

    Attributes:
        ulps: errors, flat.
        bound_ulps: bounds, likewise.
        share: error over bound of every value; above 1 golden is refuted.
    """

    ulps: Array
    bound_ulps: Array
    share: Array


def measure(computed: Array, exact: Tracked) -> Measured:
    """Measure the error of each computed value against its bound.

    An exact value and a computed one that are both right where the bound is zero count as a share
    of zero; any error there, and a value that is not finite, as infinitely more than allowed.

    Raises:
        ValueError: shapes differ.
    """
    if computed.shape != exact.shape:
        raise ValueError(f"computed must have shape {exact.shape}, got {computed.shape}")
    difference = np.abs(exact.like(np.nan_to_num(computed)).exact - exact.exact)
    error = np.where(np.isfinite(computed), difference.astype(np.float64), np.inf)
    bound = exact.error * SLACK[exact.arithmetic]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(error == 0, 0.0, error / bound)
    largest = exact.size.max(axis=-1, keepdims=True, initial=0.0)
    ulp = np.broadcast_to(FORMATS["float64"].ulp(largest), error.shape)
    known = bound < largest
    return Measured(error[known] / ulp[known], bound[known] / ulp[known], share.ravel())


@dataclass(frozen=True, slots=True)
class Certificate:
    """What is known of golden's error in one feature.

    Attributes:
        feature: what was on.
        result: what was compared: `output`, `logsumexp`, `cache` or `gradients`.
        arithmetic: what the exact values were held in.
        values: how many values were compared.
        median_ulps: their median error, in ulps as `Measured` counts them.
        worst_ulps: the largest.
        bound_ulps: the bound where the error is largest.
        worst_share: the largest error over its bound.
    """

    feature: str
    result: str
    arithmetic: str
    values: int
    median_ulps: float
    worst_ulps: float
    bound_ulps: float
    worst_share: float

    @property
    def holds(self) -> bool:
        """Whether every value lies within its bound."""
        return self.worst_share <= 1.0


def certificate(
    feature: str, result: str, arithmetic: str, measured: Iterable[Measured]
) -> Certificate:
    """Sum up measured values into one row.

    Raises:
        ValueError: there are no values.
    """
    joined = together(list(measured))
    if joined.ulps.size == 0:
        raise ValueError(f"{feature}, {result} must have values to measure, got none")
    worst = int(joined.ulps.argmax())
    return Certificate(
        feature=feature,
        result=result,
        arithmetic=arithmetic,
        values=joined.share.size,
        median_ulps=float(np.median(joined.ulps)),
        worst_ulps=float(joined.ulps[worst]),
        bound_ulps=float(joined.bound_ulps[worst]),
        worst_share=float(joined.share.max()),
    )


def together(parts: list[Measured]) -> Measured:
    """Join the measured values of several arrays."""
    return Measured(
        np.concatenate([part.ulps for part in parts]),
        np.concatenate([part.bound_ulps for part in parts]),
        np.concatenate([part.share for part in parts]),
    )
