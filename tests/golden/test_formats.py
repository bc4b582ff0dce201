"""Formats against a rounding done in exact rational arithmetic, and against ml_dtypes and torch."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from golden import FORMATS, Array, ConfigError
from golden.formats import Format, format_named

NARROW = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
formats = st.sampled_from([FORMATS[name] for name in NARROW])


def every_finite_value(name: str) -> Array:
    """Every finite value of a format of at most 16 bits, from all its bit patterns, ascending."""
    dtype = DTYPES[name]
    patterns = np.arange(1 << 8 * dtype.itemsize, dtype=f"u{dtype.itemsize}")
    with np.errstate(invalid="ignore"):  # signalling NaNs are among the patterns
        values = patterns.view(dtype).astype(np.float64)
    return np.unique(values[np.isfinite(values)])


def rounded_exactly(form: Format, x: float) -> float:
    """Round to nearest, ties to even, in rational arithmetic: no floating-point operation."""
    if x == 0 or not math.isfinite(x):
        return x
    exact = abs(Fraction(x))
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    if exact < Fraction(2) ** exponent:
        exponent -= 1
    gap = Fraction(2) ** (max(exponent, form.min_exponent) - (form.precision - 1))
    result = round(exact / gap) * gap  # Python rounds fractions half to even
    if result > Fraction(form.largest):
        return math.copysign(math.inf, x)
    return math.copysign(float(result), x)


finite = st.floats(allow_nan=False, allow_infinity=False)


@given(formats, finite)
@settings(max_examples=500, deadline=None)
def test_nearest_is_exact_rounding_to_nearest_ties_to_even(form: Format, x: float) -> None:
    (got,) = form.nearest(np.array([x]))
    expected = rounded_exactly(form, x)
    assert got == expected
    assert math.copysign(1, got) == math.copysign(1, expected)


@given(formats, st.integers(-30, 20), st.integers(0, 2**12), st.integers(-2, 2))
@settings(max_examples=500, deadline=None)
def test_nearest_is_right_at_and_around_ties(
    form: Format, exponent: int, odd: int, away: int
) -> None:
    halfway = (2 * odd + 1) * 2.0 ** (exponent - form.precision)
    x = halfway
    for _ in range(abs(away)):
        x = math.nextafter(x, math.copysign(math.inf, away))
    (got,) = form.nearest(np.array([x]))
    assert got == rounded_exactly(form, x)


@pytest.mark.parametrize("name", NARROW[1:])
def test_every_value_of_a_format_is_kept_and_every_midpoint_goes_to_the_even_one(
    name: str,
) -> None:
    form, values = FORMATS[name], every_finite_value(name)
    np.testing.assert_array_equal(form.nearest(values), values)
    middles = (values[:-1] + values[1:]) / 2
    lower, upper = values[:-1], values[1:]
    # of two neighbours, the even one is an even multiple of the gap between them
    even = np.where(np.fmod(lower / (upper - lower), 2.0) == 0, lower, upper)
    np.testing.assert_array_equal(form.nearest(middles), even)
    np.testing.assert_array_equal(form.nearest(np.nextafter(middles, -np.inf)), lower)
    np.testing.assert_array_equal(form.nearest(np.nextafter(middles, np.inf)), upper)


@pytest.mark.parametrize("name", NARROW)
def test_nearest_agrees_with_the_dtype_on_float32_inputs(name: str) -> None:
    # From float32, which holds every midpoint, the cast rounds once; from float64 ml_dtypes goes
    # through float32 and rounds twice, which the next test shows.
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 2**32, size=200_000, dtype=np.uint32)
    x = patterns.view(np.float32)
    x = x[np.isfinite(x)]
    with np.errstate(over="ignore"):
        cast = x.astype(DTYPES[name]).astype(np.float64)
    beyond = np.abs(x) > FORMATS[name].largest
    got = FORMATS[name].nearest(x.astype(np.float64))
    # float8_e4m3fn has no infinity: its cast gives NaN where this gives infinity
    np.testing.assert_array_equal(got[~beyond], cast[~beyond])
    clear = beyond & ~np.isfinite(cast)
    assert np.isinf(got[clear]).all()


def test_nearest_rounds_once_where_a_cast_through_float32_rounds_twice() -> None:
    form = FORMATS["bfloat16"]
    x = 1 + form.unit_roundoff + 2.0**-40  # just above the midpoint of 1 and its neighbour
    assert float(np.float32(x)) == 1 + form.unit_roundoff
    assert form.nearest(np.array([x]))[0] == 1 + 2 * form.unit_roundoff
    through = np.float32(x).astype(DTYPES["bfloat16"])
    assert float(through) == 1.0


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_constants_are_those_of_torch(name: str) -> None:
    form, info = FORMATS[name], torch.finfo(getattr(torch, name))
    assert form.largest == info.max
    assert 2 * form.unit_roundoff == info.eps
    assert 2.0**form.min_exponent == info.tiny


@pytest.mark.parametrize("name", NARROW[1:])
def test_constants_are_those_of_the_bit_patterns(name: str) -> None:
    form, values = FORMATS[name], every_finite_value(name)
    assert form.largest == values.max()
    smallest = values[values > 0].min()
    assert smallest == 2.0 ** (form.min_exponent - (form.precision - 1))
    assert values[values > 1].min() - 1 == 2 * form.unit_roundoff


@pytest.mark.parametrize("name", NARROW[1:])
def test_ulp_is_the_gap_to_the_next_value(name: str) -> None:
    form, values = FORMATS[name], every_finite_value(name)
    positive = values[values > 0]
    np.testing.assert_array_equal(form.ulp(positive[:-1]), np.diff(positive))
    np.testing.assert_array_equal(form.ulp(-positive[:-1]), np.diff(positive))


@pytest.mark.parametrize("name", NARROW)
def test_ulp_of_zero_is_the_smallest_subnormal(name: str) -> None:
    form = FORMATS[name]
    smallest = 2.0 ** (form.min_exponent - (form.precision - 1))
    assert form.ulp(np.array([0.0, -0.0])).tolist() == [smallest, smallest]


@pytest.mark.parametrize("name", NARROW)
def test_beyond_the_largest_value_lies_infinity_from_half_a_gap_on(name: str) -> None:
    form = FORMATS[name]
    half = float(form.ulp(np.array([form.largest]))[0]) / 2
    below, at = np.nextafter(form.largest + half, 0.0), form.largest + half
    got = form.nearest(np.array([below, -below, math.inf, -math.inf, 2 * at]))
    np.testing.assert_array_equal(got, [form.largest, -form.largest, math.inf, -math.inf, math.inf])
    # halfway itself goes to the even neighbour, which for these formats lies beyond, except where
    # the largest significand is even because its last pattern is NaN
    even = form.largest / (2 * half) % 2 == 0
    expected = form.largest if even else math.inf
    assert form.nearest(np.array([at]))[0] == expected
    assert even == (name == "float8_e4m3fn")


@pytest.mark.parametrize("name", NARROW)
def test_nan_stays_nan_and_signs_of_zero_are_kept(name: str) -> None:
    got = FORMATS[name].nearest(np.array([math.nan, 0.0, -0.0, -1e-300]))
    assert math.isnan(got[0])
    assert np.signbit(got[1:]).tolist() == [False, True, True]


@given(formats, st.lists(finite, min_size=1, max_size=20), st.integers(0, 2**32))
@settings(deadline=None)
def test_stochastic_gives_one_of_the_two_neighbours(
    form: Format, numbers: list[float], seed: int
) -> None:
    x = np.array(numbers)
    got = form.stochastic(x, np.random.default_rng(seed))
    for value, result in zip(numbers, got, strict=True):
        gap = Fraction(float(form.ulp(np.array([value]))[0]))
        steps = Fraction(value) / gap
        neighbours = {math.floor(steps) * gap, math.ceil(steps) * gap}
        if math.isinf(result):
            assert max(abs(n) for n in neighbours) > Fraction(form.largest)
            assert math.copysign(1, result) == math.copysign(1, value)
        else:
            assert Fraction(result) in neighbours


@pytest.mark.parametrize("name", NARROW[1:])
def test_stochastic_keeps_values_of_the_format(name: str) -> None:
    values = every_finite_value(name)
    for seed in range(3):
        got = FORMATS[name].stochastic(values, np.random.default_rng(seed))
        np.testing.assert_array_equal(got, values)


def test_stochastic_keeps_float32_values_infinities_and_nan() -> None:
    rng = np.random.default_rng(1)
    patterns = rng.integers(0, 2**32, size=50_000, dtype=np.uint32)
    with np.errstate(invalid="ignore"):  # signalling NaNs are among the patterns
        x = patterns.view(np.float32).astype(np.float64)
    assert np.isnan(x).any()
    got = FORMATS["float32"].stochastic(x, rng)
    np.testing.assert_array_equal(got, x)


def positions_in_a_gap(form: Format, sign: float) -> Array:
    """Points at known fractions of a gap: normal, at a power of two, subnormal."""
    fractions = np.array([0.0, 2.0**-9, 0.1, 0.25, 0.5, 0.75, 0.9, 1 - 2.0**-9])
    bases = [1.0, 1.0 + 2 * form.unit_roundoff, 2.0**form.min_exponent, 0.0]
    gap = form.ulp(np.array(bases))
    subnormal = 3 * float(gap[-1])
    points = [
        base + fraction * width
        for (base, width), fraction in itertools.product(zip(bases, gap, strict=True), fractions)
    ]
    points += [subnormal + fraction * float(gap[-1]) for fraction in fractions]
    return sign * np.array(points)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", NARROW)
def test_stochastic_goes_up_with_the_probability_that_makes_the_mean_exact(
    name: str, sign: float
) -> None:
    form, draws = FORMATS[name], 20_000
    x = positions_in_a_gap(form, sign)
    rng = np.random.default_rng(7)
    gap = form.ulp(x)
    drawn = form.stochastic(np.tile(x, (draws, 1)), rng)
    ups: NDArray[np.int64] = np.rint((drawn - np.floor(x / gap) * gap) / gap).astype(np.int64)
    assert set(np.unique(ups)) <= {0, 1}
    fraction = x / gap - np.floor(x / gap)
    # each draw goes up with probability f: a binomial count, whose 6 deviations hold for each of
    # the points but for odds of 1e-8
    deviation = np.sqrt(fraction * (1 - fraction) / draws)
    assert np.all(np.abs(ups.mean(axis=0) - fraction) <= 6 * deviation)


@pytest.mark.parametrize("margin", [1 / 16, 0.25])
def test_stochastic_with_a_margin_keeps_to_a_neighbour_that_is_near(margin: float) -> None:
    form, draws = FORMATS["float16"], 20_000
    for place in (0.0, 0.9 * margin, 0.5, 1 - 0.9 * margin):
        x = np.full(draws, 1 + place * 2.0**-10)
        share = (form.stochastic(x, np.random.default_rng(1), margin=margin) > 1).mean()
        want = min(max((place - margin) / (1 - 2 * margin), 0.0), 1.0)
        # a binomial share: 6 deviations, exact where the probability is 0 or 1
        assert abs(share - want) <= 6 * (want * (1 - want) / draws) ** 0.5


@pytest.mark.parametrize("margin", [-0.1, 0.5, 1.0])
def test_a_margin_that_leaves_no_room_is_refused(margin: float) -> None:
    with pytest.raises(ConfigError, match=r"margin must lie from 0 to below 0\.5, got"):
        FORMATS["float16"].stochastic(np.ones(1), np.random.default_rng(0), margin=margin)


def test_averaged_over_a_gap_stochastic_has_twice_the_variance_of_nearest() -> None:
    # 1/6 against 1/12 of a squared gap: what the error model divides by
    form = FORMATS["bfloat16"]
    rng = np.random.default_rng(3)
    x = 1 + rng.random(400_000)
    gap = 2 * form.unit_roundoff
    nearest = np.square((form.nearest(x) - x) / gap)
    stochastic = np.square((form.stochastic(x, rng) - x) / gap)
    for squares, expected in ((nearest, 1 / 12), (stochastic, 1 / 6)):
        assert abs(squares.mean() - expected) < 6 * squares.std() / math.sqrt(x.size)


def test_stochastic_draws_differ_from_call_to_call_and_agree_for_one_seed() -> None:
    form, x = FORMATS["bfloat16"], np.linspace(0.1, 1, 100)
    rng = np.random.default_rng(0)
    first, second = form.stochastic(x, rng), form.stochastic(x, rng)
    assert (first != second).any()
    np.testing.assert_array_equal(form.stochastic(x, np.random.default_rng(0)), first)


def test_unknown_format_is_refused_and_the_known_ones_are_named() -> None:
    assert format_named("bfloat16") is FORMATS["bfloat16"]
    with pytest.raises(ConfigError, match=r"format must be one of float64, .*, got 'int8'"):
        format_named("int8")
