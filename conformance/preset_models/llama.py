"""Llama 3 and 4, and SmolLM2, which is a Llama in all but size."""

from __future__ import annotations

from conformance.preset_models.record import Preset, repeated, uniform
from golden.config import AttentionConfig, QKNorm, TemperatureTuning
from golden.rope_config import Llama3Scaling, RopeConfig

_LLAMA_CODE = "huggingface/transformers 5.23 models/llama/modeling_llama.py"


def _llama3_rope(factor: float) -> RopeConfig:
    return RopeConfig(
        theta=500000.0,
        scaling=Llama3Scaling(
            factor=factor,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    )


LLAMA_3_1_8B = uniform(
    name="llama-3.1-8b",
    title="Llama 3.1 8B",
    num_hidden_layers=32,
    layer=AttentionConfig(
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope=_llama3_rope(8.0),
    ),
    sources=(
        "meta-llama/llama-models models/sku_list.py (geometry, theta, scaled RoPE)",
        "AI-Hypercomputer/maxtext src/maxtext/configs/models/llama3.1-8b.yml (head_dim)",
        # Meta's code has the scaling as constants; the configuration of 3.3 70B spells them out.
        "ai-dynamo/aiconfigurator src/aiconfigurator/model_configs/"
        "meta-llama--Llama-3.3-70B-Instruct_config.json (rope_scaling)",
        _LLAMA_CODE,
    ),
)

LLAMA_3_3_70B = uniform(
    name="llama-3.3-70b",
    title="Llama 3.3 70B Instruct",
    num_hidden_layers=80,
    layer=AttentionConfig(
        hidden_size=8192,
        num_attention_heads=64,
        num_key_value_heads=8,
        rope=_llama3_rope(8.0),
    ),
    sources=(
        "huggingface.co/meta-llama/Llama-3.3-70B-Instruct config.json, vendored in "
        "ai-dynamo/aiconfigurator src/aiconfigurator/model_configs/"
        "meta-llama--Llama-3.3-70B-Instruct_config.json",
        "aws-neuron/neuronx-distributed-inference "
        "test/integration/tp32/models/llama/llama3.3/70b/config.json (head_dim)",
        _LLAMA_CODE,
    ),
)

LLAMA_3_2_1B = uniform(
    name="llama-3.2-1b",
    title="Llama 3.2 1B Instruct",
    num_hidden_layers=16,
    layer=AttentionConfig(
        hidden_size=2048,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        rope=_llama3_rope(32.0),
    ),
    sources=(
        "huggingface.co/meta-llama/Llama-3.2-1B-Instruct config.json, copied in "
        "kevinstephano/thunder_model_blocks thunder_model_blocks/hf_llama/llama_config.py",
        _LLAMA_CODE,
    ),
)

SMOLLM2_135M = uniform(
    name="smollm2-135m",
    title="SmolLM2 135M",
    num_hidden_layers=30,
    layer=AttentionConfig(
        hidden_size=576,
        num_attention_heads=9,
        num_key_value_heads=3,
        rope=RopeConfig(theta=100000.0),
    ),
    sources=(
        "huggingface.co/HuggingFaceTB/SmolLM2-135M config.json, transcribed in "
        "Lightning-AI/litgpt litgpt/config.py and printed in satyasundar/erav3-s13 README.md",
        _LLAMA_CODE,
    ),
)

# First uploads of the configuration said factor 8, high_freq_factor 4, which is also what NxD
# Inference's polar RoPE has built in. Meta corrected both (llama-models pull 322), and both the
# base and the Instruct configuration have said 16 and 1 since; those are taken.
_SCOUT_ROPE = RopeConfig(
    theta=500000.0,
    pairing="interleaved",
    scaling=Llama3Scaling(
        factor=16.0,
        low_freq_factor=1.0,
        high_freq_factor=1.0,
        original_max_position_embeddings=8192,
    ),
)

LLAMA_4_SCOUT = Preset(
    name="llama-4-scout",
    title="Llama 4 Scout 17B-16E",
    num_hidden_layers=48,
    layers={
        "chunked": AttentionConfig(
            hidden_size=5120,
            num_attention_heads=40,
            num_key_value_heads=8,
            head_dim=128,
            # NxD Inference computes with 1e-6: it hands the configured eps to another parameter.
            qk_norm=QKNorm(placement="post_rope", weighted=False, eps=1e-5),
            rope=_SCOUT_ROPE,
            attention_chunk_size=8192,
        ),
        "global": AttentionConfig(
            hidden_size=5120,
            num_attention_heads=40,
            num_key_value_heads=8,
            head_dim=128,
            # Early configurations say attn_temperature_tuning = 4 where later ones leave it on.
            temperature_tuning=TemperatureTuning(floor_scale=8192.0, attn_scale=0.1),
        ),
    },
    pattern=repeated(("chunked", "chunked", "chunked", "global"), 48),
    sources=(
        "huggingface.co/meta-llama/Llama-4-Scout-17B-16E config.json, quoted in "
        "github.com/AMD-AGI/Primus/pull/165",
        "meta-llama/llama-models models/llama4/args.py (RoPE scaling) and models/llama4/model.py "
        "(norm after RoPE and only with RoPE, temperature, chunk, every fourth layer global)",
        "huggingface/transformers 5.23 models/llama4/configuration_llama4.py (floor_scale, "
        "attn_scale, no_rope_layers) and models/llama4/modeling_llama4.py",
    ),
)

PRESETS = (LLAMA_3_1_8B, LLAMA_3_3_70B, LLAMA_3_2_1B, LLAMA_4_SCOUT, SMOLLM2_135M)
