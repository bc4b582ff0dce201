"""Writing tokens into a cache: one scatter, static shapes, no spare slots."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """Where the `batch * seq_len` tokens of a step are written, for keys and values alike.

    Attributes:
        some: `()`, bool, whether any token is written.
        source: `(batch * seq_len,)`, int64, the token to write, in order of the batch.
        line: likewise, the cache line it is written to.
        slot: likewise, its slot.
    """

    some: Tensor
    source: Tensor
    line: Tensor
    slot: Tensor


def token_places(lines: Tensor, slots: Tensor) -> Places:
    """Find a place for each token.

    A token that goes nowhere repeats the write of one that goes somewhere, so shapes stay static
    and no slot is given up to garbage. If none goes anywhere, the first slot is written with what
    it holds.

    Args:
        lines: `(batch, seq_len)`, int64, cache line of each token; negative is nowhere.
        slots: `(batch, seq_len)`, int64, its slot; negative is nowhere.
    """
    lines, slots = lines.reshape(-1), slots.reshape(-1)
    kept = (lines >= 0) & (slots >= 0)
    every = torch.arange(kept.shape[0], device=kept.device)
    source = torch.where(kept, every, kept.to(torch.int32).argmax())
    # A source has a place unless no token has one.
    line, slot = lines.index_select(0, source), slots.index_select(0, source)
    some = kept.any()
    return Places(some, source, torch.where(some, line, 0), torch.where(some, slot, 0))


def write_tokens(cache: Tensor, new: Tensor, places: Places) -> None:
    """Write tokens into a cache, in place.

    Two tokens that share a slot are undefined, and so is one beyond the last slot, except on
    devices that check indices (CPU), where it is an error.

    Args:
        cache: `(lines, heads, slots, head_dim)`, BHSD, or a view of that shape.
        new: `(batch, heads, seq_len, head_dim)`, BHSD, in the cache's dtype.
        places: where they go.
    """
    batch, heads, seq_len, width = new.shape
    tokens = new.transpose(1, 2).reshape(batch * seq_len, heads, width)
    values = torch.where(places.some, tokens.index_select(0, places.source), cache[0, :, 0])
    head = torch.arange(heads, device=new.device)
    cache.index_put_((places.line[:, None], head[None, :], places.slot[:, None]), values)


def write_step(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    *,
    k_transposed: bool = False,
) -> None:
    """Write a step's keys and values into caches whose lines are its rows, in place.

    Args:
        k_cache: `(batch, heads, slots, head_dim)`, BHSD, or with its last two axes exchanged if
            `k_transposed`.
        v_cache: `(batch, heads, slots, head_dim)`.
        k: `(batch, heads, seq_len, head_dim)`, BHSD, in the cache's dtype.
        v: like `k`.
        slots: `(batch, seq_len)`, int64, negative for nowhere.
        k_transposed: keys are stored as columns.
    """
    lines = torch.arange(slots.shape[0], device=slots.device)
    places = token_places(lines[:, None].expand(slots.shape), slots)
    with torch.no_grad():
        write_tokens(k_cache.transpose(2, 3) if k_transposed else k_cache, k, places)
        write_tokens(v_cache, v, places)
