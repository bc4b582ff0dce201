"""Gemma 3: five windowed layers to one global, each kind with its own RoPE base; no softcap."""

from __future__ import annotations

from dataclasses import replace

from conformance.preset_models.record import Preset, repeated
from golden.config import AttentionConfig, QKNorm
from golden.rope_config import LinearScaling, RopeConfig

_CODE = (
    "huggingface/transformers 5.23 models/gemma3/modeling_gemma3.py (1 + w norm per head before "
    "RoPE, scale) and models/gemma3/configuration_gemma3.py (thetas, eps, pattern)"
)


def _gemma3(
    *,
    name: str,
    title: str,
    num_hidden_layers: int,
    hidden_size: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    query_pre_attn_scalar: int,
    sources: tuple[str, ...],
) -> Preset:
    global_layer = AttentionConfig(
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        qk_norm=QKNorm(eps=1e-6, weight_offset=1.0),
        # MaxText's conversion table says theta 1e4 here; its own yml, the 27B configuration and
        # the transformers default say 1e6.
        rope=RopeConfig(theta=1000000.0, scaling=LinearScaling(factor=8.0)),
        softmax_scale=float(query_pre_attn_scalar) ** -0.5,
    )
    sliding_layer = replace(global_layer, rope=RopeConfig(theta=10000.0), sliding_window=1024)
    return Preset(
        name=name,
        title=title,
        num_hidden_layers=num_hidden_layers,
        layers={"sliding": sliding_layer, "global": global_layer},
        pattern=repeated(("sliding",) * 5 + ("global",), num_hidden_layers),
        sources=sources,
    )


GEMMA_3_4B = _gemma3(
    name="gemma-3-4b",
    title="Gemma 3 4B",
    num_hidden_layers=34,
    hidden_size=2560,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    query_pre_attn_scalar=256,
    sources=(
        "huggingface.co/google/gemma-3-4b-it config.json (which leaves the heads to the class "
        "defaults), as described in github.com/ddalcu/mlx-serve/pull/46",
        "AI-Hypercomputer/maxtext src/maxtext/configs/models/gemma3-4b.yml and "
        "src/maxtext/checkpoint_conversion/utils/hf_model_configs.py (query_pre_attn_scalar)",
        _CODE,
    ),
)

GEMMA_3_27B = _gemma3(
    name="gemma-3-27b",
    title="Gemma 3 27B",
    num_hidden_layers=62,
    hidden_size=5376,
    num_attention_heads=32,
    num_key_value_heads=16,
    head_dim=128,
    query_pre_attn_scalar=168,  # hidden_size / num_attention_heads, not head_dim
    sources=(
        "huggingface.co/google/gemma-3-27b-it config.json, vendored in "
        "aws-neuron/neuronx-distributed-inference "
        "contrib/models/gemma3-vision/test/assets/gemma3_27b_config.json",
        _CODE,
    ),
)

PRESETS = (GEMMA_3_4B, GEMMA_3_27B)
