"""A kernel that sums in float32 in the order that profiles claim by default.

Libraries sum in registers and blocks and so err less; this kernel is what the float32 part of
the error model describes to the letter.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from conformance.precision import flash
from conformance.subjects.base import CoreCall
from conformance.variants.dense import per_query_head
from conformance.variants.streamed import Partial, finished

_CLAIMED = flash("float32")


def sequential(call: CoreCall) -> Tensor:
    """Attend with every sum in sequence, in blocks as long as the profile's."""
    scores = _scores(call)
    top = scores.amax(dim=-1, keepdim=True)
    weights = torch.exp(scores - top.masked_fill(top == float("-inf"), 0.0))
    v = per_query_head(call.v, call.q).float()
    stored = weights.to(call.v.dtype).float()
    keys, few = weights.shape[-1], weights.shape[-2] < _CLAIMED.few_rows
    terms = (weights[..., key : key + 1] for key in range(keys))
    total = _summed(terms, torch.zeros_like(top), _CLAIMED.block_length)
    terms = (stored[..., key : key + 1] * v[:, :, key : key + 1] for key in range(keys))
    start = torch.zeros(*top.shape[:-1], v.shape[-1])
    mixed = _summed(terms, start, keys if few else _CLAIMED.block_length)
    return finished(call, Partial(mixed, total, top))


def _summed(terms: Iterator[Tensor], zero: Tensor, block: int) -> Tensor:
    """Add terms one after the other in blocks, then the blocks."""
    total = zero.clone()
    while True:
        part, count = zero.clone(), 0
        for term in itertools.islice(terms, block):
            part += term
            count += 1
        if not count:
            return total
        total += part


def _scores(call: CoreCall) -> Tensor:
    q, k = call.q.float(), per_query_head(call.k, call.q).float()
    products = torch.zeros(*q.shape[:-1], k.shape[2])
    for channel in range(q.shape[-1]):
        products += q[..., channel, None] * k[:, :, None, :, channel]
    scores = products * call.softmax_scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    return scores.masked_fill(~call.mask, float("-inf"))
