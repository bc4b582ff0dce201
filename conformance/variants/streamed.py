"""Flash-style kernels: online softmax over tiles of keys, and parts of the keys merged.

Weights are cast to the values' dtype before their product with the values, unnormalised; their
sum, the scores and the running output are float32, and one division comes at the end.

Source: Dao et al. (2022), arXiv 2205.14135, tiles; Dao et al. (2023), Flash-Decoding, split keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from conformance.subjects.base import CoreCall
from conformance.variants.dense import masked_scores, per_query_head, sink_logits

_MASKED = float("-inf")


class Partial(NamedTuple):
    """Attention over some of the keys, before its division; all float32.

    Attributes:
        mixed: weights times values, `(batch, num_attention_heads, q_len, head_dim)`.
        total: sum of weights, `(batch, num_attention_heads, q_len, 1)`.
        top: largest score, whose exponential both are relative to; -inf if nothing was seen.
    """

    mixed: Tensor
    total: Tensor
    top: Tensor


def attend_tiles(call: CoreCall, tile: int) -> Partial:
    """Stream over tiles of that many keys."""
    scores = masked_scores(call, torch.float32)
    v = per_query_head(call.v, call.q)
    rows = scores.shape[:-1]
    top = torch.full((*rows, 1), _MASKED)
    total = torch.zeros(*rows, 1)
    mixed = torch.zeros(*rows, v.shape[-1])
    for start in range(0, scores.shape[-1], tile):
        part = scores[..., start : start + tile]
        new_top = torch.maximum(top, part.amax(dim=-1, keepdim=True))
        base = _finite(new_top)
        weights = torch.exp(part - base)
        shrink = torch.exp(top - base)
        total = total * shrink + weights.sum(dim=-1, keepdim=True)
        stored = weights.to(v.dtype).float()
        mixed = mixed * shrink + stored @ v[:, :, start : start + tile].float()
        top = new_top
    return Partial(mixed, total, top)


def merged(parts: list[Partial]) -> Partial:
    """Merge attention over disjoint sets of keys."""
    top = torch.stack([part.top for part in parts]).amax(dim=0)
    shrinks = [torch.exp(part.top - _finite(top)) for part in parts]
    pairs = list(zip(parts, shrinks, strict=True))
    mixed = torch.stack([part.mixed * shrink for part, shrink in pairs]).sum(dim=0)
    total = torch.stack([part.total * shrink for part, shrink in pairs]).sum(dim=0)
    return Partial(mixed, total, top)


def finished(call: CoreCall, part: Partial) -> Tensor:
    """Add the sink to the sum of weights, divide, and store; zeros where nothing was seen."""
    sink = sink_logits(call, torch.float32)
    base = _finite(torch.maximum(part.top, sink))
    shrink = torch.exp(part.top - base)
    total = part.total * shrink + torch.exp(sink - base)
    return (part.mixed * shrink / total.masked_fill(total == 0, 1.0)).to(call.q.dtype)


def flash(tile: int) -> Callable[[CoreCall], Tensor]:
    """Return a kernel that streams over tiles of that many keys."""

    def kernel(call: CoreCall) -> Tensor:
        return finished(call, attend_tiles(call, tile))

    return kernel


def flash_reversed(call: CoreCall) -> Tensor:
    """Stream from the last key to the first."""
    flipped = replace(
        call,
        k=call.k.flip(2),
        v=call.v.flip(2),
        mask=call.mask.flip(3),
        kv_positions=call.kv_positions.flip(1),
    )
    return finished(call, attend_tiles(flipped, 64))


def split_keys(splits: int) -> Callable[[CoreCall], Tensor]:
    """Return a kernel that attends to that many parts of the keys and merges what it gets."""

    def kernel(call: CoreCall) -> Tensor:
        kv_len = call.k.shape[2]
        edges = sorted({kv_len * part // splits for part in range(splits + 1)})
        parts = [
            attend_tiles(_keys_between(call, first, last), 128)
            for first, last in itertools.pairwise(edges)
        ]
        return finished(call, merged(parts))

    return kernel


def _keys_between(call: CoreCall, first: int, last: int) -> CoreCall:
    keys = slice(first, last)
    return replace(
        call,
        k=call.k[:, :, keys],
        v=call.v[:, :, keys],
        mask=call.mask[..., keys],
        kv_positions=call.kv_positions[:, keys],
    )


def _finite(top: Tensor) -> Tensor:
    return top.masked_fill(top == _MASKED, 0.0)
