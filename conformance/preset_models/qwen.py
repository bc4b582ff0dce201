"""Qwen 2.5 and 3."""

from __future__ import annotations

from conformance.preset_models.record import uniform
from golden.config import AttentionConfig, QKNorm
from golden.rope_config import RopeConfig

_ROPE = RopeConfig(theta=1000000.0)
_QK_NORM = QKNorm(eps=1e-6)

QWEN_2_5_7B = uniform(
    name="qwen2.5-7b",
    title="Qwen2.5 7B",
    num_hidden_layers=28,
    # The configuration names a window of 131072 with use_sliding_window false: there is none.
    layer=AttentionConfig(
        hidden_size=3584,
        num_attention_heads=28,
        num_key_value_heads=4,
        qkv_bias=True,
        rope=_ROPE,
    ),
    sources=(
        "huggingface.co/Qwen/Qwen2.5-7B config.json, transcribed in "
        "Lightning-AI/litgpt litgpt/config.py",
        "AI-Hypercomputer/maxtext src/maxtext/configs/models/qwen2.5-7b.yml",
        "huggingface/transformers 5.23 models/qwen2/modeling_qwen2.py (bias on q, k, v, not o)",
    ),
)

QWEN_3_8B = uniform(
    name="qwen3-8b",
    title="Qwen3 8B",
    num_hidden_layers=36,
    layer=AttentionConfig(
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        qk_norm=_QK_NORM,
        rope=_ROPE,
    ),
    sources=(
        "huggingface.co/Qwen/Qwen3-8B config.json, transcribed in "
        "Lightning-AI/litgpt litgpt/config.py",
        "AI-Hypercomputer/maxtext src/maxtext/configs/models/qwen3-8b.yml",
        "huggingface/transformers 5.23 models/qwen3/modeling_qwen3.py (norm per head, before RoPE)",
    ),
)

QWEN_3_235B_A22B = uniform(
    name="qwen3-235b-a22b",
    title="Qwen3 235B-A22B",
    num_hidden_layers=94,
    layer=AttentionConfig(
        hidden_size=4096,
        num_attention_heads=64,
        num_key_value_heads=4,
        head_dim=128,
        qk_norm=_QK_NORM,
        # MaxText's qwen3-235b-a22b.yml says 5e6, which is the 2507 re-release; this is the first.
        rope=_ROPE,
    ),
    sources=(
        "huggingface.co/Qwen/Qwen3-235B-A22B config.json, transcribed in "
        "Lightning-AI/litgpt litgpt/config.py",
        "zyzshishui/slime scripts/models/qwen3-235B-A22B.sh (theta 1e6)",
        "huggingface/transformers 5.23 models/qwen3_moe/modeling_qwen3_moe.py",
    ),
)

PRESETS = (QWEN_2_5_7B, QWEN_3_8B, QWEN_3_235B_A22B)
