"""PyTorch's own scaled_dot_product_attention as a subject; the shortest example of one."""

from __future__ import annotations

import torch

from conformance.cases import Case
from conformance.subjects.base import CoreCall, subject


def _unsupported(case: Case) -> str | None:
    if case.config.learned_sinks_size is not None:
        return "scaled_dot_product_attention has no learned sinks"
    if case.config.softcap is not None:
        return "scaled_dot_product_attention has no softcap"
    if case.workload.backward and case.dtype != "float32":
        return "PyTorch's CPU kernel adds gradients of keys and values up in 16 bits, by tiles"
    return None


@subject(scope="core", profile="sdpa", unsupported=_unsupported, backward="autograd")
def attention(call: CoreCall) -> torch.Tensor:
    """Attend with SDPA; the mask carries causality, window, chunk and padding."""
    output = torch.nn.functional.scaled_dot_product_attention(
        call.q,
        call.k,
        call.v,
        attn_mask=call.mask,
        scale=call.softmax_scale,
        enable_gqa=call.q.shape[1] != call.k.shape[1],
    )
    # a row that sees nothing is NaN in some of its kernels; the rule here is zeros
    return torch.where(call.mask.any(dim=-1, keepdim=True), output, 0.0)
