"""Which features of the layer are certified, and on what inputs.

Inputs are normal numbers with full significands, so that every projection and product rounds.
Layers are small: a bound grows with the terms of a sum, and the roundings of each step show best
where there are few. Long sums are the business of `attend_cases`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from conformance.certify.attention_formula import IntArray
from conformance.certify.layer_formula import LayerCase
from golden import (
    Array,
    AttentionConfig,
    LinearScaling,
    Llama3Scaling,
    QKNorm,
    RopeConfig,
    TemperatureTuning,
    YarnScaling,
    weight_shapes,
)
from golden.rope_config import DynamicNTKScaling, LongRopeScaling, ProportionalScaling

_PLAIN = AttentionConfig(hidden_size=12, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
_ROPE = RopeConfig()
_YARN = YarnScaling(factor=32.0, original_max_position_embeddings=4096)
_LLAMA3 = Llama3Scaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)

_DYNAMIC = DynamicNTKScaling(factor=3.0, original_max_position_embeddings=4096)
_LONG = LongRopeScaling(
    short_factor=(1.0, 1.1, 1.3, 1.7),
    long_factor=(1.1, 2.3, 7.9, 31.0),
    factor=32.0,
    original_max_position_embeddings=4096,
)

FAR = 16_400
"""First position of the far cases, beyond 16,384."""

VERY_FAR = 131_068
"""First position of the farthest case, at the end of YaRN's stretched context."""

_LAYERS: dict[str, dict[str, Any]] = {
    "projections": {},
    "biases": {"qkv_bias": True, "o_bias": True},
    "clip_qkv": {"clip_qkv": 0.8, "qkv_bias": True},
    "softmax_scale": {"softmax_scale": 0.7},
    "softcap": {"softcap": 1.5},
    "sinks": {"learned_sinks_size": 1},
    "sliding window": {"sliding_window": 3},
    "chunks": {"attention_chunk_size": 3},
    "window and sinks": {"sliding_window": 2, "learned_sinks_size": 1},
    "temperature": {"temperature_tuning": TemperatureTuning(floor_scale=2.0, attn_scale=0.5)},
    "RoPE half": {"rope": _ROPE},
    "RoPE interleaved": {"rope": RopeConfig(pairing="interleaved")},
    "RoPE partial": {"rope": RopeConfig(rotary_dim=6)},
    "RoPE linear": {"rope": RopeConfig(scaling=LinearScaling(factor=3.0))},
    "RoPE llama3": {"rope": RopeConfig(theta=500000.0, scaling=_LLAMA3)},
    "RoPE YaRN": {"rope": RopeConfig(theta=150000.0, scaling=_YARN)},
    "RoPE YaRN, ends not rounded": {
        "rope": RopeConfig(theta=150000.0, scaling=replace(_YARN, truncate=False))
    },
    "RoPE YaRN, mscale": {
        "rope": RopeConfig(
            pairing="interleaved", scaling=replace(_YARN, attention_factor=1.3), rotary_dim=4
        )
    },
    "RoPE dynamic NTK": {"rope": RopeConfig(scaling=_DYNAMIC)},
    "RoPE LongRoPE": {"rope": RopeConfig(scaling=_LONG)},
    "RoPE proportional": {
        "rope": RopeConfig(scaling=ProportionalScaling(proportion=0.5, factor=3.0))
    },
    "M-RoPE": {"rope": RopeConfig(mrope_section=(2, 1, 1))},
    "M-RoPE interleaved": {"rope": RopeConfig(mrope_section=(2, 1, 1), mrope_interleaved=True)},
    "RMS norm": {"qk_norm": QKNorm(), "rope": _ROPE},
    "RMS norm, weight offset": {"qk_norm": QKNorm(weight_offset=1.0), "rope": _ROPE},
    "RMS norm after RoPE": {
        "qk_norm": QKNorm(placement="post_rope", weighted=False),
        "rope": _ROPE,
    },
    "RMS norm of the projection": {"qk_norm": QKNorm(scope="projection"), "rope": _ROPE},
    "layer norm": {"qk_norm": QKNorm(kind="layer", eps=1e-5), "rope": _ROPE},
    "layer norm of the projection": {"qk_norm": QKNorm(kind="layer", scope="projection")},
    "everything at once": {
        "qkv_bias": True,
        "o_bias": True,
        "clip_qkv": 2.0,
        "qk_norm": QKNorm(),
        "rope": RopeConfig(theta=150000.0, scaling=_YARN, rotary_dim=6),
        "softcap": 5.0,
        "sliding_window": 4,
        "learned_sinks_size": 1,
        "temperature_tuning": TemperatureTuning(floor_scale=2.0, attn_scale=0.5),
    },
}

_AT: dict[str, int] = {
    "RoPE half": FAR,
    "RoPE llama3": FAR,
    "RoPE YaRN": VERY_FAR,
    "RoPE dynamic NTK": FAR,
    "RoPE LongRoPE": FAR,
    "temperature": FAR,
}
"""Features that are also certified from a far first position on."""


def layer_cases(seed: int) -> dict[str, LayerCase]:
    """Return the cases of the layer by the name of their feature.

    Every feature is context encoding at positions 0, 1, ... with one padded token in the second
    row, and token generation of two tokens over a cache with a free slot; `_AT` adds far ones.
    """
    found: dict[str, LayerCase] = {}
    for index, (feature, fields) in enumerate(_LAYERS.items()):
        config = replace(_PLAIN, **fields)
        inputs = seed * len(_LAYERS) + index
        found[feature] = _encoding(config, inputs)
        found[f"{feature}, decode"] = _generation(config, inputs)
        if feature in _AT:
            found[f"{feature}, from position {_AT[feature]}"] = _encoding(
                config, inputs, first=_AT[feature]
            )
    return found


def drawn(seed: int) -> np.random.Generator:
    """Return the generator of a seed's inputs."""
    return np.random.default_rng([20_260_701, seed])


def _weights(config: AttentionConfig, rng: np.random.Generator) -> Mapping[str, Array]:
    return {
        name: rng.standard_normal(shape) * (1.0 if len(shape) == 1 else shape[-1] ** -0.5)
        for name, shape in weight_shapes(config).items()
    }


def _encoding(config: AttentionConfig, seed: int, *, first: int = 0, length: int = 5) -> LayerCase:
    rng = drawn(seed)
    positions = np.tile(np.arange(first, first + length), (2, 1))
    positions[1, -1] = -1
    return LayerCase(
        config=config,
        weights=_weights(config, rng),
        hidden_states=rng.standard_normal((2, length, config.hidden_size)),
        positions=positions,
        rotary_positions=_axes(config, positions),
    )


def _axes(config: AttentionConfig, positions: IntArray) -> IntArray | None:
    """Return positions of each axis of M-RoPE: time as it is, height and width of their own."""
    if config.rope is None or not config.rope.mrope_section:
        return None
    return np.stack([positions, positions // 2, 3 * positions + 1])


def _generation(config: AttentionConfig, seed: int) -> LayerCase:
    rng = drawn(seed)
    lengths = np.array([3, 4])
    positions = lengths[:, None] + np.arange(2)
    shape = (2, config.num_key_value_heads, 7, config.head_dim)
    return LayerCase(
        config=config,
        weights=_weights(config, rng),
        hidden_states=rng.standard_normal((2, 2, config.hidden_size)),
        positions=positions,
        rotary_positions=_axes(config, positions),
        k_cache=rng.standard_normal(shape),
        v_cache=rng.standard_normal(shape),
        lengths=lengths,
    )
