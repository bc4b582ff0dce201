"""What comes before and around a layer: norm and residual, EAGLE-3 input, cross attention."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import golden.encoder_decoder
from golden import (
    Array,
    AttentionConfig,
    Capture,
    Causal,
    ConfigError,
    Eagle3AttentionConfig,
    QKNorm,
    RopeConfig,
    ShapeError,
    TemperatureTuning,
    add_and_normalise,
    context_encoding,
    cross_attention,
    empty_cache,
    fuse_qkv,
    make_weights,
    project_qkv,
    split_qkv,
    token_generation,
    weight_shapes,
)
from golden.layer import merge_heads, split_heads
from tests.golden.layers import (
    assert_within,
    attend_bound,
    attend_by_hand,
    gamma,
    identical,
    integer_weights,
    normal,
    small_integers,
)

WIDTH = 8

# Fused norm and residual


def test_n4_the_sum_and_the_norm_are_observed() -> None:
    hidden, residual, weight = normal(1, 2, 3, WIDTH), normal(2, 2, 3, WIDTH), normal(3, WIDTH)
    capture = Capture()
    got = add_and_normalise(hidden, weight=weight, residual=residual, observe=capture)
    seen = capture.values
    assert list(seen) == ["input_sum", "input_norm_scale", "input_norm_unit", "input_norm"]
    assert identical(seen["input_sum"], got.residual)
    assert identical(seen["input_norm"], got.hidden_states)
    bare = Capture()
    add_and_normalise(hidden, weight=weight, observe=bare)
    assert "input_sum" not in bare.values


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_n4_the_norm_is_of_the_sum(offset: float, eps: float) -> None:
    hidden, residual = normal(1, 2, 3, WIDTH), normal(2, 2, 3, WIDTH)
    weight = normal(3, WIDTH)
    got = add_and_normalise(hidden, weight=weight, eps=eps, weight_offset=offset, residual=residual)
    total = hidden + residual
    assert identical(got.residual, total)
    for at in np.ndindex(2, 3):
        row = total[at].tolist()
        root = math.sqrt(math.fsum(x * x for x in row) / WIDTH + eps)
        want = np.array([x / root * (offset + float(w)) for x, w in zip(row, weight, strict=True)])
        assert_within(got.hidden_states[at], want, gamma(WIDTH + 10) * np.abs(want))


def test_n5_the_residual_goes_on_as_the_sum_not_as_what_came_in() -> None:
    hidden, residual = normal(1, 1, 2, WIDTH), normal(2, 1, 2, WIDTH)
    first = add_and_normalise(hidden, weight=np.ones(WIDTH), residual=residual)
    assert not identical(first.residual, hidden)
    after = add_and_normalise(first.residual, weight=np.ones(WIDTH))
    assert identical(first.hidden_states, after.hidden_states)
    assert identical(after.residual, first.residual)


def test_n4_a_weight_of_powers_of_two_may_sit_in_the_projection_instead() -> None:
    config = AttentionConfig(hidden_size=WIDTH, num_attention_heads=2, num_key_value_heads=1)
    weights = integer_weights(config)
    gain = 2.0 ** np.arange(-3, WIDTH - 3)
    folded = replace(weights, q_proj=weights.q_proj * gain)
    hidden = normal(1, 2, 3, WIDTH)
    outside = add_and_normalise(hidden, weight=gain).hidden_states
    inside = add_and_normalise(hidden, weight=np.ones(WIDTH)).hidden_states
    assert identical(project_qkv(config, weights, outside).q, project_qkv(config, folded, inside).q)


def test_n4_shapes_are_checked() -> None:
    with pytest.raises(ShapeError, match="weight must have shape"):
        add_and_normalise(np.ones((1, 2, 4)), weight=np.ones(3))
    with pytest.raises(ShapeError, match="residual must have shape"):
        add_and_normalise(np.ones((1, 2, 4)), weight=np.ones(4), residual=np.ones((1, 1, 4)))


# EAGLE-3


def eagle3(**changes: Any) -> Eagle3AttentionConfig:
    return Eagle3AttentionConfig(
        **{
            "hidden_size": WIDTH,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope": RopeConfig(),
            "qkv_bias": True,
        }
        | changes
    )


def test_eagle3_reads_twice_the_width_it_writes() -> None:
    config = eagle3()
    shapes = weight_shapes(config)
    assert shapes["q_proj"] == (8, 16)
    assert shapes["k_proj"] == shapes["v_proj"] == (4, 16)
    assert shapes["o_proj"] == (8, 8)
    assert config.head_dim == 4
    weights = integer_weights(config)
    states = small_integers(1, 2, 5, 16)
    positions = np.tile(np.arange(5), (2, 1))
    result = context_encoding(config, weights, states, position_ids=positions)
    assert result.output.shape == (2, 5, 8)
    step = token_generation(
        config,
        weights,
        states[:, :1],
        position_ids=positions[:, :1],
        cache=empty_cache(config, batch=2, max_length=5),
    )
    assert step.output.shape == (2, 1, 8)
    matrix, bias = fuse_qkv(weights)
    assert all(
        identical(got, want)
        for got, want in zip(
            split_qkv(config, matrix), (weights.q_proj, weights.k_proj, weights.v_proj), strict=True
        )
    )
    assert bias is not None
    with pytest.raises(ShapeError, match="hidden_states must have shape"):
        context_encoding(config, weights, states[..., :8], position_ids=positions)


def test_eagle3_without_the_target_s_half_is_the_plain_layer_on_the_embedding() -> None:
    config = eagle3()
    plain = AttentionConfig(**{name: getattr(config, name) for name in AttentionConfig.__slots__})
    weights = integer_weights(plain)
    shapes = weight_shapes(config)
    wide = {
        name: np.pad(getattr(weights, name), ((0, 0), (0, 8)))
        if name in ("q_proj", "k_proj", "v_proj")
        else getattr(weights, name)
        for name in shapes
    }
    embedding, target = small_integers(1, 2, 5, 8), small_integers(2, 2, 5, 8)
    positions = np.tile(np.arange(5), (2, 1))
    got = context_encoding(
        config,
        make_weights(config, **wide),
        np.concatenate([embedding, target], axis=-1),
        position_ids=positions,
    ).output
    want = context_encoding(plain, weights, embedding, position_ids=positions).output
    assert identical(got, want)
    swapped = np.concatenate([target, embedding], axis=-1)
    other = context_encoding(
        config, make_weights(config, **wide), swapped, position_ids=positions
    ).output
    assert not identical(other, want)


# Cross attention

CROSS = AttentionConfig(
    hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=2, head_dim=2, softmax_scale=0.1
)


def cross_weights() -> Any:
    shapes = weight_shapes(CROSS)
    arrays = {
        name: small_integers(i, *shape) for i, (name, shape) in enumerate(sorted(shapes.items()))
    }
    return make_weights(CROSS, **arrays | {"o_proj": np.eye(WIDTH)})


def check_cross(q_len: int, kv_len: int, mask: Array | None = None) -> None:
    weights = cross_weights()
    hidden = small_integers(1, 2, q_len, WIDTH)
    source = small_integers(2, 2, kv_len, WIDTH)
    got = cross_attention(CROSS, weights, hidden, source, source_mask=mask)
    q = split_heads(hidden @ weights.q_proj.T, 4)
    k = split_heads(source @ weights.k_proj.T, 2)
    v = split_heads(source @ weights.v_proj.T, 2)
    seen = np.ones((2, kv_len), dtype=bool) if mask is None else mask
    visible = np.broadcast_to(seen[:, None, None, :], (2, 4, q_len, kv_len))
    want, _ = attend_by_hand(q, k, v, visible, scale=CROSS.softmax_scale)
    bound = attend_bound(q, k, v, visible, scale=CROSS.softmax_scale).output
    assert_within(split_heads(got, 4), want, bound)
    assert identical(merge_heads(split_heads(got, 4)), got)


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 7), (7, 1), (3, 8), (8, 3), (5, 5)])
def test_x1_every_query_sees_every_source_state(q_len: int, kv_len: int) -> None:
    check_cross(q_len, kv_len)


def test_x1_padded_source_states_are_seen_by_none() -> None:
    mask = np.array([[True, False, True, True], [False, False, False, True]])
    check_cross(3, 4, mask)
    nothing = cross_attention(
        CROSS,
        cross_weights(),
        np.ones((1, 2, WIDTH)),
        np.full((1, 3, WIDTH), 1e9),
        source_mask=np.zeros((1, 3), dtype=bool),
    )
    assert (nothing == 0).all()


def test_x2_keys_and_values_depend_on_the_source_alone() -> None:
    weights, source = cross_weights(), small_integers(2, 2, 5, WIDTH)
    stages = []
    for seed in (1, 2):
        capture = Capture()
        cross_attention(CROSS, weights, small_integers(seed, 2, 3, WIDTH), source, observe=capture)
        stages.append(capture.values)
    assert identical(stages[0]["k_cache"], stages[1]["k_cache"])
    assert identical(stages[0]["v_cache"], stages[1]["v_cache"])
    assert not identical(stages[0]["attn"], stages[1]["attn"])


def test_the_comparison_sees_a_causal_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden.encoder_decoder, "Everything", Causal)
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_cross(3, 8)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope": RopeConfig()}, "rope"),
        ({"sliding_window": 4}, "sliding_window"),
        (
            {"attention_chunk_size": 4, "temperature_tuning": TemperatureTuning()},
            "temperature_tuning and attention_chunk_size",
        ),
    ],
)
def test_x1_layers_that_order_their_tokens_are_refused(changes: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=f"cross attention excludes {named}: positions of two"):
        cross_attention(
            replace(CROSS, **changes), cross_weights(), np.ones((1, 1, 8)), np.ones((1, 1, 8))
        )


def test_x1_masks_and_batches_are_checked() -> None:
    weights, one = cross_weights(), np.ones((1, 2, WIDTH))
    with pytest.raises(ShapeError, match="source_states must have the batch of hidden_states, 1"):
        cross_attention(CROSS, weights, one, np.ones((2, 2, WIDTH)))
    with pytest.raises(ShapeError, match=re.escape("source_mask must be bool of shape (1, 2)")):
        cross_attention(CROSS, weights, one, one, source_mask=np.ones((1, 2)))


def test_x1_query_and_key_norms_apply_to_both_sides() -> None:
    config = replace(CROSS, qk_norm=QKNorm(weighted=False))
    hidden, source = small_integers(1, 1, 2, WIDTH), small_integers(2, 1, 3, WIDTH)
    capture = Capture()
    cross_attention(config, cross_weights(), hidden, source, observe=capture)
    for name, length in (("q_norm", 2), ("k_norm", 3)):
        power = np.square(capture.values[name]).mean(axis=-1)
        assert power.shape[2] == length
        assert (power <= 1.0 + 1e-15).all()
