from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import assert_within, gamma, identical, normal, sampled, small_integers

from golden import Accumulation, Array, Capture, Observer, QKNorm, unobserved
from golden.norms import normalise


def by_hand(x: Array, norm: QKNorm, weight: Array | None, bias: Array | None) -> Array:
    """Normalise row by row with correctly rounded sums."""
    out = np.empty_like(x)
    for at in np.ndindex(x.shape[:-1]):
        row, filled = x[at].tolist(), out[at]
        centre = math.fsum(row) / len(row) if norm.kind == "layer" else 0.0
        power = math.fsum((value - centre) ** 2 for value in row) / len(row)
        for c, value in enumerate(row):
            unit = (value - centre) / math.sqrt(power + norm.eps)
            factor = 1.0 if weight is None else norm.weight_offset + float(weight[c])
            filled[c] = unit * factor + (0.0 if bias is None else float(bias[c]))
    return out


def norm_bound(x: Array, norm: QKNorm, weight: Array | None, bias: Array | None) -> Array:
    """Bound the difference of two float64 evaluations of a norm over `n` channels.

    A mean errs by `gamma(n + 1)` of the mean size, which centring passes on to each channel and,
    through the power's derivative, to the reciprocal root; all else is relative roundings.
    """
    width = x.shape[-1]
    mean = x.mean(axis=-1, keepdims=True) if norm.kind == "layer" else 0.0
    centred = np.abs(x - mean)
    shift = gamma(width + 2) * (np.abs(x).mean(axis=-1, keepdims=True) + np.abs(x))
    if norm.kind == "rms":
        shift = 0.0 * shift
    power = np.square(centred).mean(axis=-1, keepdims=True) + norm.eps
    moved = (centred * shift).mean(axis=-1, keepdims=True) / power + gamma(width + 8)
    unit = power**-0.5 * (shift + centred * moved)
    size = power**-0.5 * centred
    factor = 1.0 if weight is None else np.abs(norm.weight_offset) + np.abs(weight)
    offset = 0.0 if bias is None else np.abs(bias)
    bound: Array = 2.0 * (unit * factor + gamma(4) * (size * factor + offset))
    return bound


def check(
    seed: int, norm: QKNorm, width: int, *, biased: bool = False, observe: Observer = unobserved
) -> None:
    x = normal(seed, 2, 3, width, size=4.0) + 1.0
    weight = normal(seed + 1, width) if norm.weighted else None
    bias = normal(seed + 2, width) if biased else None
    got = normalise(x, norm, weight, bias, observe=observe)
    assert_within(got, by_hand(x, norm, weight, bias), norm_bound(x, norm, weight, bias))


@sampled
@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(["rms", "layer"]),
    width=st.integers(2, 9),
    eps=st.sampled_from([1e-6, 1e-5, 0.25]),
    offset=st.sampled_from([0.0, 1.0]),
    weighted=st.booleans(),
)
def test_n1_n2_n3_a_norm_is_its_formula(
    seed: int, kind: str, width: int, eps: float, offset: float, weighted: bool
) -> None:
    norm = QKNorm(
        kind="rms" if kind == "rms" else "layer",
        eps=eps,
        weighted=weighted,
        weight_offset=offset if weighted else 0.0,
    )
    check(seed, norm, width, biased=weighted and kind == "layer")


def scale_slightly_off(
    stage: str, value: Array, accumulation: Accumulation | None = None, /
) -> Array:
    return value * (1.0 + 1e-13) if stage == "q_norm_scale" else value


def weight_skipped(stage: str, value: Array, accumulation: Accumulation | None = None, /) -> Array:
    return np.sign(value) if stage == "q_norm" else value


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("defect", [scale_slightly_off, weight_skipped], ids=lambda d: d.__name__)
def test_the_comparison_with_the_formula_sees_a_defect(kind: str, defect: Observer) -> None:
    norm = QKNorm(kind="rms" if kind == "rms" else "layer")
    check(0, norm, 8)
    with pytest.raises(AssertionError, match="exceeds bound"):
        check(0, norm, 8, observe=defect)


@pytest.mark.parametrize("level", [-3.0, 0.5, 4096.0])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 2.0])
def test_n1_a_constant_row_becomes_its_sign_times_almost_one(level: float, eps: float) -> None:
    got = normalise(np.full((1, 8), level), QKNorm(eps=eps, weighted=False), None, None)
    want = level / math.sqrt(level * level + eps)
    assert_within(got, np.full((1, 8), want), gamma(8) * abs(want))


def test_n1_the_mean_square_is_over_the_last_axis_only() -> None:
    x = np.array([[3.0, 4.0], [5.0, 12.0]])
    got = normalise(x, QKNorm(eps=0.0, weighted=False), None, None)
    want = x / np.array([[math.sqrt(12.5)], [math.sqrt(84.5)]])
    assert_within(got, want, gamma(6) * want)


@sampled
@given(
    seed=st.integers(0, 2**32),
    exponent=st.integers(-40, 40).map(lambda half: 2 * half),
    kind=st.sampled_from(["rms", "layer"]),
)
def test_n1_n2_without_eps_a_power_of_4_of_the_input_changes_no_more_than_roundoff(
    seed: int, exponent: int, kind: str
) -> None:
    norm = QKNorm(kind="rms" if kind == "rms" else "layer", eps=0.0, weighted=False)
    x = normal(seed, 3, 6)
    got = normalise(2.0**exponent * x, norm, None, None)
    want = normalise(x, norm, None, None)
    assert_within(got, want, gamma(8) * np.abs(want))


def test_n1_eps_keeps_a_row_of_zeros_at_zero() -> None:
    got = normalise(np.zeros((2, 4)), QKNorm(weighted=False), None, None)
    assert identical(got, np.zeros((2, 4)))


def test_n2_a_shift_of_every_channel_changes_no_bit_and_moves_an_rms() -> None:
    x = small_integers(0, 3, 8, largest=9)  # means of 8 integers are exact
    layer, rms = QKNorm(kind="layer", weighted=False), QKNorm(weighted=False)
    assert identical(normalise(x + 100.0, layer, None, None), normalise(x, layer, None, None))
    moved = normalise(x + 100.0, rms, None, None) - normalise(x, rms, None, None)
    assert (np.abs(moved).max(axis=-1) > 0.1).all()


def test_n2_a_layer_norm_has_mean_0_and_mean_square_1() -> None:
    x = normal(0, 5, 64, size=3.0)
    got = normalise(x, QKNorm(kind="layer", eps=0.0, weighted=False), None, None)
    assert_within(got.mean(axis=-1), np.zeros(5), gamma(2 * 64 + 16) * np.abs(got).max())
    assert_within(np.square(got).mean(axis=-1), np.ones(5), gamma(4 * 64 + 32))


@pytest.mark.parametrize("offset", [0.0, 1.0, -2.0])
def test_n3_the_offset_adds_to_the_weight_and_the_bias_follows_both(offset: float) -> None:
    x = normal(0, 3, 4)
    weight, bias = small_integers(1, 4, largest=5), small_integers(2, 4, largest=5)
    unit = normalise(x, QKNorm(kind="layer", weighted=False), None, None)
    norm = QKNorm(kind="layer", weight_offset=offset)
    assert identical(normalise(x, norm, weight, bias), unit * (weight + offset) + bias)


def test_n3_a_stored_weight_of_w_minus_1_with_offset_1_is_a_weight_of_w() -> None:
    x, weight = normal(0, 3, 4), small_integers(1, 4, largest=5)
    gemma = normalise(x, QKNorm(weight_offset=1.0), weight - 1.0, None)
    assert identical(gemma, normalise(x, QKNorm(), weight, None))


def test_stages_are_the_scale_the_unit_and_the_result() -> None:
    x, weight = normal(0, 2, 3, 4), normal(1, 4)
    capture = Capture()
    result = normalise(x, QKNorm(), weight, None, observe=capture, name="k")
    assert list(capture.values) == ["k_norm_scale", "k_norm_unit", "k_norm"]
    assert capture.values["k_norm_scale"].shape == (2, 3, 1)
    assert identical(capture.values["k_norm_unit"], x * capture.values["k_norm_scale"])
    assert identical(capture.values["k_norm"], result)
    assert identical(result, capture.values["k_norm_unit"] * weight)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_scale_accumulates_its_squared_terms_times_its_squared_slope(kind: str) -> None:
    found: list[Accumulation] = []

    def keep(stage: str, value: Array, accumulation: Accumulation | None = None, /) -> Array:
        if accumulation is not None:
            found.append(accumulation)
        return value

    norm = QKNorm(kind="rms" if kind == "rms" else "layer", eps=0.5, weighted=False)
    x = small_integers(0, 1, 8, largest=5)  # means of 8 integers are exact
    normalise(x, norm, None, None, observe=keep)
    centre = math.fsum(x[0]) / 8 if kind == "layer" else 0.0
    terms = [(value - centre) ** 2 / 8 for value in x[0].tolist()]
    power = math.fsum(terms) + 0.5
    slope = -0.5 / (power * math.sqrt(power))  # of power ** -0.5
    want = math.fsum((term * slope) ** 2 for term in terms)
    assert [accumulation.length for accumulation in found] == [8]
    assert_within(found[0].squares(), np.full((1, 1), want), gamma(32) * want)


def test_the_input_is_not_changed() -> None:
    x = normal(0, 3, 4)
    before = x.copy()
    normalise(x, QKNorm(kind="layer"), np.ones(4), np.ones(4))
    assert identical(x, before)
