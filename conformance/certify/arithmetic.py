"""The arithmetics that exact values are held in, and elementary functions in each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from conformance.errors import UsageError
from golden import Array

Arithmetic: TypeAlias = Literal["mpmath", "longdouble", "float64"]
"""What exact values are held in: 50 decimal digits, extended precision, or float64 itself (then the
values are only estimates, and the errors still first-order bounds)."""

DIGITS = 50
"""Decimal digits of the mpmath arithmetic."""


@cache
def _mpmath() -> Any:
    """Return an mpmath context of `DIGITS` digits, apart from the global one."""
    try:
        context = importlib.import_module("mpmath").MPContext()
    except ImportError as error:
        raise UsageError(
            "the certificate needs mpmath; install it with pip install 'attn-conformance[certify]'"
        ) from error
    context.dps = DIGITS
    return context


def apply(name: str, values: NDArray[Any]) -> NDArray[Any]:
    """Apply an elementary function in the arithmetic of `values`."""
    values = np.asarray(values)  # NumPy makes scalars of arrays without axes
    if values.dtype == object:
        result = np.frompyfunc(getattr(_mpmath(), name), 1, 1)(values)
        return np.asarray(result, dtype=object)
    function: Callable[[NDArray[Any]], NDArray[Any]] = getattr(np, name)
    return function(values)


def size_of(values: NDArray[Any]) -> Array:
    """Return magnitudes as float64."""
    return np.asarray(np.abs(values)).astype(np.float64)


def held_in(arithmetic: Arithmetic, values: Any) -> NDArray[Any]:
    """Return float64 values, or integers, in an arithmetic; all of them hold float64 exactly.

    Raises:
        UsageError: mpmath is not installed.
    """
    array = np.asarray(values, dtype=np.float64)
    if arithmetic == "mpmath":
        return np.asarray(np.frompyfunc(_mpmath().mpf, 1, 1)(array), dtype=object)
    return array.astype(np.longdouble if arithmetic == "longdouble" else np.float64)


def pi(arithmetic: Arithmetic) -> NDArray[Any]:
    """Return pi in an arithmetic."""
    if arithmetic == "mpmath":
        return np.asarray(+_mpmath().pi, dtype=object)
    four = np.asarray(4 * np.arctan(np.longdouble(1)))
    return four if arithmetic == "longdouble" else four.astype(np.float64)


def arithmetic_of(values: NDArray[Any]) -> Arithmetic:
    """Return what values are held in."""
    if values.dtype == object:
        return "mpmath"
    return "float64" if values.dtype == np.float64 else "longdouble"
