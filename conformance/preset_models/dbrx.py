"""DBRX: clamped, fused projections."""

from __future__ import annotations

from conformance.preset_models.record import uniform
from golden.config import AttentionConfig
from golden.rope_config import RopeConfig

DBRX = uniform(
    name="dbrx",
    title="DBRX",
    num_hidden_layers=40,
    layer=AttentionConfig(
        hidden_size=6144,
        num_attention_heads=48,
        num_key_value_heads=8,
        fused_qkv=True,
        clip_qkv=8.0,
        # attn_config.rope_theta. The rotary embedding of transformers 5.23 reads a field of the
        # outer configuration instead and falls back to 1e4 when given the published file.
        rope=RopeConfig(theta=500000.0),
    ),
    sources=(
        "huggingface.co/databricks/dbrx-base config.json, quoted in "
        "github.com/ggml-org/llama.cpp/issues/6344 (width, clip_qkv, kv_n_heads, rope_theta)",
        "github.com/ggml-org/llama.cpp/pull/6515 (GGUF metadata: layers, heads)",
        "huggingface/transformers 5.23 models/dbrx/modeling_dbrx.py (rows q, k, v; no bias; "
        "clamp before the split)",
    ),
)

PRESETS = (DBRX,)
