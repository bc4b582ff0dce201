"""`impl` with one bug each in its backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import impl.attention_rotary
from conformance.subjects import LayerCall, Subject, load_subject
from conformance.subjects.impl import gradients
from impl.rotation import apply_rotary_pos_emb

Backward = Callable[[LayerCall, Tensor], Mapping[str, Tensor]]


class _TurnsForward(torch.autograd.Function):
    """Rotates, and rotates the gradient the same way instead of back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return apply_rotary_pos_emb(x, x, cos, sin)[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return apply_rotary_pos_emb(upstream, upstream, *ctx.saved_tensors)[0], None, None


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _TurnsForward.apply(q, cos, sin), _TurnsForward.apply(k, cos, sin)


def rope_turns_forward(call: LayerCall, d_output: Tensor) -> Mapping[str, Tensor]:
    """RoPE's backward turns the wrong way."""
    with mock.patch.object(impl.attention_rotary, "apply_rotary_pos_emb", _rotate):
        return gradients(call, d_output)


def bias_over_padding(call: LayerCall, d_output: Tensor) -> Mapping[str, Tensor]:
    """The sum over tokens for the bias of V takes in one row of padding, which holds another's."""
    found = dict(gradients(call, d_output))
    padded = int((call.position_ids < 0).sum())
    if padded and "v_bias" in found:
        tokens = call.position_ids.numel() - padded
        found["v_bias"] = (found["v_bias"].float() * (1.0 + 1.0 / tokens)).to(d_output.dtype)
    return found


def bias_of_one_sequence(call: LayerCall, d_output: Tensor) -> Mapping[str, Tensor]:
    """The output's bias gets the gradient of the batch's first row alone."""
    found = dict(gradients(call, d_output))
    if "o_bias" in found:
        found["o_bias"] = d_output[0].float().sum(dim=0).to(d_output.dtype)
    return found


def broken(backward: Backward) -> Subject:
    """Return `impl` with another backward."""
    return replace(load_subject("impl"), name=backward.__name__, backward=backward)
