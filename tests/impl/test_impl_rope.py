import math
from typing import Any

import pytest
import torch

from impl import (
    ConfigError,
    PolarRotaryEmbedding,
    RotaryEmbedding,
    RotaryFrequencies,
    ShapeError,
    apply_rotary_polar_compatible,
    apply_rotary_pos_emb,
    rotation,
)
from impl.rope_scalings import yarn_mscale

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.5, 2.0],
    "long_factor": [1.0, 3.0, 7.0, 31.0],
    "factor": 32.0,
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64}


def heads(
    dtype: torch.dtype = torch.float64, width: int = 8, seq_len: int = 5
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, seq_len, width, generator=generator, dtype=torch.float64)
    k = torch.randn(2, 2, seq_len, width, generator=generator, dtype=torch.float64)
    return q.to(dtype), k.to(dtype)


def place(seq_len: int = 5, start: int = 0) -> torch.Tensor:
    return (torch.arange(seq_len) + start).expand(2, seq_len)


def test_default_frequencies_are_powers_of_the_base() -> None:
    got = RotaryFrequencies.from_parameters(8, None, rope_theta=10000.0)
    assert got.inv_freq == pytest.approx([1.0, 0.1, 0.01, 0.001], rel=1e-15)
    assert got.attention_scaling == 1.0


def test_linear_divides_every_frequency() -> None:
    got = RotaryFrequencies.from_parameters(8, {"rope_type": "linear", "factor": 4.0})
    assert got.inv_freq[0] == 0.25


def test_llama3_keeps_fast_channels_and_divides_slow_ones() -> None:
    plain = RotaryFrequencies.from_parameters(64, None, rope_theta=500000.0).inv_freq
    got = RotaryFrequencies.from_parameters(64, LLAMA3).inv_freq
    assert got[0] == plain[0]
    assert got[-1] == plain[-1] / 8
    ratios = [g / p for g, p in zip(got, plain, strict=True)]
    assert ratios == sorted(ratios, reverse=True)
    assert any(1 / 8 < r < 1 for r in ratios)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, 0.1 * math.log(32) + 1),
        ({"attention_factor": 1.25}, 1.25),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        (
            {"mscale": 0.707, "mscale_all_dim": 1.0},
            (0.0707 * math.log(32) + 1) / (0.1 * math.log(32) + 1),
        ),
        ({"mscale": 0.707}, 0.1 * math.log(32) + 1),
        ({"factor": 1.0}, 1.0),
    ],
)
def test_yarn_attention_scaling(extra: dict[str, Any], expected: Any) -> None:
    got = RotaryFrequencies.from_parameters(64, {**YARN, **extra})
    assert math.isclose(got.attention_scaling, expected, rel_tol=1e-15)


@pytest.mark.parametrize("factor", [1.0, 4.0, 40.0])
@pytest.mark.parametrize("mscale", [0.707, 1.0])
def test_deepseek_scales_scores_by_the_square_of_its_mscale(factor: float, mscale: float) -> None:
    deepseek = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    assert yarn_mscale(factor, mscale) == deepseek.yarn_get_mscale(factor, mscale)


def test_yarn_truncates_its_ramp_unless_told_not_to() -> None:
    rounded = RotaryFrequencies.from_parameters(64, YARN).inv_freq
    exact = RotaryFrequencies.from_parameters(64, {**YARN, "truncate": False}).inv_freq
    assert rounded != exact
    assert (rounded[0], rounded[-1]) == (exact[0], exact[-1])


def test_yarn_derives_its_factor_from_the_longest_position() -> None:
    without = {**YARN, "factor": None}
    got = RotaryFrequencies.from_parameters(64, without, max_position_embeddings=32 * 4096)
    assert got == RotaryFrequencies.from_parameters(64, YARN)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"rope_type": "su"}, "rope_type must be one of"),
        ({"sliding_attention": {"rope_type": "default"}}, "be those of one layer type"),
        ({"rope_type": "dynamic", "original_max_position_embeddings": 64}, "factor"),
        ({"rope_type": "dynamic", "factor": 2.0}, "original_max_position_embeddings"),
        ({"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.25}, "2 rotated"),
        ({**LONGROPE, "short_factor": [1.0] * 3}, "hold 4 positive numbers"),
        ({**LONGROPE, "long_factor": [1.0, 1.0, 0.0, 1.0]}, "hold 4 positive numbers"),
        ({**LONGROPE, "long_factor": None}, "long_factor"),
        ({**LONGROPE, "factor": None}, "factor"),
        ({**LONGROPE, "original_max_position_embeddings": 1}, "exceed 1, got 1"),
        ({"rope_type": "proportional", "partial_rotary_factor": 0.0}, "lie above 0"),
        ({"mrope_section": [2, 1]}, "add up to the 4 rotated channel pairs"),
        ({"mrope_section": [5, -1]}, "add up to the 4 rotated channel pairs"),
        ({"mrope_interleaved": True}, "come with mrope_section"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
        ({**LLAMA3, "high_freq_factor": 0.5}, "high_freq_factor must be at least"),
        ({"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings"),
        ({**YARN, "factor": None}, "factor"),
        ({"partial_rotary_factor": 0.4}, "even number"),
        ({"partial_rotary_factor": 2.0}, "even number"),
        ({"rope_theta": 0.5}, "rope_theta must exceed 1"),
    ],
)
def test_unusable_parameters_are_refused(parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RotaryFrequencies.from_parameters(8, parameters)


def test_half_pairing_turns_channel_i_with_i_plus_half() -> None:
    q, k = heads()
    cos, sin = RotaryEmbedding(8)(q, place(start=3))
    got, _ = apply_rotary_pos_emb(q, k, cos, sin)
    for t in range(5):
        for i in range(4):
            turn = complex(math.cos((t + 3) * 10**-i), math.sin((t + 3) * 10**-i))
            expected = complex(q[1, 2, t, i], q[1, 2, t, i + 4]) * turn
            assert abs(complex(got[1, 2, t, i], got[1, 2, t, i + 4]) - expected) < 1e-14


def test_interleaved_pairing_turns_even_with_odd() -> None:
    q, k = heads()
    cos, sin = PolarRotaryEmbedding(RotaryFrequencies.from_parameters(8))(q, place(start=3))
    _, got = apply_rotary_polar_compatible(q, k, cos, sin)
    for t in range(5):
        for i in range(4):
            turn = complex(math.cos((t + 3) * 10**-i), math.sin((t + 3) * 10**-i))
            expected = complex(k[1, 1, t, 2 * i], k[1, 1, t, 2 * i + 1]) * turn
            assert abs(complex(got[1, 1, t, 2 * i], got[1, 1, t, 2 * i + 1]) - expected) < 1e-14


def test_partial_rotation_leaves_the_last_channels_alone() -> None:
    q, k = heads(width=16)
    rotary = RotaryEmbedding(16, rope_parameters={"partial_rotary_factor": 0.5})
    cos, sin = rotary(q, place(start=7))
    turned, _ = apply_rotary_pos_emb(q, k, cos, sin)
    whole, _ = apply_rotary_pos_emb(q[..., :8], k[..., :8], *RotaryEmbedding(8)(q, place(start=7)))
    assert cos.shape == (2, 5, 8)
    assert torch.equal(turned[..., 8:], q[..., 8:])
    assert torch.equal(turned[..., :8], whole)


@pytest.mark.parametrize("kind", [RotaryEmbedding, PolarRotaryEmbedding])
def test_cosines_and_sines_carry_the_attention_scaling(
    kind: type[RotaryEmbedding] | type[PolarRotaryEmbedding],
) -> None:
    frequencies = RotaryFrequencies.from_parameters(64, YARN)
    rotary = RotaryEmbedding(64, rope_parameters=YARN)
    if kind is PolarRotaryEmbedding:
        rotary = PolarRotaryEmbedding(frequencies)
    cos, sin = rotary(torch.zeros(1, dtype=torch.float64), place(start=50))
    lengths = (cos.square() + sin.square()).sqrt()
    assert float((lengths - frequencies.attention_scaling).abs().max()) < 1e-15


def test_scores_depend_only_on_distance() -> None:
    q, k = heads()
    rotary = RotaryEmbedding(8)

    def scores(start: int) -> torch.Tensor:
        a, b = apply_rotary_pos_emb(q[:, :2], k, *rotary(q, place(start=start)))
        return a @ b.transpose(2, 3)

    # Angles near 1000 rad are exact to 1000 u; a score is a sum of 8 products of size below 10.
    assert (scores(0) - scores(1000)).abs().max() < 80 * 1000 * 2**-53


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_casting_a_model_does_not_round_its_frequencies(dtype: torch.dtype) -> None:
    rotary = RotaryEmbedding(64, rope_parameters=LLAMA3)
    before = rotary.inv_freq.clone()
    assert torch.equal(rotary.to(dtype).inv_freq, before)
    assert rotary.inv_freq.dtype is torch.float32


def test_frequencies_survive_construction_on_the_meta_device() -> None:
    with torch.device("meta"):
        rotary = RotaryEmbedding(8)
    assert torch.equal(rotary.to_empty(device="cpu").inv_freq, RotaryEmbedding(8).inv_freq)


def test_angles_are_float32_in_a_bfloat16_model() -> None:
    x = torch.zeros(1, dtype=torch.bfloat16)
    position = torch.tensor([[15962]])
    cos, _ = RotaryEmbedding(8)(x, position)
    assert cos.dtype is torch.bfloat16
    assert float(cos[0, 0, 0]) == float(torch.tensor(math.cos(15962)).to(torch.bfloat16))


def test_interleaved_form_refuses_rounded_angles() -> None:
    q, k = heads(torch.bfloat16)
    low = torch.ones(2, 5, 4, dtype=torch.bfloat16)
    with pytest.raises(ShapeError, match="cos must be float32"):
        apply_rotary_polar_compatible(q, k, low, low)


def test_rotation_rounds_once() -> None:
    q, k = heads(torch.bfloat16, width=64)
    cos, sin = RotaryEmbedding(64)(q, place(start=100))
    got, _ = apply_rotary_pos_emb(q, k, cos, sin)
    wide = [t.double() for t in (q, k, cos, sin)]
    expected, _ = apply_rotary_pos_emb(*wide)
    # float32 inside: a result differs only if it lies within 2^-24 relative of a rounding boundary.
    assert (got != expected.to(torch.bfloat16)).float().mean() < 0.005


@pytest.mark.parametrize(
    ("sections", "axes"),
    [
        ({"mrope_section": [3, 2, 2]}, [0, 0, 0, 1, 1, 2, 2]),
        ({"mrope_section": [3, 2, 2], "mrope_interleaved": True}, [0, 1, 2, 0, 1, 2, 0]),
        ({"mrope_section": [5, 1, 1], "mrope_interleaved": True}, [0, 1, 2, 0, 0, 0, 0]),
        ({"mrope_section": [5, 2, 0], "rope_type": "mrope"}, [0, 0, 0, 0, 0, 1, 1]),
    ],
)
@pytest.mark.parametrize("kind", [RotaryEmbedding, PolarRotaryEmbedding])
def test_each_pair_of_multimodal_rope_turns_by_the_position_of_its_axis(
    kind: Any, sections: dict[str, Any], axes: list[int]
) -> None:
    parameters = {"rope_theta": 100.0, **sections}
    frequencies = RotaryFrequencies.from_parameters(14, parameters)
    rotary = RotaryEmbedding(14, rope_parameters=parameters)
    if kind is PolarRotaryEmbedding:
        rotary = PolarRotaryEmbedding(frequencies)
    assert frequencies.axes == tuple(axes)
    at = torch.tensor([[[3, 4, 5]], [[7, 7, 8]], [[0, 9, 2]]])
    x = torch.zeros(1, dtype=torch.float64)
    got = rotary.angles(x, at)
    for t in range(3):
        for pair, axis in enumerate(axes):
            assert float(got[0, t, pair]) == float(at[axis, 0, t]) * frequencies.inv_freq[pair]
    text = at[0].expand(3, 1, 3)
    assert torch.equal(rotary.angles(x, text), rotary.angles(x, at[0]))


def test_dynamic_rope_grows_its_base_with_the_length_of_each_row() -> None:
    rotary = RotaryEmbedding(8, rope_parameters=DYNAMIC)
    at = torch.stack([torch.arange(5), torch.arange(5) + 251, torch.full((5,), -1)])
    at[0, -1] = 63
    got = rotary.angles(torch.zeros(1, dtype=torch.float64), at)
    grown = 10000.0 * (4 * 256 / 64 - 3) ** (8 / 6)
    for row, base in enumerate((10000.0, grown, 10000.0)):
        for t in range(5):
            for i in range(4):
                expected = int(at[row, t]) * base ** (-2 * i / 8)
                # Four powers and products, of an angle: 8 roundings of 2^-53.
                assert abs(float(got[row, t, i]) - expected) <= 8 * 2**-53 * abs(expected)


def test_longrope_takes_its_second_list_in_rows_that_are_longer() -> None:
    rotary = RotaryEmbedding(8, rope_parameters=LONGROPE)
    at = torch.stack([torch.arange(60, 65), torch.arange(59, 64)])  # 65 and 64 positions
    got = rotary.angles(torch.zeros(1, dtype=torch.float64), at)
    plain = torch.tensor([10000.0 ** (-i / 4) for i in range(4)], dtype=torch.float64)
    rows = torch.tensor([LONGROPE["long_factor"], LONGROPE["short_factor"]], dtype=torch.float64)
    expected = at[:, :, None] * (plain / rows)[:, None]
    # A power, a quotient and a product, each within an ulp of at most 64 rad on either side.
    assert float((got - expected).abs().max()) <= 64 * 6 * 2**-53
    assert math.isclose(rotary.attention_scaling, math.sqrt(1 + math.log(32) / math.log(64)))


def test_proportional_rope_stops_slow_pairs_of_the_whole_head() -> None:
    given = {"rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": 2.0}
    frequencies = RotaryFrequencies.from_parameters(16, given)
    assert frequencies.rotary_dim == 16
    expected = [10000.0 ** (-i / 8) / 2 for i in range(4)] + [0.0] * 4
    assert frequencies.inv_freq == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("parameters", [LONGROPE, DYNAMIC, {"mrope_section": [2, 1, 1]}])
def test_constants_of_every_kind_survive_casts_and_the_meta_device(
    parameters: dict[str, Any],
) -> None:
    expected = RotaryEmbedding(8, rope_parameters=parameters)
    with torch.device("meta"):
        moved = RotaryEmbedding(8, rope_parameters=parameters)
    moved = moved.to_empty(device="cpu").to(torch.bfloat16)
    for name, buffer in expected.named_buffers():
        assert torch.equal(moved.get_buffer(name), buffer)
        assert moved.get_buffer(name).dtype is buffer.dtype


@pytest.mark.parametrize("section", [None, [2, 2]])
def test_positions_of_other_axes_are_refused(section: list[int] | None) -> None:
    rotary = RotaryEmbedding(8, rope_parameters={"mrope_section": section})
    with pytest.raises(ShapeError, match="multimodal"):
        rotary(torch.zeros(1), torch.zeros(3, 2, 5, dtype=torch.int64))


@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
@pytest.mark.parametrize("seq_len", [1, 7])
@pytest.mark.parametrize("rotary_dim", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotate", [apply_rotary_pos_emb, apply_rotary_polar_compatible])
def test_tokens_rotated_in_pieces_keep_every_bit(
    rotate: Any,
    dtype: torch.dtype,
    rotary_dim: int,
    seq_len: int,
    unsqueeze_dim: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    polar = rotate is apply_rotary_polar_compatible
    width = rotary_dim // 2 if polar else rotary_dim
    cos, sin = torch.randn(2, 2, seq_len, width).to(torch.float32 if polar else dtype)
    q, k = torch.randn(2, 2, seq_len, 3, 8).to(dtype)
    if unsqueeze_dim == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    whole = rotate(q, k, cos, sin, unsqueeze_dim)
    monkeypatch.setattr(rotation, "PIECE", 2 * 2 * 3 * 8 if seq_len > 1 else 1)  # two, one at last
    pieces = rotate(q, k, cos, sin, unsqueeze_dim)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))
    with pytest.raises(RuntimeError):  # a table that is too short is no rotation
        rotate(q, k, cos[:, : seq_len - 1], sin[:, : seq_len - 1], unsqueeze_dim)
