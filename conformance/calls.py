"""Turns a case's inputs into what a subject is called with."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch

import golden
from conformance.cases import Case
from conformance.expected import Inputs
from conformance.gradients.inputs import GradientInputs
from conformance.inputs import CoreInputs
from conformance.serve_calls import serve_call
from conformance.serve_inputs import ServeInputs
from conformance.subjects.base import CoreCall, GradientCall, LayerCall
from conformance.subjects.serving import ServeCall
from conformance.tensors import Tensors, whole

Call: TypeAlias = CoreCall | LayerCall | ServeCall | GradientCall


def call_of(case: Case, inputs: Inputs) -> Call:
    """Return what a subject is called with: the case's inputs as tensors of its dtype."""
    tensor = Tensors(getattr(torch, case.dtype))
    if isinstance(inputs, ServeInputs):
        return serve_call(case, inputs, tensor)
    if isinstance(inputs, GradientInputs):
        forward = call_of(case, inputs.forward)
        assert isinstance(forward, CoreCall | LayerCall)
        return GradientCall(forward=forward, d_output=tensor(inputs.d_output))
    if isinstance(inputs, CoreInputs):
        visible = golden.visible_keys(
            golden.layer_mask(case.config), inputs.q_positions, inputs.kv_positions
        )
        return CoreCall(
            q=tensor(inputs.q),
            k=tensor(inputs.k),
            v=tensor(inputs.v),
            mask=torch.from_numpy(np.array(visible)),
            q_positions=torch.from_numpy(inputs.q_positions.copy()),
            kv_positions=torch.from_numpy(inputs.kv_positions.copy()),
            softmax_scale=case.config.softmax_scale,
            softcap=case.config.softcap,
            sinks=tensor.maybe(inputs.sinks),
            sliding_window=case.config.sliding_window,
            attention_chunk_size=case.config.attention_chunk_size,
        )
    return LayerCall(
        config=case.config,
        weights=tensor.weights(case.config, inputs.weights),
        hidden_states=tensor(inputs.hidden_states),
        position_ids=torch.from_numpy(inputs.position_ids.copy()),
        k_cache=tensor.maybe(inputs.k_cache),
        v_cache=tensor.maybe(inputs.v_cache),
        cache_lengths=whole(inputs.cache_lengths),
        adapters=tensor.adapters(inputs.lora),
        input_norm=tensor.input_norm(inputs.input_norm),
        residual=tensor.maybe(inputs.residual),
        rotary_position_ids=whole(inputs.rotary_position_ids),
    )
