"""Storage of keys and values in float8 and int8."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import golden.quantisation
from golden import (
    FORMATS,
    Array,
    Cache,
    ConfigError,
    Quantisation,
    QuantisedCache,
    ShapeError,
)
from tests.golden.features.served import CACHES, SERVED, serve, whole
from tests.golden.layers import LAYERS, assert_within, identical, normal, sampled, small_integers

FLOAT8 = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}
HEADS, HEAD_DIM = 2, 3


def every_code(code: str) -> Array:
    """Return every finite value of a float8 format."""
    values = np.arange(256, dtype=np.uint8).view(FLOAT8[code]).astype(np.float64)
    finite: Array = values[np.isfinite(values)]
    return finite


def boxed(values: Array) -> Array:
    return values.reshape(1, 1, -1, 1)


@pytest.mark.parametrize("code", FLOAT8)
def test_q1_every_float8_value_survives_a_direct_cast(code: Any) -> None:
    values = every_code(code)
    assert identical(Quantisation(code).quantise(boxed(values)), boxed(values))


@pytest.mark.parametrize("code", FLOAT8)
@sampled
@given(seed=st.integers(0, 2**32), exponent=st.integers(-20, 18))
def test_q1_a_direct_cast_is_the_one_of_ml_dtypes(code: Any, seed: int, exponent: int) -> None:
    values = normal(seed, 400, size=2.0**exponent).astype(np.float32)
    ties = np.concatenate([values, (every_code(code)[1:] + every_code(code)[:-1]) / 2])
    with np.errstate(over="ignore"):
        want = ties.astype(np.float32).astype(FLOAT8[code]).astype(np.float64)
    got = Quantisation(code).quantise(boxed(ties.astype(np.float32)))
    np.testing.assert_array_equal(got.ravel(), want)


def test_q1_overflow_of_a_direct_cast_is_infinite_or_nan_as_the_format_has_it() -> None:
    beyond = boxed(np.array([464.0, 465.0, 61440.0, -1e9]))
    e4m3 = Quantisation("float8_e4m3fn").quantise(beyond).ravel()
    e5m2 = Quantisation("float8_e5m2").quantise(beyond).ravel()
    np.testing.assert_array_equal(e4m3, [448.0, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(e5m2, [448.0, 448.0, np.inf, -np.inf])


@pytest.mark.parametrize("code", [*FLOAT8, "int8"])
@pytest.mark.parametrize("axes", [0, 1, 2])
def test_q2_an_error_is_at_most_half_a_gap_and_a_clamp_never_overflows(
    code: Any, axes: int
) -> None:
    shape = (HEADS, HEAD_DIM)[:axes]
    scale = 0.03 * (1.0 + np.arange(np.prod(shape, dtype=int))).reshape(shape)
    quantisation = Quantisation(code, scale)
    x = normal(1, 2, HEADS, 50, HEAD_DIM)
    by_head = scale.reshape(shape + (1,) * (2 - axes))[:, None] if axes else scale
    largest = 127.0 if code == "int8" else FORMATS[code].largest
    gap = np.ones_like(x) if code == "int8" else FORMATS[code].ulp(x / by_head)
    got = quantisation.dequantise(quantisation.quantise(x))
    inside = np.abs(x / by_head) <= largest
    # a rounding of the ratio, one of the product
    assert_within(
        np.where(inside, got, 0.0),
        np.where(inside, x, 0.0),
        0.5 * gap * by_head + 2.0**-51 * np.abs(x),
    )
    codes = quantisation.quantise(1e9 * x)
    assert np.isfinite(codes).all()
    assert (np.abs(codes) <= largest + (code == "int8")).all()


def test_q2_trainium_s_bound_clamps_before_the_format_does() -> None:
    quantisation = Quantisation("float8_e4m3fn", 0.5, bound=240.0)
    codes = quantisation.quantise(boxed(np.array([119.0, 120.0, 121.0, -500.0])))
    assert codes.ravel().tolist() == [240.0, 240.0, 240.0, -240.0]
    assert quantisation.dequantise(codes).ravel().tolist() == [120.0, 120.0, 120.0, -120.0]


def test_q4_int8_clamps_to_its_two_ends_and_rounds_ties_to_even() -> None:
    x = boxed(np.array([-1000.0, -128.4, -0.5, 0.5, 1.5, 2.5, 126.6, 300.0]))
    assert Quantisation("int8", 1.0).quantise(x).ravel().tolist() == [
        -128,
        -128,
        0,
        0,
        2,
        2,
        127,
        127,
    ]
    assert Quantisation("int8", 1.0, bound=127.0).quantise(x).min() == -127.0


def test_q3_scales_of_equal_numbers_are_the_scale_of_the_tensor() -> None:
    x = normal(2, 2, HEADS, 9, HEAD_DIM)
    one = Quantisation("int8", 0.05).quantise(x)
    assert identical(one, Quantisation("int8", np.full(HEADS, 0.05)).quantise(x))
    assert identical(one, Quantisation("int8", np.full((HEADS, HEAD_DIM), 0.05)).quantise(x))


# Caches


def quantised(inner: Cache, keys: Quantisation, values: Quantisation) -> Cache:
    return QuantisedCache(inner, keys, values)


KINDS: dict[str, tuple[Quantisation, Quantisation]] = {
    "e4m3-cast": (Quantisation("float8_e4m3fn"), Quantisation("float8_e4m3fn")),
    "e5m2-cast": (Quantisation("float8_e5m2"), Quantisation("float8_e5m2")),
    "int8": (Quantisation("int8", 0.5), Quantisation("int8", 1.0)),
    "e4m3-heads": (
        Quantisation("float8_e4m3fn", np.array([0.25, 2.0])),
        Quantisation("float8_e4m3fn", np.array([1.0, 0.5]), bound=240.0),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", ["contiguous", "transposed", "paged", "sharded"])
def test_k13_exactly_representable_keys_and_values_make_no_difference(
    cache: str, kind: str
) -> None:
    config = LAYERS["nope-temperature-clip-cap"]  # keys and values are integers of at most 3
    sequences = whole(config, 0, 2, 9)
    held = quantised(CACHES[cache](config, 2, 9), *KINDS[kind])
    output, _ = serve(config, 0, sequences, [3, 4, 7], held)
    assert_within(output, sequences.output, sequences.bound)


@pytest.mark.parametrize(("cache", "layer"), SERVED)
def test_k13_any_cache_holds_what_codes_stand_for(cache: str, layer: str) -> None:
    config = LAYERS[layer]
    heads, head_dim = config.num_key_value_heads, config.head_dim
    keys = Quantisation("float8_e4m3fn", np.full((heads, head_dim), 0.125))
    values = Quantisation("int8", np.full(heads, 0.25))
    inner = CACHES[cache](config, 2, 9)
    k, v = normal(1, 2, heads, 2, head_dim, size=5.0), normal(2, 2, heads, 2, head_dim, size=5.0)
    at, positions = np.full((2, 1), 5), np.array([[3, 4], [4, 3]])
    got = quantised(inner, keys, values).write(k, v, positions).prior(at)
    k_back = keys.dequantise(keys.quantise(k))
    v_back = values.dequantise(values.quantise(v))
    want = inner.write(k_back, v_back, positions).prior(at)
    assert (got.k == want.k).all()
    assert (got.v == want.v).all()
    assert identical(got.positions, want.positions)


def test_k13_a_prefill_itself_reads_exact_keys() -> None:
    config = LAYERS["gqa-bias-rms"]
    sequences = whole(config, 0, 2, 6)
    coarse = Quantisation("int8", 50.0)
    held = quantised(CACHES["contiguous"](config, 2, 6), coarse, coarse)
    prefill, _ = serve(config, 0, sequences, [], held)
    assert_within(prefill, sequences.output, sequences.bound)
    stepped, _ = serve(config, 0, sequences, [3], held)
    with pytest.raises(AssertionError, match="exceeds bound"):
        assert_within(stepped, sequences.output, sequences.bound)


def test_the_comparison_sees_a_scale_applied_on_one_side_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(golden.quantisation.Quantisation, "dequantise", lambda self, codes: codes)
    config = LAYERS["nope-temperature-clip-cap"]
    sequences = whole(config, 0, 2, 9)
    held = quantised(CACHES["contiguous"](config, 2, 9), *KINDS["int8"])
    output, _ = serve(config, 0, sequences, [3, 4, 7], held)
    with pytest.raises(AssertionError, match="exceeds bound"):
        assert_within(output, sequences.output, sequences.bound)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quantisation("float4"), "code must be one of float8_e4m3fn, float8_e5m2, int8"),  # type: ignore[arg-type]
        (lambda: Quantisation("int8"), "int8 needs a scale; only float8 can be cast directly"),
        (lambda: Quantisation("int8", 0.0), "scale must be positive, got 0.0"),
        (
            lambda: Quantisation("float8_e5m2", bound=1.0),
            "bound needs a scale; a direct cast does not clamp",
        ),
        (
            lambda: Quantisation("float8_e4m3fn", 1.0, bound=500.0),
            "bound must lie between 0 and 448.0, got 500.0",
        ),
    ],
)
def test_a_quantisation_that_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()


def test_scales_fit_the_heads() -> None:
    x = small_integers(0, 1, HEADS, 2, HEAD_DIM)
    with pytest.raises(ShapeError, match=re.escape("scale must have shape (2,), got (3,)")):
        Quantisation("int8", np.ones(3)).quantise(x)
    with pytest.raises(ShapeError, match="scale must have shape"):
        Quantisation("int8", np.ones((1, 1, 1)))
