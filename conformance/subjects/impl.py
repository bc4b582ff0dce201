"""`impl`, the production module for torch-neuronx, as a subject."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

import impl
from conformance.cases import Case
from conformance.subjects.base import LayerCall, LayerOutput, subject
from conformance.subjects.impl_gradients import layer_gradients
from conformance.subjects.impl_layer import Layer, make_layer
from conformance.subjects.impl_serving import serve
from conformance.subjects.serving import ServeCall, ServeOutput
from golden import (
    DynamicNTKScaling,
    LongRopeScaling,
)


def unsupported(case: Case) -> str | None:
    """Return what the module does not serve of a case, None if it serves it."""
    config = case.config
    if config.learned_sinks_size is not None and config.attention_chunk_size is not None:
        return "the module refuses learned sinks with chunked attention"
    rope = config.rope
    scaling = None if rope is None else rope.scaling
    if isinstance(scaling, (DynamicNTKScaling, LongRopeScaling)) and scaling.seq_len:
        return "the module scales RoPE by each row's own length, not by a given one"
    if config.temperature_tuning is not None and rope is not None:
        return "the module tunes the temperature of layers without RoPE only"
    return None


def gradients(call: LayerCall, d_output: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """Return the gradients of what a call reads, by torch's autograd."""
    return layer_gradients(call, d_output, build_module)


@subject(scope="layer", profile="native", unsupported=unsupported, serves=True, backward=gradients)
def attention_layer(call: LayerCall | ServeCall) -> LayerOutput | ServeOutput:
    """Run `NeuronAttentionBase`: a prompt at once, tokens one after the other, or a schedule."""
    if isinstance(call, ServeCall):
        return serve(call)
    return run_layer(call, build_module)


def run_layer(call: LayerCall, layer: Callable[[LayerCall], Layer]) -> LayerOutput:
    """Run the layer that `layer` makes of a call."""
    module, keywords = layer(call)
    with torch.no_grad():
        if call.k_cache is None or call.v_cache is None:
            return _prefill(module, call, keywords)
        return _decode(module, call, (call.k_cache, call.v_cache), keywords)


def _prefill(
    module: impl.NeuronAttentionBase, call: LayerCall, keywords: dict[str, Any]
) -> LayerOutput:
    result = module(
        call.hidden_states,
        attention_mask=call.position_ids >= 0,
        position_ids=call.position_ids,
        rotary_position_ids=call.rotary_position_ids,
        residual=call.residual,
        adapter_ids=_adapter_ids(call),
        **keywords,
    )
    k, v = result.present_key_value
    return LayerOutput(output=result.hidden_states, k_cache=k, v_cache=v)


def _decode(
    module: impl.NeuronAttentionBase,
    call: LayerCall,
    cache: tuple[torch.Tensor, torch.Tensor],
    keywords: dict[str, Any],
) -> LayerOutput:
    manager = impl.KVCacheManager(module.config)
    manager.store(0, cache)
    outputs, rotary, residual = [], call.rotary_position_ids, call.residual
    for step in range(call.hidden_states.shape[1]):
        now = slice(step, step + 1)
        result = module(
            call.hidden_states[:, now],
            position_ids=call.position_ids[:, now],
            rotary_position_ids=None if rotary is None else rotary[..., now],
            residual=None if residual is None else residual[:, now],
            adapter_ids=_adapter_ids(call),
            kv_mgr=manager,
            get_kv_per_layer=True,
            update_kv_per_layer=True,
            idx=0,
            **keywords,
        )
        manager.store(0, result.present_key_value)
        outputs.append(result.hidden_states)
    k, v = manager.get_kv_by_layer_id(0)
    return LayerOutput(output=torch.cat(outputs, dim=1), k_cache=k, v_cache=v)


def _adapter_ids(call: LayerCall) -> torch.Tensor | None:
    return None if call.adapters is None else call.adapters.ids


def build_module(call: LayerCall) -> Layer:
    """Build the module of a call.

    Returns:
        The module in evaluation mode, and keyword arguments for its forward.
    """
    positions = int(call.position_ids.max()) + 1
    return make_layer(
        call.config,
        call.weights,
        positions=positions,
        run={
            "batch_size": call.hidden_states.shape[0],
            "seq_len": positions if call.k_cache is None else call.k_cache.shape[2],
        },
        model={},
        adapters=call.adapters,
        input_norm=call.input_norm,
    )
