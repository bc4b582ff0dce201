"""`impl`'s gradients: autograd through its module, parameters by golden's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from conformance.subjects.base import LayerCall
from conformance.subjects.impl_layer import Layer

_NAMES = {
    "q_proj.weight": "q_proj",
    "k_proj.weight": "k_proj",
    "v_proj.weight": "v_proj",
    "o_proj.weight": "o_proj",
    "q_proj.bias": "q_bias",
    "k_proj.bias": "k_bias",
    "v_proj.bias": "v_bias",
    "o_proj.bias": "o_bias",
    "q_layernorm.weight": "q_norm",
    "k_layernorm.weight": "k_norm",
    "q_layernorm.bias": "q_norm_bias",
    "k_layernorm.bias": "k_norm_bias",
    "learned_sinks.sink": "sinks",
}
"""The end of a parameter's name in the module to the field of `golden.AttentionWeights`."""


def layer_gradients(
    call: LayerCall,
    d_output: Tensor,
    layer: Callable[[LayerCall], Layer],
) -> Mapping[str, Tensor]:
    """Go back from a cotangent of the output to everything the layer read.

    Args:
        call: the call.
        d_output: `(batch, q_len, hidden_size)`, cotangent of the output.
        layer: makes the module of a call.

    Returns:
        Gradients by name, a fused projection's in its parts.
    """
    names = ("hidden_states", *(("k_cache", "v_cache") if call.k_cache is not None else ()))
    read = {name: getattr(call, name).detach().requires_grad_() for name in names}
    module, keywords = layer(call)
    module.requires_grad_(True)
    held = {".".join(name.split(".")[-2:]): p for name, p in module.named_parameters()}
    if "k_cache" in read:  # what a cache manager does with the new keys is not differentiated
        keywords["past_key_value"] = (read["k_cache"], read["v_cache"])
    else:
        keywords["attention_mask"] = call.position_ids >= 0
    with torch.enable_grad():
        output = module(
            read["hidden_states"],
            position_ids=call.position_ids,
            rotary_position_ids=call.rotary_position_ids,
            **keywords,
        ).hidden_states
        found = torch.autograd.grad(output, [*read.values(), *held.values()], d_output)
    gradients: dict[str, Tensor] = dict(zip((*read, *held), found, strict=True))
    sizes = [call.config.q_size, call.config.kv_size, call.config.kv_size]
    for kind, field in (("weight", "proj"), ("bias", "bias")):
        if (fused := gradients.pop(f"Wqkv.{kind}", None)) is not None:
            for name, part in zip("qkv", torch.split(fused, sizes), strict=True):
                gradients[f"{name}_{field}"] = part
    return {_NAMES.get(name, name): gradient for name, gradient in gradients.items()}
