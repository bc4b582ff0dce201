from __future__ import annotations

import cmath
import math
import re
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import U, assert_within, gamma, identical, normal, sampled

import golden.rope
from golden import (
    Accumulation,
    Array,
    Capture,
    LinearScaling,
    Llama3Scaling,
    Observer,
    RopeConfig,
    ShapeError,
    YarnScaling,
    attention_factor,
    rope_cos_sin,
    rope_frequencies,
    rotate,
    unobserved,
)

DIGITS = 50
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")
THETAS = [10000.0, 150000.0, 500000.0, 1000000.0]


def exact_frequencies(theta: float, rotary_dim: int) -> list[Decimal]:
    """R1 in 50 digits."""
    with localcontext() as context:
        context.prec = DIGITS
        return [Decimal(theta) ** (Decimal(-2 * i) / rotary_dim) for i in range(rotary_dim // 2)]


def as_array(values: list[Decimal]) -> Array:
    return np.array([float(value) for value in values])


def frequency_error(theta: float) -> float:
    """Bound the relative error of a float64 frequency.

    The exponent is at most 1 and rounded once, which `log(theta)` turns into a relative error of
    the power; the power itself, its reciprocal and a scaling add at most 10 roundings.
    """
    return gamma(math.log(theta) + 10.0)


def dials(rope: RopeConfig, rotary_dim: int, positions: list[int]) -> tuple[Array, Array]:
    return rope_cos_sin(rope, rotary_dim, np.array([positions], dtype=np.int64))


# R1 to R4: frequencies


@pytest.mark.parametrize("theta", [*THETAS, 2.0, 10.0])
@pytest.mark.parametrize("rotary_dim", [2, 6, 64, 128, 256])
def test_r1_frequencies_are_powers_of_theta(theta: float, rotary_dim: int) -> None:
    got = rope_frequencies(RopeConfig(theta=theta), rotary_dim)
    want = as_array(exact_frequencies(theta, rotary_dim))
    assert_within(got, want, frequency_error(theta) * want)
    assert got[0] == 1.0


@pytest.mark.parametrize("factor", [1.0, 2.0, 4.0, 0.5, 32.0])
def test_r2_linear_scaling_divides_every_frequency(factor: float) -> None:
    scaled = rope_frequencies(RopeConfig(scaling=LinearScaling(factor=factor)), 64)
    assert identical(scaled, rope_frequencies(RopeConfig(), 64) / factor)


@pytest.mark.parametrize("factor", [2, 8])
def test_r2_linear_scaling_reads_position_p_as_p_over_factor(factor: int) -> None:
    scaled = RopeConfig(scaling=LinearScaling(factor=float(factor)))
    stretched = dials(scaled, 16, [factor * p for p in range(20)])
    assert all(map(identical, stretched, dials(RopeConfig(), 16, list(range(20)))))


def llama3_by_hand(theta: float, rotary_dim: int, scaling: Llama3Scaling) -> list[Decimal]:
    """Llama 3.1's three cases, by wavelength, in 50 digits."""
    with localcontext() as context:
        context.prec = DIGITS
        length = Decimal(scaling.original_max_position_embeddings)
        low, high = Decimal(scaling.low_freq_factor), Decimal(scaling.high_freq_factor)
        scaled = []
        for frequency in exact_frequencies(theta, rotary_dim):
            wavelength = 2 * PI / frequency
            divided = frequency / Decimal(scaling.factor)
            if wavelength < length / high:
                scaled.append(frequency)
            elif wavelength > length / low:
                scaled.append(divided)
            else:
                smooth = (length / wavelength - low) / (high - low)
                scaled.append((1 - smooth) * divided + smooth * frequency)
        return scaled


def check_llama3(theta: float, rotary_dim: int, scaling: Llama3Scaling) -> None:
    got = rope_frequencies(RopeConfig(theta=theta, scaling=scaling), rotary_dim)
    want = as_array(llama3_by_hand(theta, rotary_dim, scaling))
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # the ramp errs by its numerator's terms (at most high + low, each with the frequency's own
    # relative error and 4 roundings) over its denominator, and moves the result by as much of it
    ramp = (high + low) / (high - low) * (frequency_error(theta) + gamma(6))
    unscaled = as_array(exact_frequencies(theta, rotary_dim))
    assert_within(got, want, (ramp + frequency_error(theta) + gamma(6)) * unscaled)


@sampled
@given(
    theta=st.sampled_from(THETAS),
    rotary_dim=st.sampled_from([8, 64, 128]),
    factor=st.floats(1.0, 64.0),
    low=st.floats(0.25, 4.0),
    ratio=st.floats(1.5, 8.0),
    length=st.sampled_from([2048, 8192, 10000]),
)
def test_r3_llama3_scaling_has_the_three_cases_of_its_model_code(
    theta: float, rotary_dim: int, factor: float, low: float, ratio: float, length: int
) -> None:
    check_llama3(
        theta,
        rotary_dim,
        Llama3Scaling(
            factor=factor,
            low_freq_factor=low,
            high_freq_factor=low * ratio,
            original_max_position_embeddings=length,
        ),
    )


LLAMA31 = Llama3Scaling(
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def test_r3_the_comparison_sees_a_ramp_in_wavelength(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_wavelength(frequencies: Array, scaling: Llama3Scaling) -> Array:
        wavelength = 2.0 * math.pi / frequencies
        length = scaling.original_max_position_embeddings
        shortest, longest = length / scaling.high_freq_factor, length / scaling.low_freq_factor
        divided = np.clip((wavelength - shortest) / (longest - shortest), 0.0, 1.0)
        blended: Array = divided * frequencies / scaling.factor + (1.0 - divided) * frequencies
        return blended

    check_llama3(500000.0, 128, LLAMA31)
    monkeypatch.setattr(golden.rope, "_llama3", in_wavelength)
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_llama3(500000.0, 128, LLAMA31)


def test_r3_outside_the_ramp_frequencies_are_kept_or_divided_bit_for_bit() -> None:
    rope = RopeConfig(theta=500000.0, scaling=LLAMA31)
    plain, scaled = rope_frequencies(RopeConfig(theta=500000.0), 128), rope_frequencies(rope, 128)
    wavelength = 2.0 * math.pi / plain
    kept, divided = wavelength < 2048 * (1 - 1e-9), wavelength > 8192 * (1 + 1e-9)
    assert kept.any()
    assert divided.any()
    assert (~kept & ~divided).any()
    assert identical(scaled[kept], plain[kept])
    assert identical(scaled[divided], plain[divided] / 8.0)
    between = ~kept & ~divided
    assert (scaled[between] > plain[between] / 8.0).all()
    assert (scaled[between] < plain[between]).all()


@pytest.mark.parametrize("nudge", [-1, 0, 1])
@pytest.mark.parametrize("pair", [0, 5, 11])
def test_r3_a_wavelength_exactly_at_a_border_belongs_to_both_of_its_sides(
    pair: int, nudge: int
) -> None:
    plain = rope_frequencies(RopeConfig(), 32)
    turns = 8192 * float(plain[pair]) / (2.0 * math.pi)
    border = turns + nudge * math.ulp(turns)
    for low, high, want in (
        (border, 4.0 * border, plain[pair] / 8.0),
        (border / 4.0, border, plain[pair]),
    ):
        scaling = Llama3Scaling(
            factor=8.0,
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position_embeddings=8192,
        )
        got = rope_frequencies(RopeConfig(scaling=scaling), 32)[pair]
        assert abs(got - want) <= gamma(12) * plain[pair]


def test_r3_equal_factors_cut_without_a_ramp() -> None:
    scaling = Llama3Scaling(
        factor=16.0,
        low_freq_factor=1.0,
        high_freq_factor=1.0,
        original_max_position_embeddings=8192,
    )
    plain = rope_frequencies(RopeConfig(theta=500000.0), 128)
    scaled = rope_frequencies(RopeConfig(theta=500000.0, scaling=scaling), 128)
    long = 2.0 * math.pi / plain > 8192
    assert long.any()
    assert not long.all()
    assert identical(scaled, np.where(long, plain / 16.0, plain))


def turning(turns: float, theta: float, rotary_dim: int, length: int) -> Decimal:
    """Return the (fractional) channel pair that turns so often over the context, by bisection."""
    with localcontext() as context:
        context.prec = DIGITS
        few, many = Decimal(8 * rotary_dim), Decimal(-8 * rotary_dim)
        for _ in range(140):
            middle = (few + many) / 2
            angle = length * Decimal(theta) ** (-2 * middle / rotary_dim)
            if angle / (2 * PI) > Decimal(turns):
                many = middle
            else:
                few = middle
        return few


def yarn_ends(theta: float, rotary_dim: int, scaling: YarnScaling) -> tuple[Decimal, Decimal]:
    """Return the channel pairs where YaRN's ramp starts and ends."""
    length = scaling.original_max_position_embeddings
    start = turning(scaling.beta_fast, theta, rotary_dim, length)
    end = turning(scaling.beta_slow, theta, rotary_dim, length)
    if scaling.truncate:
        for channel in (start, end):  # rounding must not depend on the last bit
            assert abs(channel - channel.to_integral_value()) > Decimal("1e-9")
        return Decimal(math.floor(start)), Decimal(math.ceil(end))
    return start, end


def check_yarn(theta: float, rotary_dim: int, scaling: YarnScaling) -> None:
    got = rope_frequencies(RopeConfig(theta=theta, scaling=scaling), rotary_dim)
    start, end = yarn_ends(theta, rotary_dim, scaling)
    assert 0 <= start < end <= rotary_dim - 1
    want = []
    with localcontext() as context:
        context.prec = DIGITS
        for i, frequency in enumerate(exact_frequencies(theta, rotary_dim)):
            interpolated = min(max((i - start) / (end - start), Decimal(0)), Decimal(1))
            divided = frequency / Decimal(scaling.factor)
            want.append(interpolated * divided + (1 - interpolated) * frequency)
    # an end of the ramp is `rotary_dim` times a quotient of logs, each with a few roundings
    ends = 0.0 if scaling.truncate else 2.0 * gamma(8) * rotary_dim / float(end - start)
    unscaled = as_array(exact_frequencies(theta, rotary_dim))
    bound = (ends + gamma(8) + frequency_error(theta)) * unscaled
    assert_within(got, as_array(want), bound)


@sampled
@given(
    theta=st.sampled_from(THETAS),
    rotary_dim=st.sampled_from([8, 64, 128]),
    factor=st.floats(1.0, 64.0),
    slow=st.floats(0.5, 4.0),
    ratio=st.floats(4.0, 32.0),
    length=st.sampled_from([2048, 4096, 32768]),
    truncate=st.booleans(),
)
def test_r4_yarn_ramps_between_the_channels_that_turn_beta_fast_and_beta_slow_times(
    theta: float,
    rotary_dim: int,
    factor: float,
    slow: float,
    ratio: float,
    length: int,
    truncate: bool,
) -> None:
    scaling = YarnScaling(
        factor=factor,
        original_max_position_embeddings=length,
        beta_fast=slow * ratio,
        beta_slow=slow,
        truncate=truncate,
    )
    check_yarn(theta, rotary_dim, scaling)


GPT_OSS = YarnScaling(factor=32.0, original_max_position_embeddings=4096, truncate=False)


def test_r4_the_comparison_sees_ends_that_are_rounded_against_the_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_yarn(150000.0, 64, GPT_OSS)
    right = golden.rope._yarn

    def rounded(frequencies: Array, theta: float, rotary_dim: int, scaling: YarnScaling) -> Array:
        outward = YarnScaling(
            factor=scaling.factor,
            original_max_position_embeddings=scaling.original_max_position_embeddings,
        )
        return right(frequencies, theta, rotary_dim, outward)

    monkeypatch.setattr(golden.rope, "_yarn", rounded)
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_yarn(150000.0, 64, GPT_OSS)


def test_r4_frequencies_beyond_the_ramp_are_kept_or_divided_bit_for_bit() -> None:
    rope = RopeConfig(theta=150000.0, scaling=GPT_OSS)
    plain, scaled = rope_frequencies(RopeConfig(theta=150000.0), 64), rope_frequencies(rope, 64)
    turns = 4096 * plain / (2.0 * math.pi)
    assert identical(scaled[turns > 32], plain[turns > 32])
    assert identical(scaled[turns < 1], plain[turns < 1] / 32.0)


def test_r4_a_factor_of_1_changes_no_frequency_beyond_roundoff() -> None:
    scaling = YarnScaling(factor=1.0, original_max_position_embeddings=4096)
    plain = rope_frequencies(RopeConfig(), 64)
    assert_within(rope_frequencies(RopeConfig(scaling=scaling), 64), plain, gamma(4) * plain)
    assert attention_factor(RopeConfig(scaling=scaling)) == 1.0


@pytest.mark.parametrize(
    ("theta", "length", "divisor"),
    [(10000.0, 4, 8.0), (10.0, 100000, 1.0)],
    ids=["all-turn-less-than-beta-slow", "all-turn-more-than-beta-fast"],
)
def test_r4_a_context_that_puts_every_channel_on_one_side_of_the_ramp(
    theta: float, length: int, divisor: float
) -> None:
    scaling = YarnScaling(factor=8.0, original_max_position_embeddings=length)
    plain = rope_frequencies(RopeConfig(theta=theta), 8)
    scaled = rope_frequencies(RopeConfig(theta=theta, scaling=scaling), 8)
    assert_within(scaled, plain / divisor, gamma(4) * plain)


def test_r4_a_context_in_which_no_channel_turns_once_divides_them_all() -> None:
    # 6 positions turn pair 0 6 / (2 pi) < 1 times; both ends of the ramp round to channel 0
    scaling = YarnScaling(factor=8.0, original_max_position_embeddings=6)
    plain = rope_frequencies(RopeConfig(), 8)
    assert identical(rope_frequencies(RopeConfig(scaling=scaling), 8), plain / 8.0)


def test_r4_a_ramp_of_no_width_keeps_the_channels_before_it() -> None:
    # 12,700 positions turn channel 7 of theta 10 more than 32 times: both ends meet at the last
    scaling = YarnScaling(factor=8.0, original_max_position_embeddings=12700)
    plain = rope_frequencies(RopeConfig(theta=10.0), 8)
    assert identical(rope_frequencies(RopeConfig(theta=10.0, scaling=scaling), 8), plain)


@pytest.mark.parametrize("factor", [1.0, 4.0, 32.0, 40.0])
def test_r4_the_attention_factor_grows_with_the_log_of_the_factor(factor: float) -> None:
    scaling = YarnScaling(factor=factor, original_max_position_embeddings=4096)
    got = attention_factor(RopeConfig(scaling=scaling))
    with localcontext() as context:
        context.prec = DIGITS
        want = float(Decimal(factor).ln() / 10 + 1)
    assert abs(got - want) <= gamma(4) * want


def test_r4_a_given_attention_factor_replaces_the_computed_one() -> None:
    scaling = YarnScaling(factor=8.0, original_max_position_embeddings=4096, attention_factor=0.75)
    assert attention_factor(RopeConfig(scaling=scaling)) == 0.75


@pytest.mark.parametrize(
    "scaling", [None, LinearScaling(factor=4.0), LLAMA31], ids=["none", "linear", "llama3"]
)
def test_only_yarn_has_an_attention_factor(
    scaling: LinearScaling | Llama3Scaling | None,
) -> None:
    assert attention_factor(RopeConfig(scaling=scaling)) == 1.0


def test_cosine_and_sine_carry_the_attention_factor() -> None:
    rope = RopeConfig(theta=150000.0, scaling=GPT_OSS)
    cos, sin = dials(rope, 64, [0, 1, 5000])
    factor = attention_factor(rope)
    assert_within(cos**2 + sin**2, np.full(cos.shape, factor**2), gamma(16) * factor**2)
    assert (cos[0, 0] == factor).all()


@pytest.mark.parametrize("position", [0, 1, 127, 128, 4097, 16384, 16385, 131071, 2**20 + 1])
def test_angles_of_late_positions_lose_only_their_own_rounding(position: int) -> None:
    rope = RopeConfig(theta=500000.0)
    cos, sin = dials(rope, 16, [position])
    frequencies = rope_frequencies(rope, 16)
    for pair in range(8):
        with localcontext() as context:
            context.prec = DIGITS
            angle = Decimal(position) * Decimal(float(frequencies[pair])) % (2 * PI)
        bound = position * float(frequencies[pair]) * U + 4.0 * U
        assert abs(cos[0, 0, pair] - math.cos(angle)) <= bound
        assert abs(sin[0, 0, pair] - math.sin(angle)) <= bound


# R5: rotation


def rotate_by_hand(x: Array, cos: Array, sin: Array, pairing: str) -> Array:
    """Multiply each pair, read as a complex number, by `cos + i sin`."""
    pairs = cos.shape[-1]
    out: Array = x.copy()
    for b, h, t, i in np.ndindex(*x.shape[:3], pairs):
        first, second = (i, i + pairs) if pairing == "half" else (2 * i, 2 * i + 1)
        turn = complex(cos[b, t, i], sin[b, t, i])
        turned = complex(x[b, h, t, first], x[b, h, t, second]) * turn
        out[b, h, t, first], out[b, h, t, second] = turned.real, turned.imag
    return out


def check_rotation(
    seed: int, pairing: str, pairs: int, passed: int, observe: Observer = unobserved
) -> None:
    x = normal(seed, 2, 3, 4, 2 * pairs + passed, size=3.0)
    angles = normal(seed + 1, 2, 4, pairs, size=5.0)
    cos, sin = np.cos(angles), np.sin(angles)
    got = rotate(x, cos, sin, pairing=pairing, observe=observe)
    bound = gamma(3) * np.linalg.norm(x, axis=-1, keepdims=True)
    assert_within(got, rotate_by_hand(x, cos, sin, pairing), bound)
    assert identical(got[..., 2 * pairs :], x[..., 2 * pairs :])


@sampled
@given(
    seed=st.integers(0, 2**32),
    pairing=st.sampled_from(["half", "interleaved"]),
    pairs=st.integers(1, 5),
    passed=st.integers(0, 3),
)
def test_r5_rotation_multiplies_complex_pairs_and_passes_the_rest(
    seed: int, pairing: str, pairs: int, passed: int
) -> None:
    check_rotation(seed, pairing, pairs, passed)


def turned_the_other_way(
    stage: str, value: Array, accumulation: Accumulation | None = None, /
) -> Array:
    return -value if stage == "q_rope_sin" else value


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_r5_the_comparison_sees_a_turn_the_other_way(pairing: str) -> None:
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_rotation(0, pairing, 2, 1, turned_the_other_way)


@pytest.mark.parametrize(
    ("pairing", "want"), [("half", [-3.0, -4.0, 1.0, 2.0]), ("interleaved", [-2.0, 1.0, -4.0, 3.0])]
)
def test_r5_a_quarter_turn_shows_which_channels_pair(pairing: str, want: list[float]) -> None:
    x = np.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    turned = rotate(x, np.zeros((1, 1, 2)), np.ones((1, 1, 2)), pairing=pairing)
    assert turned[0, 0, 0].tolist() == want


def test_r5_the_pairings_are_one_permutation_apart() -> None:
    x = normal(0, 2, 3, 4, 8)
    cos, sin = dials(RopeConfig(), 8, [0, 1, 2, 3])
    cos, sin = np.repeat(cos, 2, axis=0), np.repeat(sin, 2, axis=0)
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    half = rotate(x, cos, sin, pairing="half")
    interleaved = rotate(x[..., order], cos, sin, pairing="interleaved")
    assert identical(half[..., order], interleaved)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_r5_position_0_changes_nothing(pairing: str) -> None:
    x = normal(0, 1, 2, 1, 8)
    cos, sin = dials(RopeConfig(), 8, [0])
    assert (rotate(x, cos, sin, pairing=pairing) == x).all()


@sampled
@given(
    seed=st.integers(0, 2**32),
    pairing=st.sampled_from(["half", "interleaved"]),
    theta=st.sampled_from(THETAS),
    query=st.integers(0, 40),
    key=st.integers(0, 40),
    shift=st.sampled_from([1, 128, 4096, 16384, 20001]),
    scaling=st.sampled_from([None, LinearScaling(factor=4.0), LLAMA31, GPT_OSS]),
)
def test_r5_scores_depend_on_the_difference_of_positions_only(
    seed: int,
    pairing: str,
    theta: float,
    query: int,
    key: int,
    shift: int,
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None,
) -> None:
    rope = RopeConfig(theta=theta, scaling=scaling)
    q, k = normal(seed, 1, 1, 2, 8), normal(seed + 1, 1, 1, 2, 8)
    q[:, :, 1], k[:, :, 1] = q[:, :, 0], k[:, :, 0]
    turned_q = rotate(q, *dials(rope, 8, [query, query + shift]), pairing=pairing)
    turned_k = rotate(k, *dials(rope, 8, [key, key + shift]), pairing=pairing)
    here, there = np.einsum("bhtd,bhtd->bht", turned_q, turned_k)[0, 0]
    # each of four angles is at most the last position and rounded once; the rest is elementwise
    size = float(np.linalg.norm(q[0, 0, 0]) * np.linalg.norm(k[0, 0, 0]))
    size *= attention_factor(rope) ** 2
    assert abs(here - there) <= (gamma(8 + 48) + 4.0 * U * (shift + 40)) * size


def test_r5_turning_back_returns_the_vector() -> None:
    x = normal(0, 1, 2, 3, 6)
    cos, sin = dials(RopeConfig(), 6, [3, 500, 16385])
    back = rotate(rotate(x, cos, sin, pairing="half"), cos, -sin, pairing="half")
    assert_within(back, x, gamma(16) * np.linalg.norm(x, axis=-1, keepdims=True))
    norms = np.linalg.norm(rotate(x, cos, sin, pairing="half"), axis=-1)
    assert_within(norms, np.linalg.norm(x, axis=-1), gamma(24) * np.linalg.norm(x, axis=-1))


def test_r5_a_single_pair_turns_like_a_clock() -> None:
    x = np.array([1.0, 0.0]).reshape(1, 1, 1, 2).repeat(9, axis=2)
    cos, sin = dials(RopeConfig(), 2, list(range(9)))
    turned = rotate(x, cos, sin, pairing="half")[0, 0]
    for position in range(9):
        want = cmath.exp(1j * position)
        assert abs(complex(*turned[position]) - want) <= gamma(6)


def test_r5_more_pairs_than_channels_are_refused() -> None:
    message = "cos must hold at most 2 channel pairs, got 3"
    with pytest.raises(ShapeError, match=re.escape(message)):
        rotate(np.ones((1, 1, 1, 5)), np.ones((1, 1, 3)), np.ones((1, 1, 3)), pairing="half")


@pytest.mark.parametrize("name", ["q", "k"])
def test_r5_the_parts_of_a_rotation_are_observed_under_their_name(name: str) -> None:
    capture = Capture()
    x = normal(0, 1, 2, 3, 6)
    cos, sin = dials(RopeConfig(), 4, [1, 2, 3])
    turned = rotate(x, cos, sin, pairing="half", observe=capture, name=name)
    parts = capture.values[f"{name}_rope_cos"] + capture.values[f"{name}_rope_sin"]
    assert identical(turned[..., :4], parts)
    assert identical(turned, capture.values[f"{name}_rope"])
    assert set(capture.values) == {f"{name}_rope{part}" for part in ("", "_cos", "_sin")}
