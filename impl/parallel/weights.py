"""A rank's part of the model's weights: heads picked, copied and padded as a layout says."""

from __future__ import annotations

import torch
from torch import Tensor

from impl.parallel.head_layout import PADDING, Slots


def shard_heads(weight: Tensor, slots: Slots, width: int, dim: int = 0) -> Tensor:
    """Heads of a weight in the order of a rank's slots, zeros for padding.

    Args:
        weight: all heads side by side along `dim`, `width` values each: rows of a q, k or v
            projection or its bias (`dim` 0), columns of the output projection (`dim` 1), or sinks
            (`width` 1).
        slots: head in each slot.
        width: values of a head along `dim`.
        dim: the axis of heads.

    Returns:
        A new tensor, `len(slots) * width` long along `dim`.
    """
    heads = [
        torch.zeros_like(weight.narrow(dim, 0, width))
        if head == PADDING
        else weight.narrow(dim, head * width, width)
        for head in slots
    ]
    return torch.cat(heads, dim)
