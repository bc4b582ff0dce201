"""A kernel that sums in float32 in the order that profiles claim by default.

Libraries sum in registers and blocks and so err less; this kernel is what the float32 part of
the error model describes to the letter.
"""

from __future__ import annotations

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
    total = torch.zeros_like(top)
    mixed = torch.zeros(*top.shape[:-1], v.shape[-1])
    few = weights.shape[-2] < _CLAIMED.few_rows
    block = weights.shape[-1] if few else _CLAIMED.block_length
    for start in range(0, weights.shape[-1], block):
        part_total, part_mixed = torch.zeros_like(total), torch.zeros_like(mixed)
        for key in range(start, min(start + block, weights.shape[-1])):
            part_total += weights[..., key : key + 1]
            part_mixed += stored[..., key : key + 1] * v[:, :, key : key + 1]
        total += part_total
        mixed += part_mixed
    return finished(call, Partial(mixed, total, top))


def _scores(call: CoreCall) -> Tensor:
    q, k = call.q.float(), per_query_head(call.k, call.q).float()
    products = torch.zeros(*q.shape[:-1], k.shape[2])
    for channel in range(q.shape[-1]):
        products += q[..., channel, None] * k[:, :, None, :, channel]
    scores = products * call.softmax_scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    return scores.masked_fill(~call.mask, float("-inf"))
