"""The kinds of layer that forward paths are taken through, in golden's words."""

from __future__ import annotations

from typing import Any

import golden
from golden import AttentionConfig, Llama3Scaling, QKNorm, RopeConfig, TemperatureTuning

SIZES = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}


def _layer(**features: Any) -> AttentionConfig:
    return AttentionConfig(**{**SIZES, **features})


_LLAMA3 = Llama3Scaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
_YARN = golden.YarnScaling(factor=4.0, original_max_position_embeddings=16, truncate=False)
_DEEPSEEK = golden.deepseek_yarn_scaling(
    factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.5
)
_LONGROPE = golden.LongRopeScaling(
    short_factor=(1.0, 1.5, 2.0, 2.5),
    long_factor=(1.0, 2.0, 4.0, 8.0),
    factor=4.0,
    original_max_position_embeddings=6,
)
_POLAR = RopeConfig(pairing="interleaved")
LAYERS = {
    "full": _layer(rope=RopeConfig(), learned_sinks_size=1, qkv_bias=True, o_bias=True),
    "window": _layer(rope=RopeConfig(scaling=_YARN), sliding_window=4, qk_norm=QKNorm()),
    "window-polar": _layer(rope=_POLAR, sliding_window=3, learned_sinks_size=1),
    "chunk": _layer(
        rope=_POLAR,
        attention_chunk_size=4,
        qk_norm=QKNorm(placement="post_rope", weighted=False),
    ),
    "nope": _layer(
        num_key_value_heads=6,
        temperature_tuning=TemperatureTuning(floor_scale=4.0, attn_scale=0.5),
        qk_norm=QKNorm(kind="layer", eps=1e-5),
        softcap=5.0,
    ),
    "fused": _layer(
        num_key_value_heads=1,
        fused_qkv=True,
        qkv_bias=True,
        clip_qkv=1.5,
        rope=RopeConfig(rotary_dim=4, scaling=_LLAMA3),
    ),
    "dynamic": _layer(
        rope=RopeConfig(
            scaling=golden.DynamicNTKScaling(factor=2.0, original_max_position_embeddings=4)
        )
    ),
    "flat-norm": _layer(
        qk_norm=QKNorm(scope="projection"),
        rope=RopeConfig(rotary_dim=4, scaling=golden.LinearScaling(factor=2.0)),
    ),
    "unit-norm": _layer(
        qk_norm=QKNorm(scope="projection", weighted=False),
        rope=RopeConfig(scaling=golden.ProportionalScaling(proportion=0.5, factor=2.0)),
    ),
    "longrope": _layer(rope=RopeConfig(scaling=_LONGROPE)),
    "deepseek": _layer(rope=RopeConfig(pairing="interleaved", rotary_dim=4, scaling=_DEEPSEEK)),
    "axes": _layer(rope=RopeConfig(mrope_section=(1, 2, 1))),
    "axes-mixed": _layer(rope=RopeConfig(mrope_section=(2, 1, 1), mrope_interleaved=True)),
    "eagle3": golden.Eagle3AttentionConfig(**SIZES, rope=RopeConfig()),
    "block": _layer(
        fused_qkv=True,
        qkv_bias=True,
        o_bias=True,
        rope=RopeConfig(),
        qk_norm=QKNorm(),
        learned_sinks_size=1,
    ),
}
