"""How keys and values are stored: as they are, or as float8 or int8 codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from impl.errors import ConfigError, ShapeError, explain
from impl.precision import compute_dtype

CODE_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
"""Formats narrower than the model's that a cache can store."""

# Halfway from the largest number of e4m3fn, 448, to the next one the format would have.
_E4M3FN_OVERFLOW = 464.0


class Codec(nn.Module):
    """Encodes what is written to a cache and decodes what is read.

    | stored | scale | write | read |
    | --- | --- | --- | --- |
    | the layer's dtype | None | as it is | as it is |
    | float8 | None | rounded to nearest even; beyond the format inf, or NaN without one | cast |
    | float8, int8 | given | `round(clamp(x / scale, -bound, bound))` | `code * scale` |

    Scaling is done in float32 (float64 in a float64 layer) and rounds once to the stored format
    and once more to the layer's dtype on reading. Of a step, only what it finds in the cache is
    coded; its own keys and values are attended to as they are.

    Attributes:
        codes: what is stored are codes, not the layer's numbers.
        scale: broadcasts to BHSD, or None; a buffer, so it follows the module to a device.

    Args:
        stored: one of `CODE_DTYPES`, or the layer's dtype.
        layer_dtype: dtype of the layer.
        scale: positive; a number or `()` for the tensor, `(heads,)`, or `(heads, head_dim)`.
        bound: largest magnitude of a scaled code; None is the format's. Trainium's e4m3 ends at
            240.
        heads: KV heads of the cache.
        width: its head_dim.

    Raises:
        ConfigError: an unknown format, int8 without a scale, or a number that is not positive.
        ShapeError: a scale of another shape.

    Source: neuronx-distributed-inference, KV cache quantisation; OCP 8-bit floating point
    specification (2023), whose non-saturating conversion the direct cast is.
    """

    scale: Tensor | None

    def __init__(
        self,
        stored: torch.dtype,
        layer_dtype: torch.dtype,
        *,
        heads: int,
        width: int,
        scale: Tensor | float | None = None,
        bound: float | None = None,
    ) -> None:
        super().__init__()
        self.stored, self.layer_dtype = stored, layer_dtype
        self.codes = coded = stored in CODE_DTYPES
        if not coded and (stored != layer_dtype or scale is not None):
            raise ConfigError(
                explain("kv_cache_quant_dtype", f"be one of {CODE_DTYPES} to quantise", stored)
            )
        if stored == torch.int8 and scale is None:
            raise ConfigError(
                explain("kv_scales", "be given for an int8 cache", None, "float8 can do without")
            )
        if bound is not None and scale is None:
            raise ConfigError(explain("kv_cache_quant_bound", "be None without kv_scales", bound))
        self.bounds = self._bounds(bound) if coded else (0.0, 0.0)
        self.register_buffer("scale", None if scale is None else self._shaped(scale, heads, width))

    def _bounds(self, bound: float | None) -> tuple[float, float]:
        low, high = -128.0, 127.0
        if self.stored.is_floating_point:
            high = torch.finfo(self.stored).max
            low = -high
        if bound is None:
            return low, high
        if not 0 < bound <= high:
            raise ConfigError(
                explain("kv_cache_quant_bound", f"be positive and at most {high}", bound)
            )
        return -bound, bound

    def _shaped(self, scale: Tensor | float, heads: int, width: int) -> Tensor:
        given = torch.as_tensor(scale, dtype=compute_dtype(self.layer_dtype))
        shape = tuple(given.shape)
        if shape not in ((), (heads,), (heads, width)):
            raise ShapeError(
                explain("kv_scales", f"have shape (), {(heads,)} or {(heads, width)}", shape)
            )
        if not bool((given > 0).all()):
            raise ConfigError(explain("kv_scales", "be positive", given.tolist()))
        if len(shape) == 1:
            return given[:, None, None]
        return given[:, None, :] if len(shape) == 2 else given

    def encode(self, x: Tensor) -> Tensor:
        """What is stored for `x`, `(batch, heads, seq_len, head_dim)`, BHSD."""
        if self.stored == self.layer_dtype:
            return x.to(self.stored)
        if self.scale is None:
            if self.stored == torch.float8_e4m3fn:
                x = x.masked_fill(x.abs() > _E4M3FN_OVERFLOW, float("nan"))
            return x.to(self.stored)
        ratio = (x.to(self.scale.dtype) / self.scale).clamp(*self.bounds)
        return (ratio.round() if self.stored == torch.int8 else ratio).to(self.stored)

    def decode(self, codes: Tensor) -> Tensor:
        """What stored codes, BHSD, stand for, in the layer's dtype."""
        if self.scale is None:
            return codes.to(self.layer_dtype)
        return (codes.to(self.scale.dtype) * self.scale).to(self.layer_dtype)
