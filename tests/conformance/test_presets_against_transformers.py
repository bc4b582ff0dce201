"""Each preset is rebuilt from what transformers makes of the published configuration."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from conformance.presets import PRESETS, Preset, preset
from golden.config import AttentionConfig, QKNorm, TemperatureTuning
from golden.rope import attention_factor, rope_frequencies

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONG = {"max_position_embeddings": 131072}
KINDS = {
    "full_attention": "global",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
}

# name: model directory, class prefix, the published values that differ from the class defaults
PUBLISHED: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "llama-3.1-8b": (
        "llama",
        "Llama",
        {"num_key_value_heads": 8, "rope_theta": 5e5, "rope_scaling": LLAMA3, **LONG},
    ),
    "llama-3.3-70b": (
        "llama",
        "Llama",
        {
            "hidden_size": 8192,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "rope_theta": 5e5,
            "rope_scaling": LLAMA3,
            **LONG,
        },
    ),
    "llama-3.2-1b": (
        "llama",
        "Llama",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "rope_theta": 5e5,
            "rope_scaling": LLAMA3 | {"factor": 32.0},
            **LONG,
        },
    ),
    "smollm2-135m": (
        "llama",
        "Llama",
        {
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "rope_theta": 1e5,
        },
    ),
    "llama-4-scout": (
        "llama4",
        "Llama4Text",
        {
            "rope_theta": 5e5,
            "rope_scaling": LLAMA3 | {"factor": 16.0, "high_freq_factor": 1.0},
            "max_position_embeddings": 262144,
        },
    ),
    "gpt-oss-20b": ("gpt_oss", "GptOss", {"num_hidden_layers": 24, "num_local_experts": 32}),
    "gpt-oss-120b": ("gpt_oss", "GptOss", {}),
    "mistral-7b": ("mistral", "Mistral", {"rms_norm_eps": 1e-5}),
    "mistral-nemo": (
        "mistral",
        "Mistral",
        {
            "hidden_size": 5120,
            "num_hidden_layers": 40,
            "head_dim": 128,
            "rope_theta": 1e6,
            "sliding_window": None,
        },
    ),
    "mixtral-8x7b": ("mixtral", "Mixtral", {}),
    "qwen2.5-7b": (
        "qwen2",
        "Qwen2",
        {
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rope_theta": 1e6,
            "sliding_window": 131072,
        },
    ),
    "qwen3-8b": (
        "qwen3",
        "Qwen3",
        {"num_hidden_layers": 36, "num_key_value_heads": 8, "rope_theta": 1e6},
    ),
    "qwen3-235b-a22b": (
        "qwen3_moe",
        "Qwen3Moe",
        {
            "hidden_size": 4096,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "head_dim": 128,
            "rope_theta": 1e6,
        },
    ),
    "gemma-3-4b": (
        "gemma3",
        "Gemma3Text",
        {
            "hidden_size": 2560,
            "num_hidden_layers": 34,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window": 1024,
        },
    ),
    "gemma-3-27b": (
        "gemma3",
        "Gemma3Text",
        {
            "hidden_size": 5376,
            "num_hidden_layers": 62,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "query_pre_attn_scalar": 168,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window": 1024,
        },
    ),
    "dbrx": (
        "dbrx",
        "Dbrx",
        {
            "d_model": 6144,
            "n_heads": 48,
            "n_layers": 40,
            "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000},
            # The rotary embedding reads the outer configuration, not attn_config.
            "rope_theta": 5e5,
        },
    ),
    "phi-2": (
        "phi",
        "Phi",
        {"hidden_size": 2560, "num_hidden_layers": 32, "partial_rotary_factor": 0.4},
    ),
    "phi-3-mini": ("phi3", "Phi3", {"sliding_window": 2047}),
}
ALL = pytest.mark.parametrize("model", PRESETS.values(), ids=PRESETS)


@pytest.fixture(scope="module")
def modules() -> dict[str, Any]:
    return {
        folder: importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        for folder, _, _ in PUBLISHED.values()
    }


def _config(name: str) -> Any:
    folder, prefix, values = PUBLISHED[name]
    package = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
    return getattr(package, f"{prefix}Config")(**values)


def _class(name: str, suffix: str, modules: dict[str, Any]) -> Any:
    """The class of that suffix; some models spell their prefix with `Text`, some without."""
    folder, prefix, _ = PUBLISHED[name]
    names = (prefix + suffix, prefix.removesuffix("Text") + suffix)
    return next(getattr(modules[folder], each) for each in names if hasattr(modules[folder], each))


def _attention(name: str, config: Any, index: int, modules: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return _class(name, "Attention", modules)(config, index)


def _kinds(config: Any) -> tuple[str, ...]:
    """Layers by index; `layer_types` where there is more than one type, else all `global`."""
    types: list[str] = getattr(config, "layer_types", None) or []
    if len(set(types)) < 2:
        return ("global",) * int(config.num_hidden_layers)
    return tuple(KINDS[kind] for kind in types)


def _qk_norm(module: Any) -> QKNorm | None:
    unweighted = getattr(module, "qk_norm", None)
    if unweighted is not None:
        return QKNorm(placement="post_rope", weighted=False, eps=unweighted.eps)
    norm = getattr(module, "q_norm", None)
    if norm is None:
        return None
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    head_dim = module.head_dim
    assert norm.weight.shape == (head_dim,)  # per head, hence scope `head`
    initial = type(norm)(head_dim).weight[0].detach().item()  # an untrained norm multiplies by 1
    return QKNorm(eps=eps, weight_offset=1.0 - initial)


def _window(module: Any, config: Any) -> int | None:
    window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    assert window is None or isinstance(window, int)
    return window


def _temperature(module: Any) -> TemperatureTuning | None:
    if not getattr(module, "attn_temperature_tuning", False) or module.use_rope:
        return None
    return TemperatureTuning(floor_scale=module.floor_scale, attn_scale=module.attn_scale)


def _rebuilt(module: Any, config: Any, kind: str) -> AttentionConfig:
    """What the module of transformers computes, in golden's words; RoPE is compared apart."""
    fused = getattr(module, "qkv_proj", getattr(module, "Wqkv", None))
    query = fused if fused is not None else module.q_proj
    names = ("o_proj", "out_proj", "dense")
    output = next(getattr(module, name) for name in names if hasattr(module, name))
    heads = config.num_attention_heads
    groups = module.num_key_value_groups
    assert output.weight.shape == (config.hidden_size, heads * module.head_dim)
    rows = heads + 2 * heads // groups if fused is not None else heads
    assert query.weight.shape == (rows * module.head_dim, config.hidden_size)
    return AttentionConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=heads // groups,
        head_dim=module.head_dim,
        qkv_bias=query.bias is not None,
        o_bias=output.bias is not None,
        fused_qkv=fused is not None,
        clip_qkv=getattr(module, "clip_qkv", None),
        qk_norm=_qk_norm(module),
        softmax_scale=module.scaling,
        softcap=getattr(module, "attn_logit_softcapping", None),
        sliding_window=_window(module, config),
        attention_chunk_size=config.attention_chunk_size if kind == "chunked" else None,
        learned_sinks_size=1 if hasattr(module, "sinks") else None,
        temperature_tuning=_temperature(module),
    )


@ALL
def test_every_layer_is_what_transformers_builds(model: Preset, modules: dict[str, Any]) -> None:
    config = _config(model.name)
    assert _kinds(config) == model.pattern
    for kind, expected in model.layers.items():
        module = _attention(model.name, config, model.pattern.index(kind), modules)
        without_rope = {name: getattr(expected, name) for name in AttentionConfig.__slots__}
        without_rope["rope"] = None
        assert _rebuilt(module, config, kind) == AttentionConfig(**without_rope)
        assert bool(getattr(module, "use_rope", True)) == (expected.rope is not None)


@ALL
def test_rope_turns_by_the_frequencies_of_transformers(
    model: Preset, modules: dict[str, Any]
) -> None:
    module = _class(model.name, "RotaryEmbedding", modules)(_config(model.name))
    for kind, config in model.layers.items():
        if config.rope is None:
            continue
        before = {"sliding": "sliding_attention_", "global": "full_attention_"}.get(kind, "")
        before = before if hasattr(module, f"{before}inv_freq") else ""
        theirs = getattr(module, f"{before}inv_freq").double().numpy()
        ours = rope_frequencies(config.rope, config.rotary_dim)
        assert theirs.shape == ours.shape
        # float32 powers: an exponent near 13 rounds to 2**-21, which is relative in the power.
        np.testing.assert_allclose(theirs, ours, rtol=2**-20, atol=0)
        # `0.1 log(factor) + 1` of both sides: three roundings of a number below 2, in float64
        scaling = getattr(module, f"{before}attention_scaling")
        assert abs(scaling - attention_factor(config.rope)) <= 3 * 2**-52


@ALL
def test_rope_pairs_channels_as_transformers_does(model: Preset, modules: dict[str, Any]) -> None:
    rotates_complex_numbers = hasattr(modules[PUBLISHED[model.name][0]], "apply_rotary_emb")
    for config in model.layers.values():
        if config.rope is not None:
            assert (config.rope.pairing == "interleaved") == rotates_complex_numbers


@ALL
def test_norm_is_on_the_same_side_of_rope(model: Preset, modules: dict[str, Any]) -> None:
    forward = inspect.getsource(_class(model.name, "Attention", modules).forward)
    rope = forward.index("apply_rotary")
    for config in model.layers.values():
        if config.qk_norm is None:
            continue
        after = config.qk_norm.placement == "post_rope"
        for norm in ("qk_norm(",) if after else ("q_norm(", "k_norm("):
            assert (forward.index(norm) > rope) == after


@pytest.mark.parametrize("name", ["gpt-oss-20b", "gemma-3-4b", "mistral-7b", "phi-3-mini"])
def test_transformers_counts_the_query_within_the_window(name: str) -> None:
    masking = importlib.import_module("transformers.masking_utils")
    windows = [config.sliding_window for config in preset(name).layers.values()]
    (window,) = [window for window in windows if window is not None]
    admits = masking.sliding_window_causal_mask_function(window)
    query = 3 * window
    keys = torch.arange(query + 2)
    assert int(admits(0, 0, torch.tensor(query), keys).sum()) == window


@pytest.mark.parametrize("name", ["llama-4-scout", "gpt-oss-120b", "mistral-7b", "mixtral-8x7b"])
def test_class_defaults_are_the_published_model(name: str, modules: dict[str, Any]) -> None:
    folder, prefix, _ = PUBLISHED[name]
    package = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
    config = getattr(package, f"{prefix}Config")()
    model = preset(name)
    assert _kinds(config) == model.pattern
    for kind, expected in model.layers.items():
        module = _attention(name, config, model.pattern.index(kind), modules)
        rebuilt = _rebuilt(module, config, kind)
        for field in AttentionConfig.__slots__:
            if field != "rope":
                assert getattr(rebuilt, field) == getattr(expected, field), field
        if expected.rope is not None:
            assert config.rope_parameters["rope_theta"] == expected.rope.theta
