"""From gradients of the heads that attention reads back to hidden states and weights."""

from __future__ import annotations

import numpy as np

from golden.gradients.forward import Pass
from golden.gradients.steps import (
    clip_vjp,
    norm_vjp,
    projection_vjp,
    rotate_vjp,
    temperature_factor,
)
from golden.layer import merge_heads
from golden.stages import Array


def heads_vjp(done: Pass, d_q: Array, d_k: Array, d_v: Array) -> tuple[Array, dict[str, Array]]:
    """Go back through temperature, norm, RoPE, clip, bias and projection, the last step first.

    Args:
        done: the forward pass.
        d_q: `(batch, num_attention_heads, q_len, head_dim)`, BHSD.
        d_k: `(batch, num_key_value_heads, q_len, head_dim)`, BHSD, of this call's keys.
        d_v: like `d_k`.

    Returns:
        Gradient of the hidden states, and gradients of the weights by field name.
    """
    tuning = done.config.temperature_tuning
    if tuning is not None:
        d_q = d_q * temperature_factor(tuning, done.positions)[:, None, :, None]
    d_hidden = np.zeros_like(done.hidden_states)
    found: dict[str, Array] = {}
    for name, d_heads in (("q", d_q), ("k", d_k), ("v", d_v)):
        d_flat = merge_heads(d_heads) if name == "v" else _unrotated(done, name, d_heads, found)
        if done.config.clip_qkv is not None:
            d_flat = clip_vjp(done.stages[f"{name}_proj"], done.config.clip_qkv, d_flat)
        if done.config.qkv_bias:
            found[f"{name}_bias"] = d_flat.sum(axis=(0, 1))
        matrix: Array = getattr(done.weights, f"{name}_proj")
        d_part, found[f"{name}_proj"] = projection_vjp(done.hidden_states, matrix, d_flat)
        d_hidden += d_part
    return d_hidden, found


def _unrotated(done: Pass, name: str, d_heads: Array, found: dict[str, Array]) -> Array:
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
        d_heads = rotate_vjp(d_heads, cos, sin, pairing=rope.pairing)
    if norm is not None and norm.placement == "pre_rope" and norm.scope == "head":
        d_heads = back_through_norm(d_heads)
    d_flat = merge_heads(d_heads)
    if norm is not None and norm.scope == "projection":
        d_flat = back_through_norm(d_flat)
    return d_flat
