"""Gradients of a subject: by its own backward, or by torch's autograd through its function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conformance.observed import Malformed
from conformance.subjects.base import (
    CoreCall,
    GradientCall,
    LayerCall,
    LayerOutput,
    Subject,
)


def gradients_of(subject: Subject, call: GradientCall) -> Mapping[str, Tensor]:
    """Return a subject's gradients by the name of what they are of.

    Args:
        subject: one with a backward.
        call: the call and the cotangent of its output.

    Raises:
        Malformed: its output has no gradient, though it claims one by autograd.
    """
    if callable(subject.backward):
        return subject.backward(call.forward, call.d_output)
    leaves = {name: t.detach().requires_grad_() for name, t in _differentiated(call.forward)}
    with torch.enable_grad():
        # a subject may write to a cache it is given, which torch forbids of leaves
        returned = subject.function(_with(call.forward, {n: t.clone() for n, t in leaves.items()}))
        output = returned.output if isinstance(returned, LayerOutput) else returned
        if not (isinstance(output, Tensor) and output.requires_grad):
            raise Malformed(
                "output must have a gradient, since backward='autograd' is claimed, got none; is "
                "it detached, or computed under no_grad?"
            )
        found = torch.autograd.grad(output, list(leaves.values()), call.d_output, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


def _differentiated(call: CoreCall | LayerCall) -> list[tuple[str, Tensor]]:
    """Return the tensors of a call that have gradients, with their names."""
    found: dict[str, Tensor | None]
    if isinstance(call, CoreCall):
        found = {"q": call.q, "k": call.k, "v": call.v, "sinks": call.sinks}
    else:
        found = {"hidden_states": call.hidden_states, **call.weights}
        found |= {"k_cache": call.k_cache, "v_cache": call.v_cache}
    return [(name, tensor) for name, tensor in found.items() if tensor is not None]


def _with(call: CoreCall | LayerCall, tensors: Mapping[str, Tensor]) -> CoreCall | LayerCall:
    changed: dict[str, Any] = dict(tensors)
    if isinstance(call, LayerCall):
        changed["weights"] = {name: changed.pop(name) for name in call.weights}
    return replace(call, **changed)
