"""Checks of the arrays that callers hand in."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.errors import ConfigError, ShapeError
from golden.stages import Array

Positions = NDArray[np.int64]


def as_float64(name: str, value: Any, shape: tuple[int | None, ...], layout: str) -> Array:
    """Return `value` as float64 after checking its shape; None in `shape` matches any length.

    Raises:
        ShapeError: not a real floating array, or of another shape.
    """
    return as_real(name, value, shape, layout).astype(np.float64, copy=False)


def as_real(
    name: str, value: Any, shape: tuple[int | None, ...], layout: str
) -> NDArray[np.generic]:
    """Check an array like `as_float64`, and leave its dtype as it is.

    Raises:
        ShapeError: not a real floating array, or of another shape.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "fiu" and array.dtype.name not in _WIDENABLE:
        raise ShapeError(
            f"{name} must hold real numbers, got dtype {array.dtype}; convert it to float64 first"
        )
    expected = tuple("any" if length is None else str(length) for length in shape)
    matches = array.ndim == len(shape) and all(
        want is None or want == got for want, got in zip(shape, array.shape, strict=True)
    )
    if not matches:
        raise ShapeError(
            f"{name} must have shape ({', '.join(expected)}), {layout}, got {array.shape}"
            + ("; are its axes in that order?" if _same_lengths(array.shape, shape) else "")
        )
    return array


_LAST_POSITION = 2**31 - 1
_WIDENABLE = frozenset({"bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3"})


def _same_lengths(got: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    """Tell whether the lengths are those wanted, in another order."""
    known = [length for length in wanted if length is not None]
    return len(got) == len(wanted) and all(got.count(n) >= known.count(n) for n in known)


def positive_scale(softmax_scale: float | None, softcap: float | None, head_dim: int) -> float:
    """Return the factor on the dot products, `head_dim ** -0.5` if not given; check the cap too.

    Raises:
        ConfigError: scale or cap is not positive.
    """
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    if not scale > 0:
        raise ConfigError(f"softmax_scale must be a positive factor on q·k, got {scale}")
    if softcap is not None and not softcap > 0:
        raise ConfigError(f"softcap must be positive, got {softcap}; use None for no cap")
    return float(scale)


def as_positions(name: str, value: Any, shape: tuple[int, int]) -> Positions:
    """Return `value` as int64 positions of shape `(batch, length)`; -1 marks an empty slot.

    A `(1, length)` or `(length,)` array serves every batch row.

    Raises:
        ShapeError: not integers, or of a shape that does not broadcast to `(batch, length)`.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "iu":
        raise ShapeError(f"{name} must hold integers, got dtype {array.dtype}")
    if array.ndim not in (1, 2) or array.shape[-1] != shape[1]:
        raise ShapeError(f"{name} must have shape {shape}, (batch, length), got {array.shape}")
    if array.ndim == 2 and array.shape[0] not in (1, shape[0]):
        raise ShapeError(f"{name} must have shape {shape}, (batch, length), got {array.shape}")
    if array.size and (int(array.min()) < -1 or int(array.max()) > _LAST_POSITION):
        raise ShapeError(
            f"{name} must lie between -1 (an empty slot) and 2**31 - 1, got "
            f"{int(array.min())} to {int(array.max())}"
        )
    return np.ascontiguousarray(np.broadcast_to(array, shape), dtype=np.int64)


def real_qkv(
    q: Any, k: Any, v: Any
) -> tuple[NDArray[np.generic], NDArray[np.generic], NDArray[np.generic]]:
    """Check queries, keys and values against each other, and leave their dtypes as they are.

    Raises:
        ShapeError: an array has the wrong shape or dtype.
        ConfigError: the query heads are no multiple of the key/value heads.
    """
    q = as_real("q", q, (None, None, None, None), "BHSD")
    batch, num_heads, _, head_dim = q.shape
    k = as_real("k", k, (batch, None, None, head_dim), "BHSD")
    v = as_real("v", v, (batch, k.shape[1], k.shape[2], None), "BHSD")
    if k.shape[1] == 0 or num_heads % k.shape[1] != 0:
        raise ConfigError(
            "num_attention_heads must be a multiple of num_key_value_heads, got "
            f"{num_heads} and {k.shape[1]}; is the layout BHSD?"
        )
    if head_dim == 0:
        raise ShapeError(f"q must have a head_dim of at least 1, got shape {q.shape}")
    return q, k, v
