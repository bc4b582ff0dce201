"""Dynamic NTK, LongRoPE, proportional RoPE, DeepSeek's YaRN and multimodal RoPE."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import golden.rope
from golden import (
    Array,
    AttentionConfig,
    Capture,
    ConfigError,
    DynamicNTKScaling,
    LinearScaling,
    LongRopeScaling,
    ProportionalScaling,
    RopeConfig,
    ShapeError,
    attention_factor,
    context_encoding,
    deepseek_yarn_scaling,
    empty_cache,
    forward,
    rope_cos_sin,
    rope_frequencies,
    rotate,
    token_generation,
    yarn_mscale,
)
from golden.rope_scalings import position_axes
from tests.golden.layers import (
    LAYERS,
    assert_within,
    gamma,
    identical,
    integer_weights,
    normal,
    sampled,
    small_integers,
)

ORIGINAL = 64


def dynamic(factor: float = 2.0, seq_len: int = 0) -> RopeConfig:
    scaling = DynamicNTKScaling(
        factor=factor, original_max_position_embeddings=ORIGINAL, seq_len=seq_len
    )
    return RopeConfig(scaling=scaling)


def longrope(**changes: Any) -> RopeConfig:
    fields: dict[str, Any] = {
        "short_factor": (1.0, 1.5, 2.0, 4.0),
        "long_factor": (1.0, 3.0, 8.0, 16.0),
        "factor": 16.0,
        "original_max_position_embeddings": ORIGINAL,
    }
    return RopeConfig(scaling=LongRopeScaling(**fields | changes))


# R6: dynamic NTK


def exact_dynamic(rotary_dim: int, factor: float, seq_len: int) -> Array:
    """R6 in 50 digits."""
    with localcontext() as context:
        context.prec = 50
        length = Decimal(max(seq_len, ORIGINAL))
        growth = Decimal(factor) * length / ORIGINAL - (Decimal(factor) - 1)
        theta = Decimal(10000) * growth ** (Decimal(rotary_dim) / (rotary_dim - 2))
        exponents = [Decimal(-2 * i) / rotary_dim for i in range(rotary_dim // 2)]
        return np.array([float(theta**e) for e in exponents])


def check_dynamic(rotary_dim: int, factor: float, seq_len: int) -> None:
    got = rope_frequencies(dynamic(factor), rotary_dim, seq_len=seq_len)
    want = exact_dynamic(rotary_dim, factor, seq_len)
    # growth errs by 4 roundings of its terms (at most factor * seq_len / original, which is at
    # most that over the growth itself times larger), its power by r / (r - 2) times as much, and
    # log(theta) roundings come of the exponents
    growth = factor * max(seq_len, ORIGINAL) / ORIGINAL - (factor - 1)
    spread = (2 * factor * max(seq_len, ORIGINAL) / ORIGINAL + 1) / growth
    roundings = 4 * spread * rotary_dim / (rotary_dim - 2) + 2 * math.log(1e4 * growth**2) + 12
    assert_within(got, want, gamma(roundings) * want)


@sampled
@given(
    rotary_dim=st.sampled_from([4, 8, 64, 128]),
    factor=st.floats(1.0, 32.0),
    seq_len=st.integers(1, 50 * ORIGINAL),
)
def test_r6_the_base_grows_with_the_length(rotary_dim: int, factor: float, seq_len: int) -> None:
    check_dynamic(rotary_dim, factor, seq_len)


def test_r6_the_slowest_pair_is_divided_by_the_growth_and_the_fastest_kept() -> None:
    plain = rope_frequencies(RopeConfig(), 16)
    scaled = rope_frequencies(dynamic(4.0), 16, seq_len=3 * ORIGINAL)
    growth = 4.0 * 3 - 3.0
    assert scaled[0] == 1.0
    assert_within(scaled[-1:], plain[-1:] / growth, gamma(40) * plain[-1:])


@pytest.mark.parametrize("seq_len", [1, ORIGINAL - 1, ORIGINAL])
def test_r6_up_to_the_original_length_nothing_is_scaled(seq_len: int) -> None:
    got = rope_frequencies(dynamic(), 16, seq_len=seq_len)
    assert identical(got, rope_frequencies(RopeConfig(), 16))


def test_r6_a_row_s_length_is_its_own_not_the_batch_s() -> None:
    rows = np.array([[0, 1, 2, -1], [100, 200, 300, 301]])
    together = rope_cos_sin(dynamic(), 8, rows)
    for row in range(2):
        alone = rope_cos_sin(dynamic(), 8, rows[row : row + 1])
        assert all(identical(x[row : row + 1], y) for x, y in zip(together, alone, strict=True))
    assert identical(together[0][:1], rope_cos_sin(RopeConfig(), 8, rows[:1])[0])


def test_r6_a_fixed_length_makes_decode_equal_to_prefill() -> None:
    config = replace(LAYERS["mha"], rope=dynamic(seq_len=4 * ORIGINAL))
    weights = integer_weights(config)
    states = small_integers(0, 1, 4, 8)
    positions = np.array([[98, 99, 100, 101]])
    whole = context_encoding(config, weights, states, position_ids=positions)
    cache = empty_cache(config, batch=1, max_length=102)
    for t in range(4):
        part = slice(t, t + 1)
        cache = token_generation(
            config, weights, states[:, part], position_ids=positions[:, part], cache=cache
        ).cache
    assert identical(cache.k, whole.cache.k)


def test_r6_two_channels_cannot_be_stretched() -> None:
    with pytest.raises(ConfigError, match="dynamic NTK scaling needs more than 2 rotated"):
        rope_frequencies(dynamic(), 2, seq_len=100)


def test_the_comparison_sees_a_base_that_grows_without_its_exponent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        golden.rope,
        "dynamic_ntk_theta",
        lambda theta, r, s, n: theta * (s.factor * n / ORIGINAL - (s.factor - 1)),
    )
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_dynamic(64, 2.0, 3 * ORIGINAL)


# R7: LongRoPE


@pytest.mark.parametrize(("seq_len", "long"), [(1, False), (ORIGINAL, False), (ORIGINAL + 1, True)])
def test_r7_each_pair_has_its_divisor_of_the_set_for_the_length(seq_len: int, long: bool) -> None:
    rope = longrope()
    assert isinstance(rope.scaling, LongRopeScaling)
    factors = rope.scaling.long_factor if long else rope.scaling.short_factor
    got = rope_frequencies(rope, 8, seq_len=seq_len)
    assert identical(got, rope_frequencies(RopeConfig(), 8) / np.array(factors))


def test_r7_the_factor_on_cos_and_sin() -> None:
    assert attention_factor(longrope()) == math.sqrt(1 + math.log(16) / math.log(64))
    assert attention_factor(longrope(factor=1.0)) == 1.0
    assert attention_factor(longrope(factor=0.5)) == 1.0
    assert attention_factor(longrope(attention_factor=1.19)) == 1.19
    # in base 64: log(16) / log(64) = 2 / 3
    assert abs(attention_factor(longrope()) - math.sqrt(5 / 3)) <= 2.0**-51


def test_r7_equal_divisors_are_linear_scaling() -> None:
    eight = (8.0,) * 4
    rope = longrope(short_factor=eight, long_factor=eight, attention_factor=1.0)
    linear = RopeConfig(scaling=LinearScaling(factor=8.0))
    positions = np.array([[0, 1, 63, 64, 999]])
    got, want = rope_cos_sin(rope, 8, positions), rope_cos_sin(linear, 8, positions)
    for x, y in zip(got, want, strict=True):
        assert identical(x, y)


def test_r7_sets_of_another_width_are_refused() -> None:
    with pytest.raises(
        ShapeError, match="must have 8 numbers, one per rotated channel pair, got 4"
    ):
        rope_frequencies(longrope(), 16, seq_len=1)


# R8: proportional RoPE


def test_r8_the_share_s_pairs_turn_at_full_width_frequencies_and_the_rest_stand() -> None:
    rope = RopeConfig(theta=1e6, scaling=ProportionalScaling(proportion=0.25, factor=2.0))
    got = rope_frequencies(rope, 64)
    plain = rope_frequencies(RopeConfig(theta=1e6), 64)
    assert identical(got[:8], plain[:8] / 2.0)
    assert (got[8:] == 0).all()
    x = normal(1, 1, 1, 3, 64)
    cos, sin = rope_cos_sin(rope, 64, np.array([[5, 50, 500]]))
    turned = rotate(x, cos, sin, pairing="half")
    still = [*range(8, 32), *range(40, 64)]
    assert identical(turned[..., still], x[..., still])
    assert (turned[..., [0, 32]] != x[..., [0, 32]]).all()


def test_r8_it_is_not_partial_rotation() -> None:
    share = RopeConfig(scaling=ProportionalScaling(proportion=0.5))
    partial = RopeConfig(rotary_dim=8)
    assert identical(rope_frequencies(share, 16)[:1], rope_frequencies(partial, 8)[:1])
    assert rope_frequencies(share, 16)[1] != rope_frequencies(partial, 8)[1]


def test_r8_the_whole_head_is_plain_rope() -> None:
    rope = RopeConfig(scaling=ProportionalScaling(proportion=1.0))
    assert identical(rope_frequencies(rope, 16), rope_frequencies(RopeConfig(), 16))


# R9: DeepSeek's YaRN


def test_r9_equal_mscales_leave_cos_and_sin_and_scale_the_scores() -> None:
    scaling = deepseek_yarn_scaling(
        factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0
    )
    assert attention_factor(RopeConfig(scaling=scaling)) == 1.0
    assert yarn_mscale(40.0, 1.0) == 0.1 * math.log(40.0) + 1.0
    assert yarn_mscale(1.0) == yarn_mscale(0.5, 9.0) == 1.0


def test_r9_without_mscale_all_dim_it_is_the_paper_s_concentration() -> None:
    scaling = deepseek_yarn_scaling(
        factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=0.0
    )
    paper = replace(scaling, attention_factor=0.0)
    assert attention_factor(RopeConfig(scaling=scaling)) == attention_factor(
        RopeConfig(scaling=paper)
    )


# R10, R11: multimodal RoPE

BLOCKS = RopeConfig(mrope_section=(2, 3, 3))
WOVEN = RopeConfig(mrope_section=(4, 2, 2), mrope_interleaved=True)


def test_r10_and_r11_which_axis_turns_which_pair() -> None:
    assert position_axes(BLOCKS, 8).tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert position_axes(WOVEN, 8).tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
    qwen3 = RopeConfig(mrope_section=(24, 20, 20), mrope_interleaved=True)
    axes = position_axes(qwen3, 64).tolist()
    assert axes[:60] == [0, 1, 2] * 20
    assert axes[60:] == [0] * 4


@pytest.mark.parametrize("rope", [BLOCKS, WOVEN])
def test_r10_equal_positions_on_every_axis_are_plain_rope(rope: RopeConfig) -> None:
    positions = np.array([[0, 3, 99], [7, 8, -1]])
    plain = rope_cos_sin(RopeConfig(), 16, positions)
    for given_positions in (np.stack([positions] * 3), positions):
        got = rope_cos_sin(rope, 16, given_positions)
        assert all(identical(x, y) for x, y in zip(got, plain, strict=True))


@pytest.mark.parametrize("rope", [BLOCKS, WOVEN])
def test_r10_each_axis_turns_its_own_pairs_alone(rope: RopeConfig) -> None:
    positions = np.stack([np.array([[5, 6]])] * 3)
    base, axes = rope_cos_sin(rope, 16, positions)[0], position_axes(rope, 8)
    for axis in range(3):
        moved = positions.copy()
        moved[axis] += 11
        changed = (rope_cos_sin(rope, 16, moved)[0] != base).any(axis=(0, 1))
        assert (changed == (axes == axis)).all()


@pytest.mark.parametrize("rope", [BLOCKS, WOVEN])
def test_r10_a_layer_rotates_by_rotary_positions_and_masks_by_its_own(rope: RopeConfig) -> None:
    config = AttentionConfig(
        hidden_size=16,
        num_attention_heads=1,
        num_key_value_heads=1,
        rope=rope,
        sliding_window=3,
        softmax_scale=2.0**-6,
    )
    weights = integer_weights(config)
    states = small_integers(1, 2, 6, 16)
    ids = np.tile(np.arange(6), (2, 1))
    grid = np.stack([ids // 4, ids % 4 // 2, ids % 2])
    plain = context_encoding(
        config, weights, states, position_ids=ids, rotary_position_ids=np.stack([ids] * 3)
    )
    assert identical(
        plain.output, context_encoding(config, weights, states, position_ids=ids).output
    )
    capture = Capture()
    image = context_encoding(
        config, weights, states, position_ids=ids, rotary_position_ids=grid, observe=capture
    )
    assert not identical(image.output, plain.output)
    assert capture.values["weights"][0, 0, 5, :3].tolist() == [0, 0, 0]
    cache = empty_cache(config, batch=2, max_length=6)
    rows = []
    for t in range(6):
        step = slice(t, t + 1)
        result = forward(
            config,
            weights,
            states[:, step],
            position_ids=ids[:, step],
            rotary_position_ids=grid[..., step],
            cache=cache,
        )
        cache = result.cache
        rows.append(capture.values["k_cache"][:, :, step])
    assert identical(cache.k, np.concatenate(rows, axis=2))


def test_positions_with_axes_need_sections() -> None:
    three = np.zeros((3, 1, 2), dtype=np.int64)
    with pytest.raises(ShapeError, match="positions must have no axes, one per entry of"):
        rope_cos_sin(RopeConfig(), 16, three)
    with pytest.raises(ShapeError, match="positions must have 3 axes"):
        rope_cos_sin(BLOCKS, 16, three[:2])
    config = replace(LAYERS["mha"], rope=None)
    with pytest.raises(ConfigError, match="rotary_position_ids need a layer with rope"):
        context_encoding(
            config,
            integer_weights(config),
            np.zeros((1, 1, 8)),
            position_ids=[0],
            rotary_position_ids=[[0]],
        )
    with pytest.raises(ShapeError, match=re.escape("integers of shape (axes, 1, 1)")):
        context_encoding(
            LAYERS["mha"],
            integer_weights(LAYERS["mha"]),
            np.zeros((1, 1, 8)),
            position_ids=[0],
            rotary_position_ids=np.zeros((3, 1, 2), dtype=int),
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dynamic(0.0), "factor must be positive, got 0.0"),
        (lambda: dynamic(seq_len=-1), "seq_len must be positive or 0 (each row's own), got -1"),
        (
            lambda: longrope(original_max_position_embeddings=1),
            "original_max_position_embeddings must exceed 1, got 1",
        ),
        (
            lambda: longrope(long_factor=(1.0,)),
            "must have one number per channel pair, got 4 and 1",
        ),
        (lambda: longrope(long_factor=(0.0,) * 4), "must be positive divisors"),
        (
            lambda: ProportionalScaling(proportion=0.0),
            "proportion must lie above 0 and be at most 1, got 0.0",
        ),
        (
            lambda: RopeConfig(mrope_section=(2, 2), rotary_dim=10),
            "mrope_section must sum to rotary_dim / 2 = 5 pairs, got (2, 2)",
        ),
        (lambda: RopeConfig(mrope_interleaved=True), "mrope_interleaved requires mrope_section"),
        (
            lambda: RopeConfig(mrope_section=(2, -1)),
            "mrope_section must hold channel pairs per axis, got (2, -1)",
        ),
        (
            lambda: replace(LAYERS["mha"], rope=RopeConfig(mrope_section=(1, 2))),
            "rope.mrope_section must sum to the 2 channel pairs that rotate, got (1, 2)",
        ),
    ],
)
def test_an_embedding_that_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()
