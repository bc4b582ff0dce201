"""Mistral and Mixtral."""

from __future__ import annotations

from conformance.preset_models.record import uniform
from golden.config import AttentionConfig
from golden.rope_config import RopeConfig

_MISTRAL_CODE = "huggingface/transformers 5.23 models/mistral/modeling_mistral.py"

MISTRAL_7B = uniform(
    name="mistral-7b",
    title="Mistral 7B v0.1",
    num_hidden_layers=32,
    layer=AttentionConfig(
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=8,
        # MaxText's mistral-7b.yml says 1e6 and no window: that is v0.2 and later.
        rope=RopeConfig(theta=10000.0),
        sliding_window=4096,
    ),
    sources=(
        "huggingface.co/mistralai/Mistral-7B-v0.1 config.json, transcribed in "
        "Lightning-AI/litgpt litgpt/config.py (geometry, window)",
        "aws-neuron/neuronx-distributed-inference test/integration/tp32/models/mistral/7b/"
        "mistral_7b_0.1_4L_config.json (theta; its sizes are reduced)",
        "huggingface/transformers 5.23 models/mistral/configuration_mistral.py (defaults are v0.1)",
        "huggingface/transformers 5.23 masking_utils.py (window counts the query)",
        _MISTRAL_CODE,
    ),
)

MISTRAL_NEMO = uniform(
    name="mistral-nemo",
    title="Mistral Nemo Base 2407",
    num_hidden_layers=40,
    layer=AttentionConfig(
        hidden_size=5120,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rope=RopeConfig(theta=1000000.0),
    ),
    sources=(
        "huggingface.co/mistralai/Mistral-Nemo-Base-2407 config.json, copied in "
        "kevinstephano/thunder_model_blocks thunder_model_blocks/mistral/mistral_config.py",
        _MISTRAL_CODE,
    ),
)

MIXTRAL_8X7B = uniform(
    name="mixtral-8x7b",
    title="Mixtral 8x7B v0.1",
    num_hidden_layers=32,
    layer=AttentionConfig(
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope=RopeConfig(theta=1000000.0),
    ),
    sources=(
        "huggingface.co/mistralai/Mixtral-8x7B-v0.1 config.json, transcribed in "
        "Lightning-AI/litgpt litgpt/config.py (geometry, theta, no window)",
        "AI-Hypercomputer/maxtext src/maxtext/configs/models/mixtral-8x7b.yml",
        "huggingface/transformers 5.23 models/mixtral/configuration_mixtral.py and "
        "models/mixtral/modeling_mixtral.py",
    ),
)

PRESETS = (MISTRAL_7B, MISTRAL_NEMO, MIXTRAL_8X7B)
