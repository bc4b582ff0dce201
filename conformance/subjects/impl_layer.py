"""Builds `NeuronAttentionBase` from a layer of golden's words."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import nn

import impl
from conformance.subjects.base import Adapters, InputNorm
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

Layer: TypeAlias = tuple[impl.NeuronAttentionBase, dict[str, Any]]
"""A module, and keyword arguments for its forward."""


def make_layer(
    config: AttentionConfig,
    weights: Mapping[str, torch.Tensor],
    *,
    positions: int,
    run: Mapping[str, Any],
    model: Mapping[str, Any],
    adapters: Adapters | None = None,
    input_norm: InputNorm | None = None,
    layer: Mapping[str, Any] = MappingProxyType({}),
) -> Layer:
    """Build the module of a layer, load its weights, and say what each forward needs besides.

    Args:
        config: the layer.
        weights: its tensors by the field names of `golden.AttentionWeights`.
        positions: that it must reach.
        run: fields of `impl.NeuronConfig` besides dtype and fusion.
        model: fields of `impl.InferenceConfig` that give the cache its kind.
        adapters: low-rank adapters to load.
        input_norm: norm of the input, which the module applies where its QKV kernel would.
        layer: further arguments of `impl.NeuronAttentionBase`.

    Returns:
        The module in evaluation mode, and keyword arguments for its forward.
    """
    dtype = weights["q_proj"].dtype
    rope_parameters = _rope_parameters(config)
    drafts = isinstance(config, Eagle3AttentionConfig)
    inference = impl.InferenceConfig(
        neuron_config=impl.NeuronConfig(
            torch_dtype=dtype,
            fused_qkv=config.fused_qkv,
            is_eagle_draft=drafts,
            is_eagle3=drafts,
            qkv_kernel_enabled=input_norm is not None,
            lora_config=None if adapters is None else _lora_config(adapters),
            **run,
        ),
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        num_hidden_layers=1,
        rope_parameters=rope_parameters,
        **model,
    )
    options: dict[str, Any] = {**layer}
    keywords: dict[str, Any] = {}
    if config.rope is not None and config.rope.pairing == "interleaved":
        options["rope_theta"] = config.rope.theta
        options["use_scaled_rope"] = config.rope.scaling is not None
        keywords["use_polar_compatible_rope"] = True
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
    if adapters is not None:
        _load_adapters(module, adapters)
    if input_norm is not None:
        keywords["rmsnorm"] = _norm_of_input(input_norm)
    return module.eval(), keywords


def _lora_config(adapters: Adapters) -> impl.LoraServingConfig:
    count, rank, _ = adapters.down["q"].shape
    return impl.LoraServingConfig(max_loras=count, max_lora_rank=rank)


def _load_adapters(module: impl.NeuronAttentionBase, adapters: Adapters) -> None:
    """Load adapters as checkpoints name them; their scaling is `lora_alpha / rank`."""
    assert module.lora is not None
    for index, scaling in enumerate(adapters.scaling.tolist()):
        state = {}
        for name in adapters.down:
            state[f"{name}_proj.lora_A.weight"] = adapters.down[name][index]
            state[f"{name}_proj.lora_B.weight"] = adapters.up[name][index]
        rank = adapters.down["q"].shape[1]
        module.lora.load_adapter(index, state, lora_alpha=scaling * rank)


def _norm_of_input(given: InputNorm) -> nn.Module:
    norm = impl.RMSNorm(given.weight.shape[0], given.eps, dtype=given.weight.dtype)
    norm.load_state_dict({"weight": given.weight})
    return norm


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


class _LayerNorm(nn.LayerNorm):
    """A layer norm whose gradients of weight and bias are summed in float32 and rounded once.

    Torch's own sums them over the tokens in the tensors' dtype on CPU.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        weight, bias = (None if p is None else p.to(wide) for p in (self.weight, self.bias))
        shape = list(self.normalized_shape)
        normed = nn.functional.layer_norm(x.to(wide), shape, weight, bias, self.eps)
        return normed.to(x.dtype)


def _norm_module(norm: QKNorm, width: int, dtype: torch.dtype) -> nn.Module:
    if norm.kind == "layer":
        return _LayerNorm(width, norm.eps, elementwise_affine=norm.weighted, dtype=dtype)
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
