"""Kernels with a backward of their own, by tiles of keys as flash attention has it, and their bugs.

Scores, softmax and sums in float32; weights and the gradients of scores are rounded to the tensors'
dtype for their products, and `delta` is taken from the output as it was stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conformance.subjects import CoreCall, Subject


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel.

    Attributes:
        tile: keys of a tile.
        defect: what is wrong with its backward, empty for nothing.
    """

    tile: int
    defect: str = ""


DEFECTS = (
    "sink without its probability",
    "no softmax scale in dq",
    "a head of the group left out of dk",
    "delta in the tensors' dtype",
)


def _per_query_head(kv: Tensor, q: Tensor) -> Tensor:
    return kv.repeat_interleave(q.shape[1] // kv.shape[1], dim=1).float()


def _per_kv_head(d_heads: Tensor, kv: Tensor) -> Tensor:
    batch, heads, length, width = d_heads.shape
    groups = d_heads.view(batch, kv.shape[1], heads // kv.shape[1], length, width)
    return groups.sum(dim=2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: CoreCall, how: Kernel
    ) -> Tensor:
        scores, _ = _scores(q, k, call, slice(None))
        top = scores.amax(dim=-1, keepdim=True)
        if sinks is not None:
            top = torch.maximum(top, sinks.float().view(1, -1, 1, 1))
        top = top.masked_fill(top.isneginf(), 0.0)
        exps = torch.exp(scores - top)
        total = exps.sum(dim=-1, keepdim=True)
        if sinks is not None:
            total = total + torch.exp(sinks.float().view(1, -1, 1, 1) - top)
        total = total.masked_fill(total == 0, 1.0)
        out = (exps.to(q.dtype).float() @ _per_query_head(v, q) / total).to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, top + total.log())
        ctx.call, ctx.how = call, how
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, logsumexp = ctx.saved_tensors
        call, how = ctx.call, ctx.how
        delta = (d_out.float() * out.float()).sum(dim=-1, keepdim=True)
        if how.defect == "delta in the tensors' dtype":
            delta = delta.to(q.dtype).float()
        d_q = torch.zeros(q.shape)
        d_k, d_v = torch.zeros(2, *q.shape[:2], k.shape[2], q.shape[3]).unbind()
        for start in range(0, k.shape[2], how.tile):
            here = slice(start, start + how.tile)
            scores, slope = _scores(q, k, call, here)
            weights = torch.exp(scores - logsumexp)
            d_weights = d_out.float() @ _per_query_head(v[:, :, here], q).transpose(2, 3)
            d_scores = (weights * (d_weights - delta) * slope).to(q.dtype).float()
            d_v[:, :, here] = weights.to(q.dtype).float().transpose(2, 3) @ d_out.float()
            d_q += d_scores @ _per_query_head(k[:, :, here], q)
            d_k[:, :, here] = d_scores.transpose(2, 3) @ q.float()
        if how.defect == "a head of the group left out of dk":
            group = q.shape[1] // k.shape[1]
            d_k[:, group - 1 :: group] = 0.0
        if how.defect != "no softmax scale in dq":
            d_q = d_q * call.softmax_scale
        d_k, d_v = _per_kv_head(d_k * call.softmax_scale, k), _per_kv_head(d_v, v)
        d_sinks = None
        if sinks is not None:
            share = torch.exp(sinks.float().view(1, -1, 1, 1) - logsumexp)
            if how.defect == "sink without its probability":
                share = torch.ones_like(share)
            d_sinks = -(share * delta).sum(dim=(0, 2, 3)).to(sinks.dtype)
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), d_sinks, None, None


def _scores(q: Tensor, k: Tensor, call: CoreCall, keys: slice) -> tuple[Tensor, Tensor]:
    """Return masked scores of some keys, and what the soft cap multiplies their gradients by."""
    scores = q.float() @ _per_query_head(k[:, :, keys], q).transpose(2, 3) * call.softmax_scale
    slope = torch.ones_like(scores)
    if call.softcap is not None:
        tanh = torch.tanh(scores / call.softcap)
        scores, slope = tanh * call.softcap, 1.0 - tanh * tanh
    return scores.masked_fill(~call.mask[..., keys], float("-inf")), slope


def flash(how: Kernel) -> Subject:
    """Return a kernel as a subject of profile `flash`, its gradients by autograd."""

    def attention(call: CoreCall) -> Tensor:
        found: Tensor = _Attention.apply(call.q, call.k, call.v, call.sinks, call, how)
        return found

    return Subject(
        name=f"flash {how.tile} {how.defect}",
        function=attention,
        profile="flash",
        backward="autograd",
    )


def own_backward(how: Kernel) -> Subject:
    """Return the same as a subject that hands its gradients over itself."""
    forward: Callable[[CoreCall], Tensor] = flash(how).function

    def backward(call: CoreCall, d_output: Tensor) -> dict[str, Tensor]:
        read = {"q": call.q, "k": call.k, "v": call.v}
        if call.sinks is not None:
            read["sinks"] = call.sinks
        for tensor in read.values():
            tensor.requires_grad_()
        found = torch.autograd.grad(forward(call), list(read.values()), d_output)
        return dict(zip(read, found, strict=True))

    return Subject(name="own backward", function=forward, profile="flash", backward=backward)
