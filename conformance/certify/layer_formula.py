"""The layer in tracked arithmetic, written from the formulas of its steps.

Nothing here calls golden's arithmetic; configurations are read as plain data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from conformance.certify.arithmetic import Arithmetic
from conformance.certify.attention_formula import (
    AttentionFormula,
    BoolArray,
    IntArray,
    attention,
    visible_pairs,
)
from conformance.certify.rope_formulas import cos_sin, rotated
from conformance.certify.tracked import Tracked, tracked
from golden import Array, AttentionConfig, QKNorm, TemperatureTuning


def normalised(
    x: Tracked, norm: QKNorm, weight: Tracked | None, bias: Tracked | None
) -> tuple[Tracked, Tracked, Tracked]:
    """Return the norm along the last axis, its unit vector and its scale."""
    if norm.kind == "layer":
        x = x - x.mean()
    scale = ((x * x).mean() + x.like(norm.eps)).inverse_root()
    unit = x * scale
    result = unit
    if weight is not None:
        result = result * (x.like(norm.weight_offset) + weight)
    if bias is not None:
        result = result + bias
    return result, unit, scale


def temperature(tuning: TemperatureTuning, positions: IntArray, of: Tracked) -> Tracked:
    """Return the factor on each query; steps are counted in exact rational arithmetic."""
    floor_scale = Fraction(tuning.floor_scale)
    steps = [[math.floor((int(p) + 1) / floor_scale) for p in row] for row in positions]
    return of.like(1.0) + of.like(tuning.attn_scale) * of.like(steps).log1p()


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCase:
    """What a layer is evaluated on; arrays are float64 and exact.

    Attributes:
        config: the layer.
        weights: arrays by field name of `AttentionWeights`.
        hidden_states: `(batch, q_len, hidden_size)`.
        positions: `(batch, q_len)`, -1 for padding.
        rotary_positions: positions for RoPE alone, `(axes, batch, q_len)`; None takes `positions`.
        k_cache: `(batch, num_key_value_heads, max_length, head_dim)`; None for context encoding.
        v_cache: like `k_cache`.
        lengths: positions that each cache row holds, `(batch,)`; None for context encoding.
    """

    config: AttentionConfig
    weights: Mapping[str, Array]
    hidden_states: Array
    positions: IntArray
    rotary_positions: IntArray | None = None
    k_cache: Array | None = None
    v_cache: Array | None = None
    lengths: IntArray | None = None


@dataclass(slots=True)
class LayerFormula:
    """A layer evaluated, with what its gradient needs.

    Attributes:
        output: `(batch, q_len, hidden_size)`.
        k: keys that attention read, BHSD; of the whole cache in token generation.
        v: likewise.
        visible: `(batch, num_attention_heads, q_len, kv_len)`.
        attention: its evaluation.
        stages: other intermediate values by name.
    """

    output: Tracked
    k: Tracked
    v: Tracked
    visible: BoolArray
    attention: AttentionFormula
    stages: dict[str, Tracked] = field(default_factory=dict)


def layer(case: LayerCase, arithmetic: Arithmetic) -> LayerFormula:
    """Evaluate context encoding, or token generation if the case has a cache."""
    config = case.config
    arrays = {name: tracked(array, arithmetic) for name, array in case.weights.items()}
    stages: dict[str, Tracked] = {"hidden": tracked(case.hidden_states, arithmetic)} | arrays
    turned = case.positions if case.rotary_positions is None else case.rotary_positions
    heads = {name: _projected(config, name, stages, turned, arithmetic) for name in "qkv"}
    q, k, v, key_positions = heads["q"], heads["k"], heads["v"], case.positions
    if config.temperature_tuning is not None:
        factor = temperature(config.temperature_tuning, case.positions, q)[:, None, :, None]
        stages["temperature"] = factor
        q = q * factor
    if case.lengths is not None:
        k, v = (
            _written(tracked(cache, arithmetic), new, case.positions)
            for cache, new in ((case.k_cache, k), (case.v_cache, v))
        )
        slots = np.arange(k.shape[2])
        held = slots < case.lengths[:, None]
        held |= (slots == case.positions[..., None]).any(axis=1)
        key_positions = np.where(held, slots, -1)
    visible = visible_pairs(config, case.positions, key_positions)
    stages["q"] = q
    attended = attention(
        q,
        k,
        v,
        visible,
        scale=config.softmax_scale,
        softcap=config.softcap,
        sinks=arrays.get("sinks"),
    )
    merged = _merged(attended.output)
    output = merged @ arrays["o_proj"].swapaxes(0, 1)
    if config.o_bias:
        output = output + arrays["o_bias"]
    return LayerFormula(output, k, v, visible, attended, stages)


def _projected(
    config: AttentionConfig,
    name: str,
    stages: dict[str, Tracked],
    positions: IntArray,
    arithmetic: Arithmetic,
) -> Tracked:
    """Evaluate projection, bias, clip, norm and rotation of queries, keys or values, BHSD."""
    x = stages["hidden"] @ stages[f"{name}_proj"].swapaxes(0, 1)
    if config.qkv_bias:
        x = x + stages[f"{name}_bias"]
    stages[f"{name}_flat"] = x
    if config.clip_qkv is not None:
        x = x.clip(-config.clip_qkv, config.clip_qkv)
    norm = config.qk_norm if name != "v" else None

    def normalise(value: Tracked) -> Tracked:
        assert norm is not None
        weight, bias = stages.get(f"{name}_norm"), stages.get(f"{name}_norm_bias")
        result, stages[f"{name}_unit"], stages[f"{name}_scale"] = normalised(
            value, norm, weight, bias
        )
        return result

    if norm is not None and norm.scope == "projection":
        x = normalise(x)
    batch, length, width = x.shape
    x = x.reshape(batch, length, width // config.head_dim, config.head_dim).swapaxes(1, 2)
    if norm is not None and norm.scope == "head" and norm.placement == "pre_rope":
        x = normalise(x)
    if config.rope is not None and name != "v":
        cos, sin = cos_sin(config.rope, config.rotary_dim, positions, arithmetic)
        stages["cos"], stages["sin"] = cos, sin
        x = rotated(x, cos, sin, config.rope.pairing)
    if norm is not None and norm.placement == "post_rope":
        x = normalise(x)
    return x


def _merged(x: Tracked) -> Tracked:
    batch, heads, length, width = x.shape
    return x.swapaxes(1, 2).reshape(batch, length, heads * width)


def _written(cache: Tracked, new: Tracked, positions: IntArray) -> Tracked:
    """Return a contiguous cache with this call's keys or values at the slots of their positions."""
    for row, token in np.argwhere(positions >= 0):
        slot = (row, slice(None), positions[row, token])
        cache = cache.replaced(slot, new[row, :, token])
    return cache
