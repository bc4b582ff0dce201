"""Which backward cases a tier holds: scope `core` for kernels, scope `layer` for layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from conformance.cases import DTYPES, REGIMES, Case, Scope, Workload
from conformance.tiers import checked_tier
from golden import (
    AttentionConfig,
    Llama3Scaling,
    QKNorm,
    RopeConfig,
    TemperatureTuning,
    YarnScaling,
)

_PLAIN = AttentionConfig(hidden_size=128, num_attention_heads=4, num_key_value_heads=4, head_dim=32)
_ROPE = RopeConfig()
_POLAR = RopeConfig(pairing="interleaved")
_YARN = YarnScaling(factor=32.0, original_max_position_embeddings=4096, truncate=False)
_LLAMA3 = Llama3Scaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)

_CORE: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 2},
    {"num_key_value_heads": 1},
    {"sliding_window": 8},
    {"attention_chunk_size": 16},
    {"learned_sinks_size": 1},
    {"softcap": 20.0},
    {"softmax_scale": 0.25},
    {"learned_sinks_size": 1, "num_key_value_heads": 2},
    {"learned_sinks_size": 1, "sliding_window": 8},
)
# a bias of keys without RoPE moves all scores of a row alike: its gradient is zero
_LAYER: tuple[dict[str, Any], ...] = (
    {"learned_sinks_size": 1, "num_key_value_heads": 2},
    {"sliding_window": 8, "rope": _ROPE},
    {"attention_chunk_size": 16, "rope": _POLAR},
    {"softcap": 20.0},
    {"qkv_bias": True, "o_bias": True, "rope": _ROPE},
    {"fused_qkv": True, "qkv_bias": True, "rope": _ROPE},
    {"clip_qkv": 1.5},
    {"rope": _ROPE, "num_key_value_heads": 2},
    {"rope": RopeConfig(rotary_dim=16)},
    {"qk_norm": QKNorm()},
    {"qk_norm": QKNorm(weight_offset=1.0), "rope": _ROPE},
    {"qk_norm": QKNorm(kind="layer", eps=1e-5), "rope": _ROPE},
    {"qk_norm": QKNorm(placement="post_rope", weighted=False), "rope": _ROPE},
    {"qk_norm": QKNorm(scope="projection"), "rope": _ROPE},
    {"temperature_tuning": TemperatureTuning(floor_scale=8.0, attn_scale=0.5)},
)

# scalings change the angles, which are constants of the backward pass
_SCALED: tuple[dict[str, Any], ...] = (
    {"rope": RopeConfig(theta=500000.0, scaling=_LLAMA3)},
    {"rope": RopeConfig(theta=150000.0, scaling=_YARN)},
)

_PROMPT = {"smoke": 33, "standard": 61, "full": 129}
_REGIMES = {"smoke": REGIMES[:1], "standard": REGIMES[:3], "full": REGIMES}


def gradient_cases(tier: str) -> list[Case]:
    """Return the backward cases of a tier, those of both scopes.

    Prefill of two rows, one of them padded in the plain layer's case, and one step of decode.
    """
    length = _PROMPT[checked_tier(tier)]
    prompt = Workload(phase="cte", lengths=(length,) * 2, backward=True)
    padded = Workload(phase="cte", lengths=(length, length // 3), backward=True)
    step = Workload(phase="tkg", lengths=(length - 3,) * 2, backward=True)
    found = list(_over(_CORE, (prompt,), tier, "core"))
    found += _over(({},), (padded, step), tier, "core")
    if tier == "smoke":
        found += _over(_LAYER, (prompt,), tier, "layer")
        found += _over(_LAYER[:3], (step,), tier, "layer")
    else:
        found += _over((*_LAYER, *_SCALED), (prompt, step), tier, "layer")
    found += _over(({},), (padded, step), tier, "layer")
    return found


def _over(
    variants: tuple[dict[str, Any], ...], works: tuple[Workload, ...], tier: str, scope: Scope
) -> Iterator[Case]:
    for variant in variants:
        for work in works:
            for dtype in DTYPES:
                for regime in _REGIMES[tier]:
                    config = replace(_PLAIN, **variant)
                    yield Case(
                        config=config, workload=work, dtype=dtype, regime=regime, scope=scope
                    )
