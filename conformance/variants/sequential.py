"""A kernel that rounds and sums to the letter of the profile `in-sequence`.

Libraries sum in registers and blocks and so err less; this kernel is what the float32 part of the
error model describes: the order of every sum, functions and the softmax scale in float64 and
rounded once, so that no approximation of theirs is counted for an error of the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from conformance.precision import in_sequence
from conformance.subjects.base import CoreCall
from conformance.variants.dense import per_query_head, sink_logits

_CLAIMED = in_sequence("float32")
_MASKED = float("-inf")


def sequential(call: CoreCall) -> Tensor:
    """Attend with every sum in sequence, in blocks as long as the profile's."""
    scores, sink = _scores(call), sink_logits(call, torch.float32)
    top = torch.maximum(scores.amax(dim=-1, keepdim=True), sink)
    top = top.masked_fill(top == _MASKED, 0.0)
    weights, sunk = (_rounded(torch.exp, x - top) for x in (scores, sink))
    v = per_query_head(call.v, call.q).float()
    stored = weights.to(call.v.dtype).float()
    keys, few = weights.shape[-1], weights.shape[-2] < _CLAIMED.few_rows
    each = (weights[..., key : key + 1] for key in range(keys))
    total = _summed(itertools.chain(each, [sunk]), torch.zeros_like(top), _CLAIMED.block_length)
    terms = (stored[..., key : key + 1] * v[:, :, key : key + 1] for key in range(keys))
    start = torch.zeros(*top.shape[:-1], v.shape[-1])
    mixed = _summed(terms, start, keys if few else _CLAIMED.block_length)
    return (mixed / total.masked_fill(total == 0, 1.0)).to(call.q.dtype)


def _summed(terms: Iterable[Tensor], zero: Tensor, block: int) -> Tensor:
    """Add terms one after the other in blocks, then the blocks."""
    total, left = zero.clone(), iter(terms)
    while True:
        part, count = zero.clone(), 0
        for term in itertools.islice(left, block):
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
    scores = _rounded(lambda x: x * call.softmax_scale, products)
    if call.softcap is not None:
        scores = _rounded(torch.tanh, scores / call.softcap) * call.softcap
    return scores.masked_fill(~call.mask, _MASKED)


def _rounded(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function in float64 and round to float32."""
    return function(x.double()).float()
