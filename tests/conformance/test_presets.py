from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest

from conformance.presets import PRESETS, Preset, PresetError, layer, preset
from golden.config import AttentionConfig
from golden.rope import attention_factor, rope_frequencies
from golden.rope_config import Llama3Scaling

ALL = pytest.mark.parametrize("model", PRESETS.values(), ids=PRESETS)

# name: layers, hidden_size, query heads, key/value heads, head_dim
GEOMETRY = {
    "llama-3.1-8b": (32, 4096, 32, 8, 128),
    "llama-3.3-70b": (80, 8192, 64, 8, 128),
    "llama-3.2-1b": (16, 2048, 32, 8, 64),
    "llama-4-scout": (48, 5120, 40, 8, 128),
    "smollm2-135m": (30, 576, 9, 3, 64),
    "gpt-oss-20b": (24, 2880, 64, 8, 64),
    "gpt-oss-120b": (36, 2880, 64, 8, 64),
    "mistral-7b": (32, 4096, 32, 8, 128),
    "mistral-nemo": (40, 5120, 32, 8, 128),
    "mixtral-8x7b": (32, 4096, 32, 8, 128),
    "qwen2.5-7b": (28, 3584, 28, 4, 128),
    "qwen3-8b": (36, 4096, 32, 8, 128),
    "qwen3-235b-a22b": (94, 4096, 64, 4, 128),
    "gemma-3-4b": (34, 2560, 8, 4, 256),
    "gemma-3-27b": (62, 5376, 32, 16, 128),
    "dbrx": (40, 6144, 48, 8, 128),
    "phi-2": (32, 2560, 32, 32, 80),
    "phi-3-mini": (32, 3072, 32, 32, 96),
}
GROUP_SIZE = {"llama-4-scout": 5, "gpt-oss-20b": 8, "qwen3-235b-a22b": 16, "dbrx": 6, "phi-2": 1}


def _names(condition: str) -> set[str]:
    """Presets with a layer for which the attribute is set to something true."""
    return {
        model.name
        for model in PRESETS.values()
        if any(getattr(config, condition) for config in model.layers.values())
    }


@ALL
def test_geometry_is_the_published_one(model: Preset) -> None:
    for config in model.layers.values():
        assert (
            model.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        ) == GEOMETRY[model.name]


def test_every_preset_has_a_row_of_facts() -> None:
    assert set(GEOMETRY) == set(PRESETS)


@pytest.mark.parametrize(("name", "group_size"), GROUP_SIZE.items())
def test_group_size_is_the_published_ratio(name: str, group_size: int) -> None:
    assert {config.group_size for config in preset(name).layers.values()} == {group_size}


@ALL
def test_pattern_names_one_existing_kind_per_layer(model: Preset) -> None:
    assert len(model.pattern) == model.num_hidden_layers
    assert set(model.pattern) == set(model.layers)


@ALL
def test_sources_name_a_file_and_hide_no_recollection(model: Preset) -> None:
    assert model.sources
    assert all("/" in source for source in model.sources)
    assert not any("recalled" in source for source in model.sources)


@pytest.mark.parametrize(("name", "sliding"), [("gpt-oss-20b", 12), ("gpt-oss-120b", 18)])
def test_gpt_oss_slides_on_even_layers(name: str, sliding: int) -> None:
    pattern = preset(name).pattern
    assert [i for i, kind in enumerate(pattern) if kind == "sliding"] == list(
        range(0, 2 * sliding, 2)
    )
    assert layer(name, "sliding").sliding_window == 128
    assert layer(name, "global").sliding_window is None


@pytest.mark.parametrize(
    ("name", "counts"),
    [("gemma-3-4b", (29, 5)), ("gemma-3-27b", (52, 10))],
)
def test_gemma3_slides_on_five_layers_of_six(name: str, counts: tuple[int, int]) -> None:
    pattern = preset(name).pattern
    assert Counter(pattern) == dict(zip(("sliding", "global"), counts, strict=True))
    assert {i % 6 for i, kind in enumerate(pattern) if kind == "global"} == {5}


def test_gemma3_27b_ends_on_two_sliding_layers() -> None:
    assert preset("gemma-3-27b").pattern[-3:] == ("global", "sliding", "sliding")


def test_gemma3_scales_by_query_pre_attn_scalar() -> None:
    assert layer("gemma-3-27b", "global").softmax_scale == 168**-0.5
    assert layer("gemma-3-27b", "sliding").softmax_scale == 168**-0.5
    assert layer("gemma-3-4b", "global").softmax_scale == 1 / 16


def test_gemma3_has_a_rope_base_per_kind() -> None:
    assert layer("gemma-3-4b", "sliding").rope != layer("gemma-3-4b", "global").rope
    assert _theta(layer("gemma-3-4b", "sliding")) == 1e4
    assert _theta(layer("gemma-3-4b", "global")) == 1e6


def test_llama4_is_global_on_every_fourth_layer() -> None:
    pattern = preset("llama-4-scout").pattern
    assert [i for i, kind in enumerate(pattern) if kind == "global"] == list(range(3, 48, 4))
    assert Counter(pattern)["chunked"] == 36


def test_llama4_global_layers_have_no_positions_and_no_norm() -> None:
    config = layer("llama-4-scout", "global")
    assert config.rope is None
    assert config.qk_norm is None
    assert config.attention_chunk_size is None
    assert config.temperature_tuning is not None


def test_llama4_chunked_layers_rotate_pairs_and_then_normalise() -> None:
    config = layer("llama-4-scout", "chunked")
    assert config.rope is not None
    assert config.rope.pairing == "interleaved"
    assert config.qk_norm is not None
    assert (config.qk_norm.placement, config.qk_norm.weighted) == ("post_rope", False)
    assert config.qk_norm.eps == 1e-5
    assert config.attention_chunk_size == 8192
    assert config.temperature_tuning is None


def test_llama4_frequencies_are_cut_at_wavelength_8192_without_a_ramp() -> None:
    rope = layer("llama-4-scout", "chunked").rope
    assert rope is not None
    plain = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    cut = np.where(2 * np.pi / plain > 8192, plain / 16, plain)
    np.testing.assert_array_max_ulp(rope_frequencies(rope, 128), cut, maxulp=2)
    assert isinstance(rope.scaling, Llama3Scaling)
    assert rope.scaling.high_freq_factor == rope.scaling.low_freq_factor == 1.0


def test_windows_are_the_published_numbers() -> None:
    windows = {
        model.name: {config.sliding_window for config in model.layers.values()} - {None}
        for model in PRESETS.values()
        if model.name in _names("sliding_window")
    }
    assert windows == {
        "mistral-7b": {4096},
        "phi-3-mini": {2047},
        "gpt-oss-20b": {128},
        "gpt-oss-120b": {128},
        "gemma-3-4b": {1024},
        "gemma-3-27b": {1024},
    }


@pytest.mark.parametrize(
    ("attribute", "names"),
    [
        ("qkv_bias", {"gpt-oss-20b", "gpt-oss-120b", "qwen2.5-7b", "phi-2"}),
        ("o_bias", {"gpt-oss-20b", "gpt-oss-120b", "phi-2"}),
        ("fused_qkv", {"dbrx", "phi-3-mini"}),
        ("clip_qkv", {"dbrx"}),
        ("softcap", set()),
        ("learned_sinks_size", {"gpt-oss-20b", "gpt-oss-120b"}),
        ("attention_chunk_size", {"llama-4-scout"}),
        ("temperature_tuning", {"llama-4-scout"}),
        (
            "qk_norm",
            {"llama-4-scout", "qwen3-8b", "qwen3-235b-a22b", "gemma-3-4b", "gemma-3-27b"},
        ),
    ],
)
def test_feature_belongs_to_exactly_these_models(attribute: str, names: set[str]) -> None:
    assert _names(attribute) == names


@pytest.mark.parametrize(
    ("name", "theta"),
    [
        ("llama-3.1-8b", 500000.0),
        ("smollm2-135m", 100000.0),
        ("gpt-oss-20b", 150000.0),
        ("mistral-7b", 10000.0),
        ("mixtral-8x7b", 1000000.0),
        ("qwen3-235b-a22b", 1000000.0),
        ("dbrx", 500000.0),
        ("phi-2", 10000.0),
    ],
)
def test_rope_base_is_the_published_one(name: str, theta: float) -> None:
    assert _theta(layer(name, "global")) == theta


def test_phi2_rotates_the_leading_32_of_80_channels() -> None:
    assert layer("phi-2", "global").rotary_dim == 32


def test_gpt_oss_yarn_concentrates_and_does_not_round() -> None:
    rope = layer("gpt-oss-120b", "sliding").rope
    assert rope is not None
    assert rope.scaling is not None
    assert not getattr(rope.scaling, "truncate", True)
    assert attention_factor(rope) == pytest.approx(1.3465735902799727, rel=1e-15)


def test_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(PresetError, match=r"got 'gpt-oss-20'; did you mean 'gpt-oss-20b'"):
        preset("gpt-oss-20")


def test_unknown_name_near_none_lists_all() -> None:
    with pytest.raises(PresetError, match=r"got '\?'; known are 'llama-3\.1-8b', .*'phi-3-mini'$"):
        preset("?")


def test_unknown_kind_lists_those_of_the_model() -> None:
    with pytest.raises(PresetError, match=r"got 'chunked'; known are 'sliding', 'global'$"):
        layer("gpt-oss-20b", "chunked")


def test_presets_cannot_be_changed() -> None:
    model = preset("dbrx")
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        model.layers["global"] = layer("phi-2", "global")  # type: ignore[index]
    with pytest.raises(TypeError):
        PRESETS["other"] = model  # type: ignore[index]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": ("global",)}, "must name 40 layers, got 1"),
        ({"pattern": ("local",) * 40}, "must name the same kinds"),
        ({"sources": ()}, "must not be empty"),
    ],
)
def test_contradictory_preset_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PresetError, match=message):
        dataclasses.replace(preset("dbrx"), **changes)  # type: ignore[arg-type]


def _theta(config: AttentionConfig) -> float:
    assert config.rope is not None
    return config.rope.theta
