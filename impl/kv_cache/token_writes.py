"""Writing tokens into a cache: one scatter, static shapes, no spare slots."""

from __future__ import annotations

import torch
from torch import Tensor


def write_tokens(cache: Tensor, new: Tensor, lines: Tensor, slots: Tensor) -> None:
    """Write tokens into a cache, in place.

    A token that goes nowhere repeats the write of one that goes somewhere, so shapes stay static
    and no slot is given up to garbage. Two tokens that share a slot are undefined, and so is one
    beyond the last slot, except on devices that check indices (CPU), where it is an error.

    Args:
        cache: `(lines, heads, slots, head_dim)`, BHSD, or a view of that shape.
        new: `(batch, heads, seq_len, head_dim)`, BHSD, in the cache's dtype.
        lines: `(batch, seq_len)`, int64, cache line of each token; negative is nowhere.
        slots: `(batch, seq_len)`, int64, its slot; negative is nowhere.
    """
    batch, heads, seq_len, width = new.shape
    count = batch * seq_len
    lines, slots = lines.reshape(count), slots.reshape(count)
    kept = (lines >= 0) & (slots >= 0)
    some = kept.any()
    every = torch.arange(count, device=new.device)
    source = torch.where(kept, every, kept.to(torch.int32).argmax())
    values = new.transpose(1, 2).reshape(count, heads, width).index_select(0, source)
    # If no token goes anywhere, the first slot is written with what it holds.
    values = torch.where(some, values, cache[0, :, 0])
    line = torch.where(some, lines.index_select(0, source), 0)
    slot = torch.where(some, slots.index_select(0, source), 0)
    head = torch.arange(heads, device=new.device)
    cache.index_put_((line[:, None], head[None, :], slot[:, None]), values)
