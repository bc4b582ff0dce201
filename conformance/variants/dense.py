"""Kernels that hold a whole matrix of scores: operator by operator, or in a wider format inside."""

from __future__ import annotations

from torch import Tensor, dtype, exp, float32, float64, full, maximum, tanh

from conformance.subjects.base import CoreCall

_MASKED = float("-inf")


def per_query_head(kv: Tensor, q: Tensor) -> Tensor:
    """Repeat each KV head for the query heads that read it, BHSD."""
    return kv.repeat_interleave(q.shape[1] // kv.shape[1], dim=1)


def masked_scores(call: CoreCall, stored: dtype) -> Tensor:
    """Return scores, -inf where masked, every step of theirs stored in one dtype.

    Returns:
        `(batch, num_attention_heads, q_len, kv_len)`, `stored`.
    """
    k = per_query_head(call.k, call.q).to(stored)
    scores = call.q.to(stored) @ k.transpose(2, 3) * call.softmax_scale
    if call.softcap is not None:
        scores = tanh(scores / call.softcap) * call.softcap
    return scores.masked_fill(~call.mask, _MASKED)


def sink_logits(call: CoreCall, stored: dtype) -> Tensor:
    """Return the sink of each head, -inf without one, `(1, num_attention_heads, 1, 1)`."""
    if call.sinks is None:
        return full((1, call.q.shape[1], 1, 1), _MASKED, dtype=stored)
    return call.sinks.to(stored).view(1, -1, 1, 1)


def normalised(scores: Tensor, sink: Tensor) -> Tensor:
    """Return softmax weights, zeros in a row that sees nothing."""
    top = maximum(scores.amax(dim=-1, keepdim=True), sink)
    top = top.masked_fill(top == _MASKED, 0.0)
    exps = exp(scores - top)
    total = exps.sum(dim=-1, keepdim=True) + exp(sink - top)
    return exps / total.masked_fill(total == 0, 1.0)


def eager(call: CoreCall) -> Tensor:
    """Attend operator by operator in the tensors' dtype, softmax in float32."""
    scores = masked_scores(call, call.q.dtype).float()
    weights = normalised(scores, sink_logits(call, float32)).to(call.v.dtype)
    return weights @ per_query_head(call.v, call.q)


def float32_inside(call: CoreCall) -> Tensor:
    """Attend in float32 and cast once at the end."""
    return _all_in(call, float32)


def float64_inside(call: CoreCall) -> Tensor:
    """Attend in float64 and cast once at the end: more exact than any profile claims."""
    return _all_in(call, float64)


def _all_in(call: CoreCall, wide: dtype) -> Tensor:
    weights = normalised(masked_scores(call, wide), sink_logits(call, wide))
    return (weights @ per_query_head(call.v, call.q).to(wide)).to(call.q.dtype)
