"""The rounding errors of sums whose order a profile claims.

**From drawn terms** (weights, and weights times values): the steps of the sum are done in float32,
in the claimed order. What a step errs by is a function of its terms, and these differ from run to
run by as much as a subject's differ from golden's.

**From given terms** (queries times keys, the same in all runs): of `s_k = s_{k-1} + t_k` the errors
are drawn, each with its own variance. What is added lies on the grid of its own spacing, `s_{k-1}`
too, so their sum is a multiple of `g = min(ulp(s_{k-1}), ulp(t_k))`. Let `U = ulp(s_k)`:

O1: of the two numbers added, one below `U / 2` is lost, whatever the other is: an error of minus
    that number, always. The other one is on the grid of `U`.
O2: `U <= g` is exact: so is the first term, and a difference of numbers of like size.
O3: else the place of the sum between its neighbours is a multiple of `g / U`, any as likely as
    any other; a tie errs by half a gap. Over the `m = U / g` places that is
    `(1 / m) (2 sum_{0 < j < m / 2} (j / m)**2 + 1 / 4) U**2 = (U**2 + 2 g**2) / 12`.
O4: a sum that the format holds is exact, as sums of small integers are at every step; so is a
    product that it holds. Other products err by `ulp(t_k)**2 / 12`.

The second way takes as many passes over the output as there are terms, of some 25 operations each,
once for all runs; the first as many in every run, of three operations.

Source: Higham (2002), Accuracy and Stability of Numerical Algorithms, section 4.2, for the errors
of the steps of a sum; O1 to O3 follow from the definition of rounding to nearest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from conformance.precision import PrecisionProfile
from conformance.sums import block_length
from golden import FORMATS, Accumulation, Array

_EXPONENT = np.uint64(0x7FF) << np.uint64(52)
_FLOAT32 = FORMATS["float32"]
_ROUNDOFF = 2.0**-22
"""What golden's own roundings may move a number of the format by, in gaps of float32: 2**-46."""


def claimed(profile: PrecisionProfile, stage: str, accumulation: Accumulation | None) -> bool:
    """Tell whether a profile claims the order of a stage's sums, and they are known by terms."""
    known = accumulation is not None and accumulation.terms is not None
    return known and bool(profile.order) and profile.stores.get(stage) == profile.accumulation


def nearest_sums(
    profile: PrecisionProfile, stage: str, value: Array, sums: Accumulation, total: Array | float
) -> Array:
    """Return a stage's sums done in float32 as the profile claims, before they are divided.

    Args:
        profile: says how long blocks are.
        stage: of `golden.STAGES`.
        value: the sums, exact.
        sums: yields their terms.
        total: what weights were divided by. Where a profile does not store weights, they are added
            as they were before.
    """
    by = total if stage == "attn" and "weights" not in profile.stores else np.float64(1.0)
    found = summed((term * by for term in _terms(sums)), _block(profile, stage, value, sums))
    return found / np.where(by == 0.0, 1.0, by)


def path_of(profile: PrecisionProfile, stage: str, value: Array, sums: Accumulation) -> Path:
    """Follow a stage's sums in the order that the profile claims; takes what the above does."""
    return follow(_terms(sums), _block(profile, stage, value, sums))


def _terms(sums: Accumulation) -> Iterator[Array]:
    assert sums.terms is not None
    return sums.terms()


def _block(profile: PrecisionProfile, stage: str, value: Array, sums: Accumulation) -> int:
    return max(int(block_length(profile, stage, value.shape, float(sums.length))), 1)


def summed(terms: Iterable[Array], block: int) -> Array:
    """Add terms in float32, one after the other in blocks, then the blocks.

    Args:
        terms: in order, all of one shape, at least one; rounded to float32 before they are added.
        block: terms of a block.

    Returns:
        The sums, in float64.
    """
    left, whole = iter(terms), None
    with np.errstate(over="ignore", under="ignore"):  # as in a subject, to infinity and to zero
        while (first := next(left, None)) is not None:
            total = first.astype(np.float32)
            for term in itertools.islice(left, block - 1):
                total += term.astype(np.float32)
            whole = total if whole is None else whole + total
    if whole is None:
        raise ValueError("terms must be at least one, got none")
    return whole.astype(np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Path:
    """Errors of sums of given terms.

    Attributes:
        total: the sums so far, in exact arithmetic.
        lost: what is lost for certain (O1).
        variance: of all other errors but those of the last addition.
        last: variance of the last addition that changes the sum; 0 where that is exact or loses.
    """

    total: Array
    lost: Array
    variance: Array
    last: Array


def follow(terms: Iterable[Array], block: int) -> Path:
    """Follow sums of products through their partial sums.

    Args:
        terms: as `summed` takes them, exact.
        block: terms of a block.
    """
    left, whole = iter(terms), None
    while (first := next(left, None)) is not None:
        nothing = np.zeros_like(first)
        path = Path(first, nothing, _of_product(first, _gap(first)), nothing)
        for term in itertools.islice(left, block - 1):
            path = _added(path, term)
        whole = path if whole is None else _joined(whole, path)
    if whole is None:
        raise ValueError("terms must be at least one, got none")
    return whole


def _added(path: Path, term: Array) -> Path:
    gap = _gap(term)
    total, lost, error, both = _step(path.total, term, gap)
    variance = path.variance + np.where(both, path.last, 0.0) + _of_product(term, gap)
    return Path(total, path.lost + lost, variance, np.where(both, error, path.last))


def _joined(path: Path, block: Path) -> Path:
    total, lost, error, both = _step(path.total, block.total, _gap(block.total))
    last = path.last + block.last
    return Path(
        total,
        path.lost + block.lost + lost,
        path.variance + block.variance + np.where(both, last, 0.0),
        np.where(both, error, last),
    )


def _step(before: Array, term: Array, gap: Array) -> tuple[Array, Array, Array, NDArray[np.bool_]]:
    """Return a sum, what it loses, the variance of its rounding, and where neither part is zero."""
    total = before + term
    wide, finer = _gap(total), np.minimum(_gap(before), gap)
    both = (before != 0.0) & (term != 0.0)
    rounded = both & (wide > finer) & ~_held(total, wide)
    smaller = np.where(np.abs(term) < np.abs(before), term, before)
    small = rounded & (np.abs(smaller) < wide / 2)
    variance = np.where(rounded & ~small, (np.square(wide) + 2 * np.square(finer)) / 12, 0.0)
    return total, np.where(small, smaller, 0.0), variance, both


def _of_product(term: Array, gap: Array) -> Array:
    return np.where(_held(term, gap), 0.0, np.square(gap) / 12)


def _held(x: Array, gap: Array) -> NDArray[np.bool_]:
    """Tell which values are whole numbers of gaps, but for golden's own roundings."""
    gaps = x / gap
    held: NDArray[np.bool_] = np.abs(gaps - np.rint(gaps)) <= _ROUNDOFF
    return held


def _gap(x: Array) -> Array:
    """Return `ulp(x)`, by the bits of its exponent."""
    power = (np.ascontiguousarray(x).view(np.uint64) & _EXPONENT).view(np.float64)
    gap: Array = np.maximum(power, 2.0**_FLOAT32.min_exponent) * 2.0 ** (1 - _FLOAT32.precision)
    return gap
