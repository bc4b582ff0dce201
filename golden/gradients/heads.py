"""From gradients of the heads that attention reads back to hidden states and weights."""

from __future__ import annotations

from golden.gradients.forward import Pass
from golden.gradients.steps import (
    Summed,
    bias_vjp,
    clip_vjp,
    norm_vjp,
    projection_vjp,
    rotate_vjp,
    temperature_factor,
)
from golden.layer import merge_heads
from golden.stages import Accumulation, Array, Observer


def heads_vjp(
    done: Pass, d_q: Array, d_k: Array, d_v: Array, observe: Observer
) -> tuple[Array, dict[str, Array]]:
    """Go back through temperature, norm, RoPE, clip, bias and projection, the last step first.

    Args:
        done: the forward pass.
        d_q: `(batch, num_attention_heads, q_len, head_dim)`, BHSD.
        d_k: `(batch, num_key_value_heads, q_len, head_dim)`, BHSD, of this call's keys.
        d_v: like `d_k`.
        observe: sees and may change each stage.

    Returns:
        Gradient of the hidden states, and gradients of the weights by field name.
    """
    tuning = done.config.temperature_tuning
    if tuning is not None:
        factor = temperature_factor(tuning, done.positions)
        d_q = observe("d_q_temperature", d_q * factor[:, None, :, None])
    parts: dict[str, Summed] = {}
    found: dict[str, Array] = {}
    for name, d_heads in (("v", d_v), ("k", d_k), ("q", d_q)):
        if name == "v":
            d_flat = merge_heads(d_heads)
        else:
            d_flat = _unrotated(done, name, d_heads, found, observe)
        if done.config.clip_qkv is not None:
            d_flat = clip_vjp(done.stages[f"{name}_proj"], done.config.clip_qkv, d_flat)
        if done.config.qkv_bias:
            found[f"{name}_bias"] = observe(f"grad_{name}_bias", *bias_vjp(d_flat))
        matrix: Array = getattr(done.weights, f"{name}_proj")
        parts[name], d_matrix = projection_vjp(done.hidden_states, matrix, d_flat)
        found[f"{name}_proj"] = observe(f"grad_{name}_proj", *d_matrix)
    return _hidden_gradient(parts, done.config.fused_qkv, observe), found


def _hidden_gradient(parts: dict[str, Summed], fused: bool, observe: Observer) -> Array:
    """Add up what the projections say of the hidden states: one sum if they are one matrix."""
    if fused:
        return observe(
            "d_hidden_states",
            parts["v"][0] + parts["k"][0] + parts["q"][0],
            Accumulation(
                sum(of.length for _, of in parts.values()),
                lambda: parts["v"][1].squares() + parts["k"][1].squares() + parts["q"][1].squares(),
            ),
        )
    told = {name: observe(f"d_{name}_hidden", *part) for name, part in parts.items()}
    together = observe("d_hidden_sum", told["v"] + told["k"])
    return observe("d_hidden_states", together + told["q"])


def _unrotated(
    done: Pass, name: str, d_heads: Array, found: dict[str, Array], observe: Observer
) -> Array:
    """Go back through norm and RoPE of queries or keys to the flat, clipped projection."""
    norm, rope = done.config.qk_norm, done.config.rope

    def back_through_norm(d_result: Array) -> Array:
        assert norm is not None
        d_x, d_weight, d_bias = norm_vjp(
            norm,
            getattr(done.weights, f"{name}_norm"),
            done.stages[f"{name}_norm_unit"],
            done.stages[f"{name}_norm_scale"],
            d_result,
            observe,
            name,
        )
        if norm.weighted:
            found[f"{name}_norm"] = d_weight
        if norm.weighted and norm.kind == "layer":
            found[f"{name}_norm_bias"] = d_bias
        return d_x

    if norm is not None and norm.placement == "post_rope":
        d_heads = back_through_norm(d_heads)
    if rope is not None:
        cos, sin = done.stages["rope_cos"], done.stages["rope_sin"]
        d_heads = rotate_vjp(d_heads, cos, sin, pairing=rope.pairing, observe=observe, name=name)
    if norm is not None and norm.placement == "pre_rope" and norm.scope == "head":
        d_heads = back_through_norm(d_heads)
    d_flat = merge_heads(d_heads)
    if norm is not None and norm.scope == "projection":
        d_flat = back_through_norm(d_flat)
    return d_flat
