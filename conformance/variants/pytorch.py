"""PyTorch's own attention: SDPA by its math and flash kernels, flex attention, compiled eager."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from conformance.cases import Case
from conformance.subjects.base import CoreCall
from conformance.variants.dense import eager, per_query_head


def no_sink_or_cap(case: Case) -> str | None:
    """Say why SDPA does not take a case."""
    if case.config.learned_sinks_size is not None:
        return "scaled_dot_product_attention has no learned sinks"
    if case.config.softcap is not None:
        return "scaled_dot_product_attention has no softcap"
    return None


def no_sink(case: Case) -> str | None:
    """Say why flex attention does not take a case."""
    if case.config.learned_sinks_size is not None:
        return "flex attention would need a second rounding of its output for a sink"
    return None


def sdpa(backend: SDPBackend) -> Callable[[CoreCall], Tensor]:
    """Return SDPA held to one of its kernels."""

    def kernel(call: CoreCall) -> Tensor:
        k, v = per_query_head(call.k, call.q), per_query_head(call.v, call.q)
        with sdpa_kernel(backend):
            output = scaled_dot_product_attention(
                call.q, k, v, attn_mask=call.mask, scale=call.softmax_scale
            )
        return _zeros_where_nothing_is_seen(call, output)

    return kernel


def flex(call: CoreCall) -> Tensor:
    """Attend with flex attention, which stores scores in the tensors' dtype and not compiled."""
    mask, cap = call.mask[:, 0], call.softcap

    def rule(score: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        if cap is not None:
            score = torch.tanh(score / cap) * cap
        return torch.where(mask[b, row, key], score, float("-inf"))

    grouped = call.q.shape[1] != call.k.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks to be compiled; its eager form is the subject
        output: Any = flex_attention(
            call.q,
            call.k,
            call.v,
            score_mod=rule,
            scale=call.softmax_scale,
            enable_gqa=grouped,
        )
    return _zeros_where_nothing_is_seen(call, output)


def compiled_eager(call: CoreCall) -> Tensor:
    """Attend with the eager kernel as the Inductor compiler fuses it."""
    output: Tensor = _compiled()(call)
    return output


@cache
def _compiled() -> Callable[[CoreCall], Tensor]:
    return torch.compile(eager, dynamic=False)


def _zeros_where_nothing_is_seen(call: CoreCall, output: Tensor) -> Tensor:
    # such a row is NaN in some of PyTorch's kernels and zeros in others
    return torch.where(call.mask.any(dim=-1, keepdim=True), output, 0.0)
