"""gpt-oss: sinks and biases everywhere, a short window on even layers, YaRN without rounding."""

from __future__ import annotations

from dataclasses import replace

from conformance.preset_models.record import Preset, repeated
from golden.config import AttentionConfig
from golden.rope_config import RopeConfig, YarnScaling

# OpenAI's own checkpoint fuses q, k and v; the Hugging Face one, which is followed, does not.
_GLOBAL = AttentionConfig(
    hidden_size=2880,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=64,
    qkv_bias=True,
    o_bias=True,
    rope=RopeConfig(
        theta=150000.0,
        scaling=YarnScaling(
            factor=32.0,
            original_max_position_embeddings=4096,
            beta_fast=32.0,
            beta_slow=1.0,
            truncate=False,
        ),
    ),
    learned_sinks_size=1,
)
_LAYERS = {"sliding": replace(_GLOBAL, sliding_window=128), "global": _GLOBAL}
_CODE = (
    "openai/gpt-oss gpt_oss/torch/model.py (even layers slide, window counts the query, "
    "unrounded YaRN)",
    "huggingface/transformers 5.23 models/gpt_oss/modeling_gpt_oss.py",
)

GPT_OSS_20B = Preset(
    name="gpt-oss-20b",
    title="gpt-oss 20B",
    num_hidden_layers=24,
    layers=_LAYERS,
    pattern=repeated(("sliding", "global"), 24),
    sources=(
        "huggingface.co/openai/gpt-oss-20b config.json, vendored in "
        "EchoCog/gpt-oss-20b config.json",
        *_CODE,
    ),
)

GPT_OSS_120B = Preset(
    name="gpt-oss-120b",
    title="gpt-oss 120B",
    num_hidden_layers=36,
    layers=_LAYERS,
    pattern=repeated(("sliding", "global"), 36),
    sources=(
        "huggingface.co/openai/gpt-oss-120b config.json, transcribed in "
        "AI-Hypercomputer/maxtext src/maxtext/configs/models/gpt-oss-120b.yml",
        *_CODE,
    ),
)

PRESETS = (GPT_OSS_20B, GPT_OSS_120B)
