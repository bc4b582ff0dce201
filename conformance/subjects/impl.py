"""`impl`, the production module for torch-neuronx, as a subject."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import impl
from conformance.cases import Case
from conformance.subjects.base import InputNorm, LayerCall, LayerOutput, subject
from conformance.subjects.impl_serving import Layer, serve, serving_gap
from conformance.subjects.serving import ServeCall, ServeOutput
from golden import (
    AttentionConfig,
    DynamicNTKScaling,
    Eagle3AttentionConfig,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    QKNorm,
    RopeConfig,
    YarnScaling,
)


def unsupported(case: Case) -> str | None:
    """Return what the module does not serve of a case, None if it serves it."""
    config = case.config
    if config.learned_sinks_size is not None and config.attention_chunk_size is not None:
        return "the module refuses learned sinks with chunked attention"
    if isinstance(config, Eagle3AttentionConfig):
        return "the module reads what it writes: no double width of an EAGLE-3 draft"
    rope = config.rope
    scaling = None if rope is None else rope.scaling
    if isinstance(scaling, (DynamicNTKScaling, LongRopeScaling)) and scaling.seq_len:
        return "the module scales RoPE by each row's own length, not by a given one"
    if case.extras.adapters:
        return "the module has no adapters (LoRA)"
    if case.extras.residual:
        return "the module adds no residual"
    if config.temperature_tuning is not None and rope is not None:
        return "the module tunes the temperature of layers without RoPE only"
    return serving_gap(case)


@subject(scope="layer", profile="native", unsupported=unsupported, serves=True)
def attention_layer(call: LayerCall | ServeCall) -> LayerOutput | ServeOutput:
    """Run `NeuronAttentionBase`: a prompt, tokens one after the other, or a schedule."""
    if isinstance(call, ServeCall):
        return serve(call, _served_module, _input_norm(call.input_norm))
    return run_layer(call, build_module)


def run_layer(call: LayerCall, layer: Callable[[LayerCall], Layer]) -> LayerOutput:
    """Run the layer that `layer` makes of a call."""
    module, polar = layer(call)
    with torch.no_grad():
        if call.k_cache is None or call.v_cache is None:
            return _prefill(module, call, polar)
        return _decode(module, call, (call.k_cache, call.v_cache), polar)


def _prefill(
    module: impl.NeuronAttentionBase, call: LayerCall, polar: dict[str, Any]
) -> LayerOutput:
    result = module(
        call.hidden_states,
        attention_mask=call.position_ids >= 0,
        position_ids=call.position_ids,
        rotary_position_ids=call.rotary_position_ids,
        rmsnorm=_input_norm(call.input_norm),
        **polar,
    )
    k, v = result.present_key_value
    return LayerOutput(output=result.hidden_states, k_cache=k, v_cache=v)


def _decode(
    module: impl.NeuronAttentionBase,
    call: LayerCall,
    cache: tuple[torch.Tensor, torch.Tensor],
    polar: dict[str, Any],
) -> LayerOutput:
    manager = impl.KVCacheManager(module.config)
    manager.store(0, cache)
    outputs, norm, rotary = [], _input_norm(call.input_norm), call.rotary_position_ids
    for step in range(call.hidden_states.shape[1]):
        now = slice(step, step + 1)
        result = module(
            call.hidden_states[:, now],
            position_ids=call.position_ids[:, now],
            rotary_position_ids=None if rotary is None else rotary[..., now],
            rmsnorm=norm,
            kv_mgr=manager,
            get_kv_per_layer=True,
            update_kv_per_layer=True,
            idx=0,
            **polar,
        )
        manager.store(0, result.present_key_value)
        outputs.append(result.hidden_states)
    k, v = manager.get_kv_by_layer_id(0)
    return LayerOutput(output=torch.cat(outputs, dim=1), k_cache=k, v_cache=v)


def _input_norm(given: InputNorm | None) -> nn.Module | None:
    if given is None:
        return None
    norm = impl.RMSNorm(given.weight.shape[0], given.eps, dtype=given.weight.dtype)
    norm.load_state_dict({"weight": given.weight})
    return norm


def build_module(call: LayerCall) -> Layer:
    """Build the module of a call, load its weights, and say what each forward needs besides.

    Returns:
        The module in evaluation mode, and keyword arguments for its forward.
    """
    positions = int(call.position_ids.max()) + 1
    return make_module(
        call.config,
        call.weights,
        batch=call.hidden_states.shape[0],
        slots=positions if call.k_cache is None else call.k_cache.shape[2],
        positions=positions,
    )


def _served_module(call: ServeCall, **run: Any) -> Layer:
    slots = call.max_length
    rows = call.cache_rows
    return make_module(call.config, call.weights, batch=rows, slots=slots, positions=slots, **run)


def make_module(
    config: AttentionConfig,
    weights: Mapping[str, torch.Tensor],
    *,
    batch: int,
    slots: int,
    positions: int,
    **run: Any,
) -> Layer:
    """Build a module and load its weights.

    Args:
        config: the layer.
        weights: tensors by the field names of `golden.AttentionWeights`.
        batch: rows.
        slots: longest sequence.
        positions: positions that RoPE must reach.
        **run: other fields of `impl.NeuronConfig`.

    Returns:
        The module in evaluation mode, and keyword arguments for its forward.
    """
    dtype = weights["q_proj"].dtype
    rope_parameters = _rope_parameters(config)
    inference = impl.InferenceConfig(
        neuron_config=impl.NeuronConfig(
            torch_dtype=dtype,
            batch_size=batch,
            seq_len=slots,
            fused_qkv=config.fused_qkv,
            **run,
        ),
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        num_hidden_layers=1,
        rope_parameters=rope_parameters,
    )
    options: dict[str, Any] = {}
    polar: dict[str, Any] = {}
    if config.rope is not None and config.rope.pairing == "interleaved":
        options["rope_theta"] = config.rope.theta
        options["use_scaled_rope"] = config.rope.scaling is not None
        polar["use_polar_compatible_rope"] = True
    elif rope_parameters is not None:
        options["rotary_emb"] = impl.RotaryEmbedding(
            config.head_dim, max_position_embeddings=positions, rope_parameters=rope_parameters
        )
    if config.qk_norm is not None:
        options |= _norm_options(config, config.qk_norm, dtype)
    if config.temperature_tuning is not None:
        options["attn_temperature_tuning"] = True
        options["floor_scale"] = config.temperature_tuning.floor_scale
        options["attn_scale"] = config.temperature_tuning.attn_scale
    module = impl.NeuronAttentionBase(
        inference,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        qkv_bias=config.qkv_bias,
        o_bias=config.o_bias,
        clip_qkv=config.clip_qkv,
        softmax_scale=1.0 / config.softmax_scale,
        attn_logit_softcapping=config.softcap,
        sliding_window=config.sliding_window,
        attention_chunk_size=config.attention_chunk_size,
        learned_sinks_size=config.learned_sinks_size,
        **options,
    )
    module.load_state_dict(_state_dict(config, weights))
    return module.eval(), polar


_CHECKPOINT_NAMES = {
    "q_proj": "q_proj.weight",
    "k_proj": "k_proj.weight",
    "v_proj": "v_proj.weight",
    "o_proj": "o_proj.weight",
    "q_bias": "q_proj.bias",
    "k_bias": "k_proj.bias",
    "v_bias": "v_proj.bias",
    "o_bias": "o_proj.bias",
    "q_norm": "q_norm.weight",
    "k_norm": "k_norm.weight",
    "q_norm_bias": "q_norm.bias",
    "k_norm_bias": "k_norm.bias",
    "sinks": "sinks",
}


def _state_dict(
    config: AttentionConfig, weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the weights under the names of Hugging Face checkpoints."""
    state = {_CHECKPOINT_NAMES[name]: tensor for name, tensor in weights.items()}
    if config.fused_qkv:
        for kind in ("weight", "bias"):
            parts = [state.pop(f"{name}_proj.{kind}", None) for name in "qkv"]
            if parts[0] is not None:
                state[f"qkv_proj.{kind}"] = torch.cat([part for part in parts if part is not None])
    return state


def _norm_options(config: AttentionConfig, norm: QKNorm, dtype: torch.dtype) -> dict[str, Any]:
    placement = impl.QKNormPlacement[norm.placement.upper()]
    per_head = norm.scope == "head"
    post = placement is impl.QKNormPlacement.POST_ROPE
    if norm.kind == "rms" and not norm.weighted and (post or not per_head):
        return {"use_qk_norm": True, "rms_norm_eps": norm.eps, "qk_norm_placement": placement}
    widths = [config.head_dim] * 2 if per_head else [config.q_size, config.kv_size]
    query, key = (_norm_module(norm, width, dtype) for width in widths)
    scope = impl.QKNormScope.HEAD if per_head else impl.QKNormScope.PROJECTION
    return {
        "q_layernorm": query,
        "k_layernorm": key,
        "qk_layernorm_placement": placement,
        "qk_layernorm_scope": scope,
    }


def _norm_module(norm: QKNorm, width: int, dtype: torch.dtype) -> nn.Module:
    if norm.kind == "layer":
        return nn.LayerNorm(width, norm.eps, elementwise_affine=norm.weighted, dtype=dtype)
    if not norm.weighted:
        return impl.L2Norm(norm.eps)
    return impl.RMSNorm(width, norm.eps, weight_offset=norm.weight_offset, dtype=dtype)


def _rope_parameters(config: AttentionConfig) -> dict[str, Any] | None:
    """Return the layer's RoPE as Hugging Face writes it."""
    rope = config.rope
    if rope is None:
        return None
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.mrope_section:
        parameters["mrope_section"] = list(rope.mrope_section)
        parameters["mrope_interleaved"] = rope.mrope_interleaved
    if config.rotary_dim < config.head_dim:
        parameters["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    return parameters | _scaling_parameters(rope)


def _scaling_parameters(rope: RopeConfig) -> dict[str, Any]:
    scaling = rope.scaling
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, ProportionalScaling):
        return {
            "rope_type": "proportional",
            "partial_rotary_factor": scaling.proportion,
            "factor": scaling.factor,
        }
    if isinstance(scaling, DynamicNTKScaling):
        return {
            "rope_type": "dynamic",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    if isinstance(scaling, LongRopeScaling):
        parameters: dict[str, Any] = {
            "rope_type": "longrope",
            "short_factor": list(scaling.short_factor),
            "long_factor": list(scaling.long_factor),
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
        if scaling.attention_factor:
            parameters["attention_factor"] = scaling.attention_factor
        return parameters
    if isinstance(scaling, Llama3Scaling):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    if isinstance(scaling, YarnScaling):
        parameters = {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
        }
        if scaling.attention_factor:
            parameters["attention_factor"] = scaling.attention_factor
        return parameters
    return {}
