from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import golden.gradients.attention
from conformance.certify.attention_formula import attention
from conformance.certify.attention_gradient_formula import attention_gradients
from conformance.certify.tracked import U, gamma, tracked
from golden import (
    Accumulation,
    Array,
    Capture,
    Causal,
    ConfigError,
    Everything,
    Explicit,
    Observer,
    ShapeError,
    attend,
)
from golden.gradients import AttendGradients, attend_vjp
from golden.masks import BoolArray
from tests.golden import torch_layers
from tests.golden.layers import (
    Problem,
    assert_within,
    identical,
    normal,
    problem,
    problems,
    sampled,
    small_integers,
    visibilities,
)

TORCH = 2.0
"""Torch's backward of softmax and of the norms adds at most one rounding where the plain formulas
have one, so it errs by at most twice their bound (`levelled=False`)."""


def vjp(
    p: Problem, visible: BoolArray, d_output: Array, d_logsumexp: Array | None = None, **more: Any
) -> AttendGradients:
    q_len, kv_len = p.shape[2:]
    return attend_vjp(
        p.q,
        p.k,
        p.v,
        d_output,
        q_positions=np.zeros(q_len, dtype=np.int64),
        kv_positions=np.zeros(kv_len, dtype=np.int64),
        mask=Explicit(visible),
        softmax_scale=p.scale,
        d_logsumexp=d_logsumexp,
        **more,
    )


def forward(p: Problem, visible: BoolArray, **more: Any) -> tuple[Array, Array]:
    q_len, kv_len = p.shape[2:]
    return attend(
        p.q,
        p.k,
        p.v,
        q_positions=np.zeros(q_len, dtype=np.int64),
        kv_positions=np.zeros(kv_len, dtype=np.int64),
        mask=Explicit(visible),
        softmax_scale=p.scale,
        **more,
    )


def bounds(
    p: Problem,
    visible: BoolArray,
    d_output: Array,
    d_logsumexp: Array,
    softcap: float | None,
    sinks: Array | None,
    *,
    levelled: bool = True,
) -> tuple[dict[str, Array], tuple[Array, Array]]:
    """Return the roundoff bounds of the gradients, and of output and log-sum-exp."""
    q, k, v = (tracked(array, "float64") for array in (p.q, p.k, p.v))
    column = None if sinks is None else tracked(sinks, "float64")
    result = attention(q, k, v, visible, scale=p.scale, softcap=softcap, sinks=column)
    found = attention_gradients(
        result,
        q,
        k,
        v,
        tracked(d_output, "float64"),
        visible,
        scale=p.scale,
        sinks=column,
        d_logsumexp=tracked(d_logsumexp, "float64"),
        levelled=levelled,
    )
    errors = {name: one.error for name, one in found.items()}
    return errors, (result.output.error, result.logsumexp.error)


def check_against_autograd(
    p: Problem, visible: BoolArray, softcap: float | None = None, sinks: Array | None = None
) -> None:
    d_output, d_logsumexp = normal(11, *p.q.shape), normal(12, *p.q.shape[:3])
    d_logsumexp *= visible.any(axis=-1) | (sinks is not None)
    got = vjp(p, visible, d_output, d_logsumexp, softcap=softcap, sinks=sinks)
    leaves = {name: torch_layers.leaf(getattr(p, name)) for name in "qkv"}
    if sinks is not None:
        leaves["sinks"] = torch_layers.leaf(sinks)
    output, logsumexp = torch_layers.attend(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        torch.from_numpy(visible.copy()),
        scale=p.scale,
        softcap=softcap,
        sinks=leaves.get("sinks"),
    )
    torch.autograd.backward(
        [output, logsumexp], [torch.from_numpy(d_output), torch.from_numpy(d_logsumexp)]
    )
    cotangents = d_output, d_logsumexp
    own, _ = bounds(p, visible, *cotangents, softcap, sinks)
    plain, _ = bounds(p, visible, *cotangents, softcap, sinks, levelled=False)
    for name, one in leaves.items():
        limit = own[name] + TORCH * plain[name]
        assert_within(getattr(got, name), torch_layers.gradient(one), limit)


@sampled
@given(
    data=st.data(),
    p=problems(),
    softcap=st.sampled_from([None, 0.7, 20.0]),
    with_sinks=st.booleans(),
)
def test_gradients_are_those_of_autograd_for_any_heads_mask_cap_and_sinks(
    data: st.DataObject, p: Problem, softcap: float | None, with_sinks: bool
) -> None:
    sinks = normal(3, p.shape[1]) if with_sinks else None
    check_against_autograd(p, data.draw(visibilities(p)), softcap, sinks)


def first_of_the_group(per_head: Array, group: int) -> Array:
    return per_head[:, ::group]


def other_sign(share: Array, d_sink: Array, observe: Observer) -> Array:
    return -(share * d_sink).sum(axis=(0, 2))


def one_sink_for_all(share: Array, d_sink: Array, observe: Observer) -> Array:
    return np.broadcast_to((share * d_sink).mean(), share.shape[1])


class CapWithoutSlope(Capture):
    def __call__(
        self, stage: str, value: Array, accumulation: Accumulation | None = None, /
    ) -> Array:
        super().__call__(stage, value, accumulation)
        if stage == "softcap_tanh":
            self.values[stage] = np.zeros_like(value)
        return value


DEFECTS = [
    ("grouped.sum_groups", first_of_the_group),
    ("attention.sink_gradient", other_sign),
    ("attention.sink_gradient", one_sink_for_all),
    ("attention.Capture", CapWithoutSlope),
]


def named(value: Any) -> str:
    return value if isinstance(value, str) else str(value.__name__)


@pytest.mark.parametrize(("name", "defect"), DEFECTS, ids=named)
def test_the_comparison_with_autograd_sees_a_defect(
    name: str, defect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    p = problem(0)
    visible = np.broadcast_to(np.tri(5, dtype=np.bool_), p.shape)
    check_against_autograd(p, visible, 0.7, normal(3, 4))
    monkeypatch.setattr(f"golden.gradients.{name}", defect)
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_against_autograd(p, visible, 0.7, normal(3, 4))


def test_the_comparison_with_autograd_sees_a_gradient_one_part_in_10_to_the_12_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    p = problem(0)
    visible = np.broadcast_to(np.tri(5, dtype=np.bool_), p.shape)
    exact = golden.gradients.attention.masked_product

    def off(coefficients: Array, rows: Array, seen: BoolArray) -> Array:
        return exact(coefficients, rows, seen) * (1.0 + 1e-12)

    monkeypatch.setattr(golden.gradients.attention, "masked_product", off)
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_against_autograd(p, visible)


def on_grid(array: Array) -> Array:
    """Round to multiples of 2**-20, so that adding a step of 2**-25 and more is exact."""
    return np.rint(array * 2.0**20) * 2.0**-20


def check_against_differences(
    p: Problem, visible: BoolArray, softcap: float | None = None, sinks: Array | None = None
) -> None:
    """A central difference `D(h)` errs by `c h**2 + O(h**4)` and by `E / h`.

    `E` bounds the roundoff of the scalar that is differentiated. Richardson's
    `R(h) = (4 D(h / 2) - D(h)) / 3` has no `h**2`; `R(h)` and `R(h / 2)` differ by 15 times the
    error of the latter, to first order, so their difference bounds it. The roundoff of `R(h / 2)`
    is at most `(4 * 4 E / h + 2 E / h) / 3`. The step balances `h**4` with `E / h`.
    """
    p = Problem(on_grid(p.q), on_grid(p.k), on_grid(p.v))
    sinks = None if sinks is None else on_grid(sinks)
    d_output, d_logsumexp = normal(11, *p.q.shape), normal(12, *p.q.shape[:3])
    d_logsumexp *= visible.any(axis=-1) | (sinks is not None)
    got = vjp(p, visible, d_output, d_logsumexp, softcap=softcap, sinks=sinks)
    _, (output_error, logsumexp_error) = bounds(p, visible, d_output, d_logsumexp, softcap, sinks)
    reached = d_logsumexp != 0

    def scalar(name: str, direction: Array, step: float) -> tuple[float, float]:
        shifted, column = p, sinks
        if name == "sinks":
            assert sinks is not None
            column = sinks + step * direction
        else:
            shifted = replace(p, **{name: getattr(p, name) + step * direction})
        output, logsumexp = forward(shifted, visible, softcap=softcap, sinks=column)
        terms = [d_output * output, d_logsumexp * np.where(reached, logsumexp, 0.0)]
        size = sum(float(np.abs(one).sum()) for one in terms)
        return sum(float(one.sum()) for one in terms), size

    for name in ("q", "k", "v", "sinks"):
        gradient = getattr(got, name)
        if gradient is None:
            continue
        direction = small_integers(5, *gradient.shape)
        _, size = scalar(name, direction, 0.0)
        terms = d_output.size + d_logsumexp.size
        # errors double to cover the steps, over which they hardly change
        roundoff = 2.0 * float(
            (np.abs(d_output) * output_error).sum()
            + (np.abs(d_logsumexp) * logsumexp_error).sum()
            + gamma(terms) * size
        )
        h = 2.0 ** np.round(np.log2(max(roundoff, 2.0**-50)) / 5.0)

        def difference(step: float, name: str = name, direction: Array = direction) -> float:
            above, below = scalar(name, direction, step)[0], scalar(name, direction, -step)[0]
            return (above - below) / (2.0 * step)

        d1, d2, d4 = difference(h), difference(h / 2), difference(h / 4)
        coarse, fine = (4 * d2 - d1) / 3, (4 * d4 - d2) / 3
        product = float((gradient * direction).sum())
        limit = abs(coarse - fine) + 6.0 * roundoff / h
        assert abs(product - fine) <= limit, f"d_{name} {product} exceeds bound {limit} of {fine}"


@sampled
@given(data=st.data(), p=problems(), softcap=st.sampled_from([None, 3.0]), with_sinks=st.booleans())
def test_gradients_are_central_differences(
    data: st.DataObject, p: Problem, softcap: float | None, with_sinks: bool
) -> None:
    sinks = normal(3, p.shape[1]) if with_sinks else None
    check_against_differences(p, data.draw(visibilities(p)), softcap, sinks)


@pytest.mark.parametrize(("name", "defect"), DEFECTS, ids=named)
def test_the_central_differences_see_a_defect(
    name: str, defect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    p = problem(0)
    visible = np.broadcast_to(np.tri(5, dtype=np.bool_), p.shape)
    check_against_differences(p, visible, 0.7, normal(3, 4))
    monkeypatch.setattr(f"golden.gradients.{name}", defect)
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_against_differences(p, visible, 0.7, normal(3, 4))


# Rules


def test_g1_a_shared_key_head_gathers_what_repeated_heads_get_apart() -> None:
    for kv_heads, group in itertools.product((1, 2), (2, 7)):
        p = problem(1, kv_heads=kv_heads, group=group)
        visible = np.broadcast_to(np.tri(5, dtype=np.bool_), p.shape)
        d_output = normal(4, *p.q.shape)
        shared = vjp(p, visible, d_output)
        apart = vjp(Problem(p.q, p.k.repeat(group, 1), p.v.repeat(group, 1)), visible, d_output)
        errors, _ = bounds(p, visible, d_output, np.zeros(p.shape[:3]), None, None)
        assert_within(shared.q, apart.q, 2.0 * errors["q"])
        for name in ("k", "v"):
            heads = getattr(apart, name)
            summed = heads.reshape(2, kv_heads, group, *heads.shape[2:]).sum(axis=2)
            assert_within(getattr(shared, name), summed, 2.0 * errors[name])


@pytest.mark.parametrize("with_sinks", [False, True])
def test_g2_a_row_that_sees_no_key_has_no_gradient_and_gives_none(with_sinks: bool) -> None:
    p, sinks = problem(2), normal(3, 4) if with_sinks else None
    visible = np.ones(p.shape, dtype=np.bool_)
    visible[:, :, 2] = False
    d_output = normal(4, *p.q.shape)
    wild = d_output.copy()
    wild[:, :, 2] = np.nan
    got, same = (vjp(p, visible, d, sinks=sinks) for d in (d_output, wild))
    assert (got.q[:, :, 2] == 0).all()
    for one, two in zip(got, same, strict=True):
        assert (one is None and two is None) or identical(one, two)


def test_g2_the_logsumexp_of_a_row_that_sees_only_its_sink_is_the_sink() -> None:
    p = problem(2)
    visible = np.zeros(p.shape, dtype=np.bool_)
    d_logsumexp = small_integers(4, *p.shape[:3])
    got = vjp(p, visible, np.zeros_like(p.q), d_logsumexp, sinks=normal(3, 4))
    assert got.sinks is not None
    assert identical(got.sinks, d_logsumexp.sum(axis=(0, 2)))
    assert not got.q.any()
    assert not got.k.any()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_g3_what_a_masked_key_or_an_empty_query_holds_changes_no_bit(
    poison: float, with_sinks: bool
) -> None:
    p, sinks = problem(3), normal(3, 4) if with_sinks else None
    visible = np.ones(p.shape, dtype=np.bool_)
    visible[..., 1] = False
    visible[:, :, 3] = False
    d_output = normal(4, *p.q.shape)
    q, k, v = p.q.copy(), p.k.copy(), p.v.copy()
    q[:, :, 3], k[:, :, 1], v[:, :, 1] = poison, poison, poison
    clean = vjp(p, visible, d_output, sinks=sinks, softcap=2.0)
    got = vjp(Problem(q, k, v), visible, d_output, sinks=sinks, softcap=2.0)
    for one, two in zip(clean, got, strict=True):
        assert (one is None and two is None) or identical(one, two)
    assert not got.k[:, :, 1].any()
    assert not got.v[:, :, 1].any()


@pytest.mark.parametrize("where", ["q", "k", "v", "d_output"])
def test_g4_a_nan_that_a_row_reads_never_becomes_a_number(where: str) -> None:
    p = problem(4, batch=1, kv_heads=1, group=1)
    visible = np.tri(5, dtype=np.bool_)[None, None]
    arrays = {"q": p.q, "k": p.k, "v": p.v, "d_output": normal(4, *p.q.shape)}
    arrays[where] = arrays[where].copy()
    arrays[where][0, 0, 3, 0] = np.nan
    poisoned = Problem(arrays["q"], arrays["k"], arrays["v"])
    got = vjp(poisoned, visible, arrays["d_output"])
    reached = {"q": [3], "d_output": [3], "k": [3, 4], "v": [3, 4]}[where]
    assert np.isnan(got.q[0, 0, reached, 1]).all()
    assert np.isfinite(got.q[0, 0, :3]).all()
    assert np.isnan(got.k[0, 0, :4, 0]).all()


def test_g5_a_row_with_one_large_weight_has_gradients_to_a_few_ulps() -> None:
    """Where one weight is nearly 1, the plain formula has lost eight digits; golden has not.

    Two keys, so `dX = +-P_0 P_1 (dP_0 - dP_1)`, evaluated here without a cancellation.
    """
    q, k = np.array([[20.0]])[None, None], np.array([[0.0], [-1.0]])[None, None]
    v, d_output = np.array([[0.7], [0.3]])[None, None], np.array([[1.1]])[None, None]
    p = Problem(q, k, v)
    visible = np.ones(p.shape, dtype=np.bool_)
    got = vjp(p, visible, d_output).k.ravel()
    small = np.exp(-20.0)
    want = 20.0 * small / (1.0 + small) ** 2 * 1.1 * (0.7 - 0.3)
    assert abs(got - want * np.array([1.0, -1.0])).max() <= gamma(32) * want
    plain, _ = bounds(p, visible, d_output, np.zeros((1, 1, 1)), None, None, levelled=False)
    assert plain["k"].max() > 1e6 * U * want


# Algebra


@sampled
@given(data=st.data(), p=problems())
def test_gradients_of_the_keys_of_a_softmax_sum_to_zero(data: st.DataObject, p: Problem) -> None:
    # the same vector added to every key shifts each row's scores, which changes no output
    visible = data.draw(visibilities(p))
    d_output = normal(4, *p.q.shape)
    errors, _ = bounds(p, visible, d_output, np.zeros(p.shape[:3]), None, None)
    total = vjp(p, visible, d_output).k.sum(axis=2)
    terms = p.shape[1] * p.shape[2] * p.shape[3]
    sizes = np.abs(vjp(p, visible, d_output).k).sum(axis=2)
    assert_within(total, np.zeros_like(total), errors["k"].sum(axis=2) + gamma(terms) * sizes)


def test_the_gradient_of_logsumexp_is_the_mean_key() -> None:
    p = problem(5, group=1)
    visible = np.broadcast_to(np.tri(5, dtype=np.bool_), p.shape)
    ones = np.ones(p.shape[:3])
    got = vjp(p, visible, np.zeros_like(p.q), ones)
    means, _ = forward(Problem(p.q, p.k, p.k), visible)
    errors, _ = bounds(p, visible, np.zeros_like(p.q), ones, None, None)
    assert_within(got.q, p.scale * means, 2.0 * errors["q"])
    assert not got.v.any()


@sampled
@given(data=st.data(), p=problems())
def test_gradients_of_batch_rows_and_kv_groups_do_not_mix(data: st.DataObject, p: Problem) -> None:
    visible = data.draw(visibilities(p))
    rows = data.draw(st.permutations(range(p.shape[0])))
    groups = data.draw(st.permutations(range(p.k.shape[1])))
    size = p.shape[1] // p.k.shape[1]
    heads = [group * size + member for group in groups for member in range(size)]
    d_output = normal(4, *p.q.shape)
    moved = Problem(p.q[rows][:, heads], p.k[rows][:, groups], p.v[rows][:, groups])
    got = vjp(moved, visible[rows][:, heads], d_output[rows][:, heads])
    want = vjp(p, visible, d_output)
    errors, _ = bounds(p, visible, d_output, np.zeros(p.shape[:3]), None, None)
    assert_within(got.q, want.q[rows][:, heads], 2.0 * errors["q"][rows][:, heads])
    assert_within(got.k, want.k[rows][:, groups], 2.0 * errors["k"][rows][:, groups])
    assert_within(got.v, want.v[rows][:, groups], 2.0 * errors["v"][rows][:, groups])


# Inputs


def test_values_may_have_another_width_and_inputs_are_not_changed() -> None:
    p = problem(6)
    v = normal(7, 2, 2, 5, 3)
    d_output = normal(8, 2, 4, 5, 3)
    kept = [array.copy() for array in (p.q, p.k, v, d_output)]
    got = vjp(Problem(p.q, p.k, v), np.ones(p.shape, dtype=np.bool_), d_output)
    assert got.v.shape == v.shape
    assert all(identical(a, b) for a, b in zip((p.q, p.k, v, d_output), kept, strict=True))


def test_the_default_scale_is_that_of_attend_and_float32_is_widened() -> None:
    p = problem(6)
    positions = {"q_positions": np.arange(5), "kv_positions": np.arange(5), "mask": Causal()}
    q, k, v = (array.astype(np.float32) for array in (p.q, p.k, p.v))
    default = attend_vjp(q, k, v, p.q, **positions)
    given_scale = attend_vjp(
        *(array.astype(np.float64) for array in (q, k, v)), p.q, softmax_scale=0.5, **positions
    )
    for one, two in zip(default, given_scale, strict=True):
        assert (one is None and two is None) or identical(one, two)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"d_output": np.zeros((2, 4, 5, 3))},
            ShapeError,
            r"d_output must have shape \(2, 4, 5, 4",
        ),
        (
            {"d_logsumexp": np.zeros((2, 4, 3))},
            ShapeError,
            r"d_logsumexp must have shape \(2, 4, 5",
        ),
        ({"softmax_scale": 0.0}, ConfigError, "softmax_scale must be a positive factor"),
        ({"sinks": np.zeros(3)}, ShapeError, r"sinks must have shape \(4\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    p = problem(0)
    arguments = {
        "d_output": np.zeros_like(p.q),
        "q_positions": np.arange(5),
        "kv_positions": np.arange(5),
        "mask": Everything(),
    } | changes
    with pytest.raises(error, match=message):
        attend_vjp(p.q, p.k, p.v, **arguments)
