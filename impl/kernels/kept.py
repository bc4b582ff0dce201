"""Values that data hides: zeroed whatever they hold, or made NaN.

Eager `masked_fill` on cpu is not vectorised under a mask that broadcasts; conjunctions and
disjunctions of bits compute the same three to six times as fast. Compilers vectorise either, and
they and autograd know `masked_fill`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from impl.training import trains

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def zero_unless(values: Tensor, kept: Tensor, *, reuse: bool = False) -> Tensor:
    """Zero all that is not kept, whatever it is, NaN included.

    Args:
        values: any floating-point tensor.
        kept: bool, broadcastable to `values`.
        reuse: nobody else reads `values`, so their memory may be written.
    """
    if not _by_bits(values):
        return values.masked_fill(~kept, 0.0)
    bits, ones = _bits(values, kept)
    cleaned = bits.bitwise_and_(ones) if reuse else bits & ones
    return cleaned.view(values.dtype)


def nan_where(values: Tensor, broken: Tensor, *, reuse: bool = False) -> Tensor:
    """Replace what is broken by NaN, so that nobody takes it for a result.

    Args:
        values: any floating-point tensor with infinities.
        broken: bool, broadcastable to `values`.
        reuse: as in `zero_unless`.
    """
    if not _by_bits(values):
        return values.masked_fill(broken, math.nan)
    bits, ones = _bits(values, broken)
    marked = bits.bitwise_or_(ones) if reuse else bits | ones  # all ones are a NaN
    return marked.view(values.dtype)


def _bits(values: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """The bits of values, as integers, and as many ones or zeros."""
    dtype = _BITS[values.element_size()]
    return values.view(dtype), -where.to(dtype)


def _by_bits(values: Tensor) -> bool:
    eager = values.device.type == "cpu" and not torch.compiler.is_compiling()
    return eager and not trains(values)
