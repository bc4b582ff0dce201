"""Low-precision storage of keys and values: clamp, round, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from golden.arrays import as_float64
from golden.errors import ConfigError, ShapeError
from golden.formats import FORMATS
from golden.stages import Array

CODES = ("float8_e4m3fn", "float8_e5m2", "int8")
"""Formats that a cache can store."""


@dataclass(frozen=True, slots=True, eq=False)
class Quantisation:
    """How one tensor is stored: a format, and a static scale or none.

    Q1: without a scale (direct cast) a value is rounded to nearest, ties to even; beyond the
        largest number float8_e5m2 gives infinity, float8_e4m3fn, which has none, NaN.
    Q2: with a scale, `code = round(clamp(x / scale, -bound, bound))`, and reading gives
        `code * scale`; it never overflows.
    Q3: scales are per tensor, per key/value head, or per head and channel.
    Q4: int8 clamps to -128 and 127 and rounds ties to even; it always has a scale.

    Attributes:
        code: `float8_e4m3fn`, `float8_e5m2` or `int8`.
        scale: `()`, `(num_key_value_heads,)` or `(num_key_value_heads, head_dim)`, float64,
            positive; None for a direct cast.
        bound: largest magnitude of a float8 code, 0 for the format's own; Trainium's e4m3 stops
            at 240.

    Raises:
        ConfigError: the format is unknown, int8 has no scale, or a number is not positive.
        ShapeError: the scale has more axes than a tensor, a head and a channel.

    Source: neuronx-distributed-inference, KV cache quantisation; formats: Micikevicius et al.
    (2022), FP8 formats for deep learning, arXiv 2209.05433.
    """

    code: Literal["float8_e4m3fn", "float8_e5m2", "int8"]
    scale: Any = None
    bound: float = 0.0

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ConfigError(f"code must be one of {', '.join(CODES)}, got {self.code!r}")
        if self.scale is None:
            if self.code == "int8":
                raise ConfigError("int8 needs a scale; only float8 can be cast directly")
            if self.bound:
                raise ConfigError("bound needs a scale; a direct cast does not clamp")
            return
        scale = np.asarray(self.scale, dtype=np.float64)
        if scale.ndim > 2:
            raise ShapeError(
                f"scale must have shape (), (heads,) or (heads, head_dim), got {scale.shape}"
            )
        if not bool((scale > 0).all()):
            raise ConfigError(f"scale must be positive, got {scale.tolist()}")
        largest = 127.0 if self.code == "int8" else FORMATS[self.code].largest
        if not 0 <= self.bound <= largest:
            raise ConfigError(f"bound must lie between 0 and {largest}, got {self.bound}")
        object.__setattr__(self, "scale", scale)

    def quantise(self, x: Any) -> Array:
        """Return the codes of `x`, `(batch, heads, length, head_dim)`, as float64."""
        values = as_float64("x", x, (None, None, None, None), "BHSD")
        if self.scale is None:
            codes = FORMATS[self.code].nearest(values)
            if self.code == "float8_e4m3fn":
                codes = np.where(np.isinf(codes), np.nan, codes)
            return codes
        ratio = values / self._by_head(values)
        if self.code == "int8":
            low, high = (-self.bound, self.bound) if self.bound else (-128.0, 127.0)
            return np.rint(np.clip(ratio, low, high))
        form = FORMATS[self.code]
        bound = self.bound or form.largest
        return form.nearest(np.clip(ratio, -bound, bound))

    def dequantise(self, codes: Array) -> Array:
        """Return the values that codes stand for, shaped like them, float64."""
        if self.scale is None:
            return codes
        values: Array = codes * self._by_head(codes)
        return values

    def _by_head(self, x: Array) -> Array:
        scale: Array = self.scale
        expected = (x.shape[1], x.shape[3])[: scale.ndim]
        if scale.shape != expected:
            raise ShapeError(f"scale must have shape {expected}, got {scale.shape}")
        if scale.ndim == 1:
            return scale[:, None, None]
        return scale[:, None, :] if scale.ndim == 2 else scale
