"""Float64 parity with attention layers of Hugging Face Transformers."""

import importlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from impl_layers import ROUNDOFF, relative_error
from torch.overrides import TorchFunctionMode

from impl import (
    InferenceConfig,
    NeuronAttentionBase,
    NeuronConfig,
    QKNormPlacement,
    RMSNorm,
    RotaryEmbedding,
    RotaryFrequencies,
)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers", reason="an oracle that users need not install")

DOUBLE = torch.float64
SEQ_LEN, START = 20, 9000
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 2.5 * i for i in range(8)],
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
}
SIZES = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 4,
    "intermediate_size": 32,
    "vocab_size": 32,
    "max_position_embeddings": 131072,
}


class Float64(TorchFunctionMode):
    """Turns the float32 that Transformers asks for, by name or by default, into float64."""

    def __enter__(self) -> Any:
        torch.set_default_dtype(DOUBLE)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(torch.float32)
        super().__exit__(*error)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.Tensor.float:
            return args[0].double()

        def widen(value: Any) -> Any:
            return DOUBLE if value is torch.float32 else value

        kwargs = {name: widen(value) for name, value in (kwargs or {}).items()}
        return function(*map(widen, args), **kwargs)


def oracle(
    family: str,
    name: str,
    layer_idx: int = 0,
    limit: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    start: int = START,
    **fields: Any,
) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run one attention layer; return its weights, input, mask of what it sees, and output."""
    config_module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config = getattr(config_module, f"{name}Config")(**{**SIZES, **fields})
    config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(0)
    at = (torch.arange(SEQ_LEN) + start).expand(2, SEQ_LEN)
    sees = at[0, :, None] >= at[0]
    if limit is not None:
        sees = sees & limit(at[0, :, None], at[0])
    hidden = torch.randn(2, SEQ_LEN, SIZES["hidden_size"], generator=generator, dtype=DOUBLE)
    with Float64():
        attention = getattr(module, f"{name}Attention")(config, layer_idx).eval().to(DOUBLE)
        rotary = getattr(module, f"{name}RotaryEmbedding")(config=config)
        for parameter_name, parameter in sorted(attention.named_parameters()):
            values = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=DOUBLE)
            parameter.copy_(1 + values if "norm" in parameter_name else values)
        additive = torch.zeros(sees.shape, dtype=DOUBLE)
        additive = additive.masked_fill(~sees, torch.finfo(DOUBLE).min)[None, None]
        output = attention(
            hidden_states=hidden, position_embeddings=rotary(hidden, at), attention_mask=additive
        )[0]
    return attention.state_dict(), hidden, at, output


def ours(
    state: dict[str, torch.Tensor],
    hidden: torch.Tensor,
    at: torch.Tensor,
    call: dict[str, Any] | None = None,
    width: int = SIZES["head_dim"],
    **features: Any,
) -> torch.Tensor:
    config = InferenceConfig(
        neuron_config=NeuronConfig(torch_dtype=DOUBLE, batch_size=2, seq_len=131072),
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=width,
    )
    made = NeuronAttentionBase(config, 48, 6, 2, width, **features)
    made.load_state_dict(state)
    keep = torch.ones(at.shape, dtype=torch.bool)
    return made(hidden, keep, at, **(call or {})).hidden_states


def rope(**parameters: Any) -> RotaryEmbedding:
    return RotaryEmbedding(SIZES["head_dim"], rope_parameters=parameters)


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
        LLAMA3,
        {**LLAMA3, "factor": 32.0, "high_freq_factor": 2.0, "original_max_position_embeddings": 64},
        YARN,
        {**YARN, "truncate": True},
        {**YARN, "original_max_position_embeddings": 64},
        {**YARN, "original_max_position_embeddings": 64, "truncate": True},
        {**YARN, "beta_fast": 2.0, "beta_slow": 2.0},
        {**YARN, "beta_fast": 4.0, "rope_theta": 3.0},
        {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
        {**YARN, "partial_rotary_factor": 0.5},
        {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        {"rope_type": "proportional", "rope_theta": 1e4, "factor": 8.0},
        LONGROPE,
        {**LONGROPE, "factor": None},
    ],
)
def test_frequencies_are_those_of_transformers(parameters: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(**SIZES, rope_parameters=dict(parameters))
    with Float64():
        expected, scaling = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)
    got = RotaryFrequencies.from_parameters(
        SIZES["head_dim"], parameters, max_position_embeddings=SIZES["max_position_embeddings"]
    )
    # A power, two divisions and a blend: each within an ulp or two.
    error = torch.tensor(got.inv_freq, dtype=DOUBLE) - expected
    assert bool((error.abs() <= 16 * 2**-53 * expected.abs()).all())
    assert abs(got.attention_scaling / scaling - 1) < 4 * 2**-53


@pytest.mark.parametrize("start", [0, 3000, START])
def test_lengths_scale_rope_as_in_llama(start: int) -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    for parameters in (dynamic, LONGROPE):
        state, hidden, at, expected = oracle(
            "llama", "Llama", start=start, rope_parameters=parameters, max_position_embeddings=4096
        )
        rotary = RotaryEmbedding(SIZES["head_dim"], 4096, rope_parameters=parameters)
        assert relative_error(ours(state, hidden, at, rotary_emb=rotary), expected) <= ROUNDOFF


@pytest.mark.parametrize(
    ("family", "name", "interleaved"),
    [("qwen2_vl", "Qwen2VL", False), ("qwen3_vl", "Qwen3VLText", True)],
)
def test_multimodal_rope_is_that_of_qwen(family: str, name: str, interleaved: bool) -> None:
    configuration = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    parameters = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": interleaved,
    }
    config_name = name if name.endswith("Text") else f"{name}Text"
    config = getattr(configuration, f"{config_name}Config")(
        **SIZES, rope_parameters=dict(parameters)
    )
    at = torch.randint(0, 20000, (3, 2, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    x = torch.zeros(2, SEQ_LEN, 1, dtype=DOUBLE)
    with Float64():
        expected = getattr(module, f"{name}RotaryEmbedding")(config=config)(x, at)
    for got, theirs in zip(rope(**parameters)(x, at), expected, strict=True):
        # Angles up to 2e4 rad, each within two roundings of the other's.
        assert float((got - theirs.expand_as(got)).abs().max()) <= 2 * 2e4 * 2**-53


def norms(eps: float | None) -> dict[str, RMSNorm]:
    return {f"{n}_layernorm": RMSNorm(SIZES["head_dim"], eps, dtype=DOUBLE) for n in "qk"}


def test_llama_with_llama3_rope() -> None:
    state, hidden, at, expected = oracle("llama", "Llama", rope_parameters=LLAMA3)
    assert relative_error(ours(state, hidden, at, rotary_emb=rope(**LLAMA3)), expected) <= ROUNDOFF


def test_qwen2_has_a_bias_on_q_k_and_v_only() -> None:
    parameters = {"rope_type": "default", "rope_theta": 1e6}
    state, hidden, at, expected = oracle("qwen2", "Qwen2", rope_parameters=parameters)
    got = ours(state, hidden, at, rotary_emb=rope(**parameters), qkv_bias=True)
    assert relative_error(got, expected) <= ROUNDOFF


def test_qwen3_norms_heads_before_rope() -> None:
    parameters = {"rope_type": "default", "rope_theta": 1e6}
    state, hidden, at, expected = oracle("qwen3", "Qwen3", rope_parameters=parameters)
    got = ours(state, hidden, at, rotary_emb=rope(**parameters), **norms(1e-6))
    assert relative_error(got, expected) <= ROUNDOFF


@pytest.mark.parametrize("layer_idx", [0, 1])
def test_gpt_oss_has_sinks_biases_yarn_and_windows_on_even_layers(layer_idx: int) -> None:
    window = 7 if layer_idx == 0 else None
    state, hidden, at, expected = oracle(
        "gpt_oss",
        "GptOss",
        layer_idx,
        (lambda i, j: i - j < window) if window else None,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention"] * 2,
        attention_bias=True,
        num_local_experts=2,
        rope_parameters=YARN,
    )
    got = ours(
        state,
        hidden,
        at,
        rotary_emb=rope(**YARN),
        learned_sinks_size=1,
        qkv_bias=True,
        o_bias=True,
        sliding_window=window,
    )
    assert relative_error(got, expected) <= ROUNDOFF


def test_mistral_has_windows() -> None:
    parameters = {"rope_type": "default", "rope_theta": 10000.0}
    state, hidden, at, expected = oracle(
        "mistral",
        "Mistral",
        limit=lambda i, j: i - j < 6,
        sliding_window=6,
        rope_parameters=parameters,
    )
    got = ours(state, hidden, at, rotary_emb=rope(**parameters), sliding_window=6)
    assert relative_error(got, expected) <= ROUNDOFF


@pytest.mark.parametrize("layer_idx", [0, 3])
def test_llama4_has_chunks_with_interleaved_rope_and_global_layers_with_temperature(
    layer_idx: int,
) -> None:
    chunked = layer_idx == 0
    state, hidden, at, expected = oracle(
        "llama4",
        "Llama4Text",
        layer_idx,
        (lambda i, j: i // 8 == j // 8) if chunked else None,
        no_rope_layers=[1, 1, 1, 0],
        layer_types=["chunked_attention"] * 3 + ["full_attention"],
        attention_chunk_size=8,
        use_qk_norm=True,
        attn_temperature_tuning=False,
        intermediate_size_mlp=32,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    if not chunked:
        assert relative_error(ours(state, hidden, at), expected) <= ROUNDOFF
        return
    got = ours(
        state,
        hidden,
        at,
        {"use_polar_compatible_rope": True},
        rope_theta=500000.0,
        attention_chunk_size=8,
        use_qk_norm=True,
        rms_norm_eps=1e-5,
        qk_norm_placement=QKNormPlacement.POST_ROPE,
    )
    assert relative_error(got, expected) <= ROUNDOFF


def test_llama4_temperature_of_layers_without_rope() -> None:
    # Transformers counts these positions from the start of the call, so the call starts at 0.
    state, hidden, at, expected = oracle(
        "llama4",
        "Llama4Text",
        3,
        start=0,
        no_rope_layers=[1, 1, 1, 0],
        layer_types=["chunked_attention"] * 3 + ["full_attention"],
        attention_chunk_size=8,
        attn_temperature_tuning=True,
        floor_scale=4,
        attn_scale=0.5,
        intermediate_size_mlp=32,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    got = ours(state, hidden, at, attn_temperature_tuning=True, floor_scale=4, attn_scale=0.5)
    assert relative_error(got, expected) <= ROUNDOFF


def test_gemma2_caps_scores_and_scales_by_its_own_number() -> None:
    parameters = {"rope_type": "default", "rope_theta": 10000.0}
    state, hidden, at, expected = oracle(
        "gemma2",
        "Gemma2",
        1,
        layer_types=["sliding_attention", "full_attention"] * 2,
        attn_logit_softcapping=5.0,
        query_pre_attn_scalar=24,
        attention_dropout=0.0,
        rope_parameters=parameters,
    )
    got = ours(
        state,
        hidden,
        at,
        rotary_emb=rope(**parameters),
        softmax_scale=24**0.5,
        attn_logit_softcapping=5.0,
    )
    assert relative_error(got, expected) <= ROUNDOFF


def test_phi_norms_heads_as_layers_turns_half_of_them_and_calls_its_output_dense() -> None:
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    width = SIZES["hidden_size"] // SIZES["num_attention_heads"]  # as its norms take it
    state, hidden, at, expected = oracle(
        "phi", "Phi", rope_parameters=parameters, qk_layernorm=True, head_dim=width
    )
    got = ours(
        state,
        hidden,
        at,
        width=width,
        rotary_emb=RotaryEmbedding(width, rope_parameters=parameters),
        q_layernorm=torch.nn.LayerNorm(width, 1e-5, dtype=DOUBLE),
        k_layernorm=torch.nn.LayerNorm(width, 1e-5, dtype=DOUBLE),
        qkv_bias=True,
        o_bias=True,
        o_proj_layer_name="dense",
    )
    assert relative_error(got, expected) <= ROUNDOFF
