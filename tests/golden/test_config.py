from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from golden import (
    AttentionConfig,
    ConfigError,
    GoldenError,
    LinearScaling,
    Llama3Scaling,
    QKNorm,
    RopeConfig,
    ShapeError,
    TemperatureTuning,
    YarnScaling,
)


def layer(**changes: Any) -> AttentionConfig:
    defaults: dict[str, Any] = {
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    }
    return AttentionConfig(**(defaults | changes))


def llama3(**changes: Any) -> Llama3Scaling:
    defaults: dict[str, Any] = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return Llama3Scaling(**(defaults | changes))


def yarn(**changes: Any) -> YarnScaling:
    defaults: dict[str, Any] = {"factor": 8.0, "original_max_position_embeddings": 4096}
    return YarnScaling(**(defaults | changes))


OFF = "; use None to switch it off"

REJECTED: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (layer, {"hidden_size": 0}, "hidden_size must be positive, got 0"),
    (layer, {"hidden_size": -48}, "hidden_size must be positive, got -48"),
    (layer, {"num_attention_heads": 0}, "num_attention_heads must be positive, got 0"),
    (layer, {"num_key_value_heads": 0}, "num_key_value_heads must be positive, got 0"),
    (
        layer,
        {"num_attention_heads": 8, "num_key_value_heads": 3},
        "num_attention_heads must be a multiple of num_key_value_heads, got 8 and 3",
    ),
    (
        layer,
        {"num_attention_heads": 2, "num_key_value_heads": 6},
        "num_attention_heads must be a multiple of num_key_value_heads, got 2 and 6",
    ),
    (
        layer,
        {"hidden_size": 50},
        "hidden_size must be a multiple of num_attention_heads when head_dim is not given, "
        "got 50 and 6; give head_dim",
    ),
    (layer, {"head_dim": -1}, "head_dim must be positive, got -1"),
    (
        layer,
        {"softmax_scale": -0.5},
        "softmax_scale must be a positive factor on q·k, got -0.5",
    ),
    (
        layer,
        {"softmax_scale": math.nan},
        "softmax_scale must be a positive factor on q·k, got nan",
    ),
    *(
        (layer, {name: value}, f"{name} must be positive, got {value}{OFF}")
        for name in ("clip_qkv", "softcap", "sliding_window", "attention_chunk_size")
        for value in (0, -1)
    ),
    *(
        (layer, {name: math.nan}, f"{name} must be positive, got nan{OFF}")
        for name in ("clip_qkv", "softcap")
    ),
    *(
        (layer, {name: math.inf}, f"{name} must be finite, got inf{OFF}")
        for name in ("clip_qkv", "softcap")
    ),
    *(
        (layer, {name: value}, f"{name} must be a whole number, got {value}")
        for name in ("sliding_window", "attention_chunk_size", "num_attention_heads", "head_dim")
        for value in (math.nan, 2.5, True)
    ),
    (QKNorm, {"eps": math.inf}, "eps must be non-negative, got inf"),
    (TemperatureTuning, {"attn_scale": math.nan}, "attn_scale must be finite, got nan"),
    (
        llama3,
        {"original_max_position_embeddings": 0},
        "original_max_position_embeddings must be positive, got 0",
    ),
    (
        yarn,
        {"original_max_position_embeddings": -4096},
        "original_max_position_embeddings must be positive, got -4096",
    ),
    (
        yarn,
        {"attention_factor": -1.0},
        "attention_factor must be finite and not negative, got -1.0",
    ),
    (
        RopeConfig,
        {"theta": 1.0, "scaling": yarn()},
        "theta must be above 1 for YaRN, which divides by its logarithm, got 1.0",
    ),
    (
        layer,
        {"learned_sinks_size": 6},
        "learned_sinks_size must be 1 (one sink logit per query head) or None, got 6",
    ),
    (layer, {"learned_sinks_size": 0}, "learned_sinks_size must be 1"),
    (
        layer,
        {"sliding_window": 4, "attention_chunk_size": 8},
        "sliding_window and attention_chunk_size exclude each other, got 4 and 8",
    ),
    (
        layer,
        {"rope": RopeConfig(rotary_dim=10)},
        "rope.rotary_dim must be at most head_dim, got 10 and 8",
    ),
    (
        layer,
        {"rope": RopeConfig(), "head_dim": 7},
        "head_dim must be even to rotate all of it, got 7",
    ),
    (QKNorm, {"kind": "l2"}, "kind must be 'rms' or 'layer', got 'l2'"),
    (
        QKNorm,
        {"placement": "POST_ROPE"},
        "placement must be 'pre_rope' or 'post_rope', got 'POST_ROPE'",
    ),
    (QKNorm, {"scope": "layer"}, "scope must be 'head' or 'projection', got 'layer'"),
    (QKNorm, {"eps": -1e-6}, "eps must be non-negative, got -1e-06"),
    (QKNorm, {"eps": math.nan}, "eps must be non-negative, got nan"),
    (
        QKNorm,
        {"scope": "projection", "placement": "post_rope"},
        "scope 'projection' requires placement 'pre_rope', got 'post_rope'; "
        "RoPE acts on heads, after the flat projection is split",
    ),
    (
        QKNorm,
        {"weighted": False, "weight_offset": 1.0},
        "weight_offset requires weighted=True, got 1.0 without a weight",
    ),
    (TemperatureTuning, {"floor_scale": 0.0}, "floor_scale must be positive, got 0.0"),
    (TemperatureTuning, {"floor_scale": -8.0}, "floor_scale must be positive, got -8.0"),
    (LinearScaling, {"factor": 0.0}, "factor must be positive, got 0.0"),
    (LinearScaling, {"factor": -2.0}, "factor must be positive, got -2.0"),
    (llama3, {"factor": 0.0}, "factor must be positive, got 0.0"),
    *(
        (
            llama3,
            {"low_freq_factor": low, "high_freq_factor": high},
            f"low_freq_factor must be positive and at most high_freq_factor, got {low} and {high}",
        )
        for low, high in ((4.0, 1.0), (0.0, 4.0), (-1.0, 4.0))
    ),
    (yarn, {"factor": 0.5}, "factor must be at least 1, got 0.5"),
    *(
        (
            yarn,
            {"beta_slow": slow, "beta_fast": fast},
            f"beta_slow must lie between 0 and beta_fast, got {slow} and {fast}",
        )
        for slow, fast in ((32.0, 1.0), (1.0, 1.0), (0.0, 32.0))
    ),
    (RopeConfig, {"theta": 0.0}, "theta must be positive, got 0.0"),
    (RopeConfig, {"theta": -1.0}, "theta must be positive, got -1.0"),
    (RopeConfig, {"pairing": "neox"}, "pairing must be 'half' or 'interleaved', got 'neox'"),
    (RopeConfig, {"rotary_dim": 3}, "rotary_dim must be even and not negative, got 3"),
    (RopeConfig, {"rotary_dim": -2}, "rotary_dim must be even and not negative, got -2"),
]


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    REJECTED,
    ids=[
        "-".join([make.__name__, *(f"{name}={value}" for name, value in changes.items())])
        if make is not layer or "rope" not in changes
        else f"layer-rope-{index}"
        for index, (make, changes, _) in enumerate(REJECTED)
    ],
)
def test_a_field_no_layer_can_have_is_named_with_its_rule_and_value(
    make: Callable[..., Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        make(**changes)


def test_head_dim_and_softmax_scale_have_the_defaults_of_the_paper() -> None:
    config = layer()
    assert config.head_dim == 8
    assert config.softmax_scale == 8**-0.5
    assert layer(head_dim=16).softmax_scale == 0.25
    assert layer(softmax_scale=3.0).softmax_scale == 3.0


def test_head_dim_need_not_divide_hidden_size() -> None:
    config = layer(hidden_size=50, head_dim=8)
    assert (config.q_size, config.kv_size, config.group_size) == (48, 16, 3)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "group"), [(1, 1, 1), (8, 8, 1), (8, 1, 8), (28, 4, 7)]
)
def test_sizes_follow_from_the_heads(heads: int, kv_heads: int, group: int) -> None:
    config = layer(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=4)
    assert (config.group_size, config.q_size, config.kv_size) == (group, heads * 4, kv_heads * 4)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [(None, 0), (RopeConfig(), 8), (RopeConfig(rotary_dim=4), 4), (RopeConfig(rotary_dim=8), 8)],
    ids=["nope", "all", "half", "all-named"],
)
def test_rotary_dim_is_what_rope_rotates(rope: RopeConfig | None, expected: int) -> None:
    assert layer(rope=rope).rotary_dim == expected


def test_an_odd_head_may_rotate_an_even_part() -> None:
    assert layer(head_dim=7, rope=RopeConfig(rotary_dim=6)).rotary_dim == 6


def full() -> AttentionConfig:
    return layer(
        qk_norm=QKNorm(),
        rope=RopeConfig(scaling=llama3()),
        temperature_tuning=TemperatureTuning(),
    )


def test_a_configuration_is_a_value() -> None:
    assert full() == full()
    assert len({full(), full(), dataclasses.replace(full(), softcap=5.0)}) == 2
    assert "num_attention_heads=6" in repr(full())


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (full(), "head_dim"),
        (QKNorm(), "eps"),
        (RopeConfig(), "theta"),
        (llama3(), "factor"),
        (yarn(), "factor"),
        (LinearScaling(factor=2.0), "factor"),
        (TemperatureTuning(), "attn_scale"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_configuration_is_frozen_and_named_by_keyword_only(value: Any, name: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, 1)
    with pytest.raises(TypeError, match="positional argument"):
        type(value)(1)


def test_replace_checks_again() -> None:
    with pytest.raises(ConfigError, match="num_attention_heads must be a multiple"):
        dataclasses.replace(full(), num_key_value_heads=4)


@pytest.mark.parametrize("error", [ConfigError, ShapeError])
def test_errors_of_golden_are_value_errors(error: type[Exception]) -> None:
    assert issubclass(error, GoldenError)
    assert issubclass(error, ValueError)
