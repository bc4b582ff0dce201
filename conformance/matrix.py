"""Which cases a tier holds: features one by one, the attention core, and published layers.

The `features` suite changes one thing at a time from a plain layer, so a red row names the culprit;
the few pairs it holds are rows of their own. Lengths sit off tile edges, batches hold two rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from conformance import presets
from conformance.cases import DTYPES, REGIMES, Case, Workload
from conformance.errors import UsageError
from conformance.extras import NO_EXTRAS, Extras
from conformance.gradients.cases import gradient_cases
from conformance.serve_matrix import serving_cases
from conformance.tiers import checked_tier
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
    TemperatureTuning,
    YarnScaling,
    deepseek_yarn_scaling,
    yarn_mscale,
)

_REGIMES = {"smoke": REGIMES[:1], "standard": REGIMES, "full": REGIMES}
_SEEDS = {"smoke": 1, "standard": 1, "full": 3}

_PLAIN = AttentionConfig(hidden_size=256, num_attention_heads=8, num_key_value_heads=8, head_dim=32)
_ROPE = RopeConfig()
_LLAMA3 = Llama3Scaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
_YARN = YarnScaling(factor=32.0, original_max_position_embeddings=4096, truncate=False)
_DEEPSEEK = deepseek_yarn_scaling(
    factor=40.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=0.707
)
_DYNAMIC = DynamicNTKScaling(factor=4.0, original_max_position_embeddings=64)
_LONGROPE = LongRopeScaling(
    short_factor=tuple(1.0 + pair / 16 for pair in range(16)),
    long_factor=tuple(1.0 + pair for pair in range(16)),
    factor=4.0,
    original_max_position_embeddings=64,
)
_PROMPT = Workload(phase="cte", lengths=(97, 97))
_DECODE = Workload(phase="tkg", lengths=(80, 80), steps=3)
_FAR = 16400

_CORE_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 2},
    {"num_attention_heads": 7, "num_key_value_heads": 1},
    {"num_attention_heads": 14, "num_key_value_heads": 2},
    {"sliding_window": 1},
    {"sliding_window": 16},
    {"sliding_window": 97},
    {"attention_chunk_size": 32},
    {"learned_sinks_size": 1},
    {"softcap": 20.0},
    {"softmax_scale": 0.25},
    {"learned_sinks_size": 1, "sliding_window": 16},
    {"learned_sinks_size": 1, "num_key_value_heads": 2},
)

_LAYER_VARIANTS: tuple[dict[str, Any], ...] = (
    *_CORE_VARIANTS,
    {"qkv_bias": True},
    {"o_bias": True},
    {"fused_qkv": True},
    {"fused_qkv": True, "qkv_bias": True},
    {"clip_qkv": 1.5},
    {"rope": _ROPE},
    {"rope": RopeConfig(pairing="interleaved")},
    {"rope": RopeConfig(rotary_dim=16)},
    {"rope": RopeConfig(scaling=LinearScaling(factor=8.0))},
    {"rope": RopeConfig(theta=500000.0, scaling=_LLAMA3)},
    {"rope": RopeConfig(theta=150000.0, scaling=_YARN)},
    {"rope": _ROPE, "qkv_bias": True},
    {"rope": _ROPE, "num_key_value_heads": 2},
    {"rope": _ROPE, "sliding_window": 16},
    {"rope": RopeConfig(pairing="interleaved"), "sliding_window": 16},
    {"rope": RopeConfig(pairing="interleaved"), "attention_chunk_size": 32},
    {"qk_norm": QKNorm()},
    {"qk_norm": QKNorm(kind="layer", eps=1e-5)},
    {"qk_norm": QKNorm(placement="post_rope", weighted=False), "rope": _ROPE},
    {"qk_norm": QKNorm(weight_offset=1.0), "rope": _ROPE},
    {"qk_norm": QKNorm(scope="projection", weighted=False)},
    {"temperature_tuning": TemperatureTuning(floor_scale=16.0, attn_scale=0.5)},
    {
        "rope": RopeConfig(
            scaling=DynamicNTKScaling(factor=4.0, original_max_position_embeddings=64)
        )
    },
    {"rope": RopeConfig(scaling=_LONGROPE)},
    {"rope": RopeConfig(scaling=ProportionalScaling(proportion=0.5))},
    {
        "rope": RopeConfig(pairing="interleaved", scaling=_DEEPSEEK),
        "softmax_scale": 32**-0.5 * yarn_mscale(40.0, 0.707) ** 2,
    },
    {"rope": RopeConfig(mrope_section=(4, 6, 6))},
    {"rope": RopeConfig(mrope_section=(6, 5, 5), mrope_interleaved=True)},
)

_EXTRAS = (
    Extras(adapters=2, rank=4),
    Extras(input_norm=True),
    Extras(input_norm=True, residual=True),
)


def feature_cases(tier: str) -> list[Case]:
    """Return the layers that change one thing at a time, prefill and decode."""
    layers = [replace(_PLAIN, **_whole(variant)) for variant in _LAYER_VARIANTS]
    layers.append(
        Eagle3AttentionConfig(
            hidden_size=256, num_attention_heads=8, num_key_value_heads=8, head_dim=32
        )
    )
    pairs = list(itertools.product(layers, (_PROMPT, _DECODE)))
    rope = replace(_PLAIN, rope=_ROPE)
    llama3 = replace(_PLAIN, rope=RopeConfig(theta=500000.0, scaling=_LLAMA3))
    pairs += [
        (_PLAIN, Workload(phase="cte", lengths=(97, 33, 1))),
        (_PLAIN, Workload(phase="tkg", lengths=(80, 17, 0), steps=3)),
        (rope, Workload(phase="cte", lengths=(33, 33), start=_FAR)),
        (llama3, Workload(phase="cte", lengths=(33, 33), start=_FAR)),
        (llama3, Workload(phase="tkg", lengths=(_FAR,), steps=2)),
    ]
    three_rows = (
        Workload(phase="cte", lengths=(97, 33, 1)),
        Workload(phase="tkg", lengths=(80, 17, 0), steps=3),
    )
    brought = [
        case
        for extras in _EXTRAS
        for work in three_rows
        for case in _spread([(_PLAIN, work)], tier, "layer", extras)
    ]
    return _spread(pairs, tier, "layer") + brought


def core_cases(tier: str) -> list[Case]:
    """Return cases for attention kernels, from q, k and v to the attention output."""
    layers = [replace(_PLAIN, **_whole(variant)) for variant in _CORE_VARIANTS]
    one_step = replace(_DECODE, steps=1)
    pairs = list(itertools.product(layers, (_PROMPT, one_step)))
    window = replace(_PLAIN, sliding_window=16)
    pairs += [(_PLAIN, Workload(phase="cte", lengths=(length,))) for length in (1, 127, 128, 129)]
    pairs += [
        (_PLAIN, Workload(phase="cte", lengths=(97, 33, 1))),
        (_PLAIN, Workload(phase="tkg", lengths=(80, 17, 0))),
        (_PLAIN, Workload(phase="cte", lengths=(33, 33), prior=64)),
        (window, Workload(phase="cte", lengths=(33, 33), prior=64)),
        (_PLAIN, Workload(phase="tkg", lengths=(2050,))),
    ]
    return _spread(pairs, tier, "core")


def _whole(variant: dict[str, Any]) -> dict[str, Any]:
    """Let the hidden size and the softmax scale follow a changed geometry."""
    heads = variant.get("num_attention_heads", _PLAIN.num_attention_heads)
    kv_heads = min(variant.get("num_key_value_heads", heads), heads)
    return {"num_key_value_heads": kv_heads, **variant}


def _spread(
    pairs: Iterable[tuple[AttentionConfig, Workload]],
    tier: str,
    scope: Any,
    extras: Extras = NO_EXTRAS,
) -> list[Case]:
    return [
        Case(
            config=config,
            workload=work,
            dtype=dtype,
            regime=regime,
            seed=seed,
            scope=scope,
            extras=extras,
        )
        for config, work in pairs
        for dtype in DTYPES
        for regime in _REGIMES[checked_tier(tier)]
        for seed in range(_SEEDS[tier])
    ]


_SMOKE_HIDDEN = 256
_SCORES_LIMIT = {"smoke": 0, "standard": 12_000_000, "full": 64_000_000}
"""Largest number of scores for which a prompt is made longer than the window it should show."""


def preset_cases(tier: str, names: Iterable[str] = ()) -> list[Case]:
    """Return every kind of layer of published models, prefill and decode.

    Head counts, head_dim, windows and chunks are the published ones. The smoke tier cuts the
    hidden size to 256 and stays with bfloat16. Decode sits just past the window or across the
    chunk's edge.

    Args:
        tier: one of `TIERS`.
        names: presets to keep; empty keeps all.

    Raises:
        PresetError: a name is unknown.
    """
    chosen = [presets.preset(name) for name in names] or list(presets.PRESETS.values())
    dtypes = ("bfloat16",) if checked_tier(tier) == "smoke" else DTYPES
    regimes = {"smoke": ("gaussian",), "standard": ("gaussian", "peaked"), "full": REGIMES}[tier]
    return [
        Case(
            config=replace(config, hidden_size=_SMOKE_HIDDEN) if tier == "smoke" else config,
            workload=work,
            dtype=dtype,
            regime=regime,
            model=model.name,
            layer=kind,
        )
        for model in chosen
        for kind, config in model.layers.items()
        for work in _preset_workloads(config, tier)
        for dtype in dtypes
        for regime in (regimes if dtype == "bfloat16" else regimes[:1])
    ]


def _preset_workloads(config: AttentionConfig, tier: str) -> Iterator[Workload]:
    window, chunk = config.sliding_window, config.attention_chunk_size
    if chunk is not None:
        yield Workload(phase="cte", lengths=(129,), start=chunk - 64)
        yield Workload(phase="tkg", lengths=(chunk - 1,), steps=3)
        return
    length = 161 if window is None or window < 161 else window + 17
    if config.num_attention_heads * length**2 > max(_SCORES_LIMIT[tier], 64 * 161**2):
        length = 161
    yield Workload(phase="cte", lengths=(length,))
    past = 300 if window is None else window + 3
    yield Workload(phase="tkg", lengths=(past, past // 3), steps=2)


def cases_for(tier: str, suite: str) -> list[Case]:
    """Return the cases of a suite at a tier.

    Args:
        tier: one of `TIERS`.
        suite: `features`, `serving`, `core`, `gradients` or `presets`.

    Raises:
        UsageError: no such tier or suite.
    """
    builders = {
        "features": feature_cases,
        "serving": serving_cases,
        "core": core_cases,
        "gradients": gradient_cases,
        "presets": preset_cases,
    }
    if suite not in builders:
        raise UsageError(f"suite must be one of {', '.join(builders)}, got {suite!r}")
    return builders[suite](checked_tier(tier))
