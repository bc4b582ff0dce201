"""Hidden states to heads: projection, clip, norm, split and RoPE, in the order of the module."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from golden.arrays import Positions, as_float64, as_positions
from golden.config import AttentionConfig, QKNorm
from golden.errors import ConfigError, ShapeError
from golden.lora import Lora
from golden.norms import normalise
from golden.rope import rope_cos_sin, rotate
from golden.stages import Accumulation, Array, Observer, unobserved
from golden.weights import AttentionWeights


class Projected(NamedTuple):
    """Products of the hidden states with the three projections, before bias and observers.

    Attributes:
        q: `(batch, q_len, num_attention_heads * head_dim)`, float64.
        k: `(batch, q_len, num_key_value_heads * head_dim)`, float64.
        v: like `k`.
        accumulations: how each of the three was summed.
    """

    q: Array
    k: Array
    v: Array
    accumulations: tuple[Accumulation, Accumulation, Accumulation]


def project_qkv(
    config: AttentionConfig,
    weights: AttentionWeights,
    hidden_states: Any,
    *,
    lora: Lora | None = None,
    observe: Observer = unobserved,
) -> Projected:
    """Multiply the hidden states with the three projections.

    Args:
        config: the layer.
        weights: its arrays.
        hidden_states: `(batch, q_len, hidden_size)`; `2 * hidden_size` wide for an EAGLE-3 draft.
        lora: adapters on the projections, None for none.
        observe: sees and may change the stages of the adapters.

    Raises:
        ShapeError: `hidden_states` does not fit.
    """
    hidden = as_float64(
        "hidden_states",
        hidden_states,
        (None, None, config.input_size),
        "(batch, q_len, hidden_size)",
    )
    q, q_sum = product(hidden, weights.q_proj)
    k, k_sum = product(hidden, weights.k_proj)
    v, v_sum = product(hidden, weights.v_proj)
    if lora is not None:
        q, q_sum = lora.add("q", hidden, q, q_sum, observe)
        k, k_sum = lora.add("k", hidden, k, k_sum, observe)
        v, v_sum = lora.add("v", hidden, v, v_sum, observe)
    return Projected(q, k, v, (q_sum, k_sum, v_sum))


def product(x: Array, weight: Array) -> tuple[Array, Accumulation]:
    """Return `x @ weight.T` and how it was summed."""
    squared: list[Array] = []

    def squares() -> Array:  # kept, since every run of an error model asks for the same array
        if not squared:
            squared.append(np.square(x) @ np.square(weight).T)
        return squared[0]

    def shares() -> Array:
        of_terms = np.square(x).reshape(-1, x.shape[-1]).sum(axis=0) * np.square(weight).sum(axis=0)
        total = float(of_terms.sum())
        even: Array = np.full_like(of_terms, 1.0 / x.shape[-1])
        return of_terms / total if total > 0 else even

    return x @ weight.T, Accumulation(x.shape[-1], squares, shares=shares)


def add_bias(
    name: str,
    value: Array,
    accumulation: Accumulation,
    bias: Array | None,
    observe: Observer,
) -> Array:
    """Add a projection's bias, showing the observer the product and the sum."""
    value = observe(f"{name}_product", value, accumulation)
    return observe(f"{name}_proj", value if bias is None else value + bias)


class Flat(NamedTuple):
    """Projections with bias and clamp, not yet split into heads.

    Attributes:
        q: `(batch, q_len, num_attention_heads * head_dim)`, float64.
        k: `(batch, q_len, num_key_value_heads * head_dim)`, float64.
        v: like `k`.
    """

    q: Array
    k: Array
    v: Array


def layer_heads(
    config: AttentionConfig,
    weights: AttentionWeights,
    projected: Projected,
    positions: Positions,
    observe: Observer,
    rotary_position_ids: Any = None,
) -> tuple[Array, Array, Array]:
    """Turn projections into heads: bias, clip, norm, split, RoPE, in the order of the module.

    Takes, returns and raises what `rotated_heads` does, with `projected` for its `flat`.
    """
    flat = flat_projections(config, weights, projected, observe)
    return rotated_heads(config, weights, flat, positions, observe, rotary_position_ids)


def flat_projections(
    config: AttentionConfig, weights: AttentionWeights, projected: Projected, observe: Observer
) -> Flat:
    """Add the biases and clamp."""
    q_sum, k_sum, v_sum = projected.accumulations
    q = add_bias("q", projected.q, q_sum, weights.q_bias, observe)
    k = add_bias("k", projected.k, k_sum, weights.k_bias, observe)
    v = add_bias("v", projected.v, v_sum, weights.v_bias, observe)
    if config.clip_qkv is not None:
        bound = config.clip_qkv
        q = observe("q_clip", np.clip(q, -bound, bound))
        k = observe("k_clip", np.clip(k, -bound, bound))
        v = observe("v_clip", np.clip(v, -bound, bound))
    return Flat(q, k, v)


def rotated_heads(
    config: AttentionConfig,
    weights: AttentionWeights,
    flat: Flat,
    positions: Positions,
    observe: Observer,
    rotary_position_ids: Any = None,
    whole: tuple[Array, Array] | None = None,
) -> tuple[Array, Array, Array]:
    """Split flat projections into heads and give them norm and RoPE.

    Args:
        config: the layer.
        weights: its arrays.
        flat: projections with bias and clamp.
        positions: `(batch, q_len)`, int64.
        observe: sees and may change each stage.
        rotary_position_ids: positions for RoPE in place of `positions`, `(batch, q_len)` or for
            M-RoPE `(axes, batch, q_len)`, int; None takes `positions`.
        whole: for a norm of scope `projection`, the queries and the keys of which `flat` is one
            rank's part, `(batch, q_len, whole width)`; None means `flat` is whole.

    Returns:
        Queries, keys and values, BHSD, float64.

    Raises:
        ShapeError: `rotary_position_ids` does not fit.
        ConfigError: `rotary_position_ids` for a layer without RoPE.
    """
    q, k, v = flat
    norm = config.qk_norm
    if norm is not None and norm.scope == "projection":
        q, k = _normalise_both(norm, weights, q, k, observe, whole)
    q = split_heads(q, config.num_attention_heads)
    k = split_heads(k, config.num_key_value_heads)
    v = split_heads(v, config.num_key_value_heads)
    if norm is not None and norm.scope == "head" and norm.placement == "pre_rope":
        q, k = _normalise_both(norm, weights, q, k, observe)
    rotary = _rotary_positions(config, positions, rotary_position_ids)
    if config.rope is not None:
        cos, sin = rope_cos_sin(config.rope, config.rotary_dim, rotary, observe=observe)
        pairing = config.rope.pairing
        q = rotate(q, cos, sin, pairing=pairing, observe=observe, name="q")
        k = rotate(k, cos, sin, pairing=pairing, observe=observe, name="k")
    if norm is not None and norm.placement == "post_rope":
        q, k = _normalise_both(norm, weights, q, k, observe)
    if config.temperature_tuning is not None:
        steps = np.floor((positions + 1) / config.temperature_tuning.floor_scale)
        factor = 1.0 + config.temperature_tuning.attn_scale * np.log1p(steps)
        q = observe("q_temperature", q * factor[:, None, :, None])
    return q, observe("k_cache", k), observe("v_cache", v)


def _rotary_positions(config: AttentionConfig, positions: Positions, given: Any) -> Positions:
    if given is None:
        return positions
    if config.rope is None:
        raise ConfigError("rotary_position_ids need a layer with rope, got one without")
    axes = np.asarray(given)
    if axes.ndim != 3:
        return as_positions("rotary_position_ids", axes, (positions.shape[0], positions.shape[1]))
    if axes.dtype.kind not in "iu" or axes.shape[1:] != positions.shape:
        raise ShapeError(
            f"rotary_position_ids must be integers of shape (axes, {positions.shape[0]}, "
            f"{positions.shape[1]}), got {axes.dtype} {axes.shape}"
        )
    return axes.astype(np.int64)


def _normalise_both(
    norm: QKNorm,
    weights: AttentionWeights,
    q: Array,
    k: Array,
    observe: Observer,
    whole: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:
    all_q, all_k = (None, None) if whole is None else whole
    q_parts, k_parts = (weights.q_norm, weights.q_norm_bias), (weights.k_norm, weights.k_norm_bias)
    q = normalise(q, norm, *q_parts, observe=observe, name="q", whole=all_q)
    k = normalise(k, norm, *k_parts, observe=observe, name="k", whole=all_k)
    return q, k


def split_heads(x: Array, heads: int) -> Array:
    """Turn `(batch, length, heads * head_dim)` into `(batch, heads, length, head_dim)`."""
    batch, length, width = x.shape
    return np.ascontiguousarray(x.reshape(batch, length, heads, width // heads).swapaxes(1, 2))


def merge_heads(x: Array) -> Array:
    """Turn `(batch, heads, length, head_dim)` into `(batch, length, heads * head_dim)`."""
    batch, heads, length, width = x.shape
    merged: Array = x.swapaxes(1, 2).reshape(batch, length, heads * width)
    return merged
