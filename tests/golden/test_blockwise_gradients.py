from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from layers import (
    Problem,
    assert_within,
    attend_bound,
    exponent_errors,
    gamma,
    identical,
    normal,
    problem,
    seen,
)
from streamed_cases import Case, streamed_cases

import golden.blockwise_gradients
from golden import Capture, Causal, Chunked, Explicit, Mask, ShapeError, SlidingWindow, attend
from golden.blockwise_gradients import attend_blockwise_vjp
from golden.gradients.attention import AttendGradients, attend_vjp
from golden.stages import Array


def cotangents(p: Problem) -> tuple[Array, Array]:
    return normal(11, *p.q.shape[:3], p.v.shape[3]), normal(12, *p.q.shape[:3])


def streamed(case: Case, **changes: Any) -> AttendGradients:
    p, (d_output, d_logsumexp) = case.p, cotangents(case.p)
    arguments = case.arguments | case.tiles | {"d_logsumexp": d_logsumexp} | changes
    return attend_blockwise_vjp(p.q, p.k, p.v, d_output, **arguments)


def vjp_bound(case: Case, d_output: Array, d_logsumexp: Array) -> AttendGradients:
    """Bound the difference of two float64 evaluations of the gradients, in any order of summation.

    Weights `P`, from scores and log-sum-exp, err by a factor within `exp(+-e)`, where `e` is the
    `delta` of `attend_bound` and the error of the log-sum-exp. With `M = |dO| |V|'`, the terms of
    `dX = P (dP - D + dL)` are at most `A = P (M + sum P M + |dL|)`; its errors are at most `A`
    times that of `P`, twice, and `gamma` of the terms of `dP` and `D`. The slope of the cap is at
    most 1 and errs by twice what its tanh does, `delta / softcap`. Products with keys, queries and
    cotangents add `gamma` of their terms (`sums`). Twice all that separates two evaluations.
    """
    p, arguments = case.p, case.arguments
    batch, heads, q_len, kv_len = p.shape
    kv_heads, value_dim = p.k.shape[1], p.v.shape[3]
    visible = seen(arguments["mask"], arguments["q_positions"], arguments["kv_positions"], p.shape)
    sinks, softcap = arguments.get("sinks"), arguments.get("softcap")
    delta, largest = exponent_errors(p.q, p.k, visible, p.scale, sinks)
    k, v = (np.abs(x).repeat(heads // kv_heads, axis=1) for x in (p.k, p.v))
    captured = Capture(only=frozenset({"weights"}))
    logsumexp = attend(p.q, p.k, p.v, **arguments, observe=captured).logsumexp
    weights = captured.values["weights"]

    by_factor = np.expm1(2 * delta + gamma(kv_len + 8) * (1 + largest + math.log(kv_len + 2)))
    slope = 0.0 if softcap is None else 2.0 * delta / softcap
    sums = gamma(2 * (kv_len + value_dim) + kv_len + batch * q_len * heads + 16)
    row = 2 * by_factor + slope + sums
    products = np.abs(d_output) @ v.swapaxes(-1, -2)
    mean = (weights * products).sum(axis=-1) + np.abs(d_logsumexp)
    terms = np.where(visible, weights * (products + mean[..., None]), 0.0) * row[..., None]

    def grouped(per_head: Array) -> Array:
        return per_head.reshape(batch, kv_heads, heads // kv_heads, *per_head.shape[2:]).sum(axis=2)

    own = weights * (by_factor[..., None] + sums)
    tiny = 2.0**-1000  # weights that underflow
    d_sinks = None
    if sinks is not None:
        share = np.where(np.isfinite(logsumexp), np.exp(sinks[:, None] - logsumexp), 0.0)
        d_sinks = 2.0 * (share * mean * row).sum(axis=(0, 2)) + tiny
    return AttendGradients(
        2.0 * p.scale * (terms @ k) + tiny,
        2.0 * p.scale * grouped(terms.swapaxes(-1, -2) @ np.abs(p.q)) + tiny,
        2.0 * grouped(own.swapaxes(-1, -2) @ np.abs(d_output)) + tiny,
        d_sinks,
    )


def assert_close(got: AttendGradients, want: AttendGradients, bound: AttendGradients) -> None:
    for ours, theirs, limit in zip(got, want, bound, strict=True):
        if theirs is None or limit is None:
            assert ours is None
        else:
            assert ours is not None
            assert_within(ours, theirs, limit)


def sized(p: Problem) -> tuple[Array, Array, Array]:
    return p.q, p.k, p.v


@settings(deadline=None, max_examples=300, derandomize=True)
@given(case=streamed_cases())
def test_streamed_gradients_are_dense_ones_for_any_mask_and_feature(case: Case) -> None:
    p, (d_output, d_logsumexp) = case.p, cotangents(case.p)
    want = attend_vjp(p.q, p.k, p.v, d_output, **case.arguments, d_logsumexp=d_logsumexp)
    assert_close(streamed(case), want, vjp_bound(case, d_output, d_logsumexp))


def layered(mask: Mask | None = None, **changes: Any) -> Case:
    p = problem(2, batch=2, q_len=12, kv_len=12, head_dim=4)
    arguments = {
        "q_positions": np.arange(12),
        "kv_positions": np.arange(12),
        "mask": Causal() if mask is None else mask,
        "sinks": normal(7, 4),
        "softcap": 3.0,
    }
    return Case(p, arguments | changes, {"q_tile": 4, "kv_tile": 3})


MASKS: dict[str, Mask] = {
    "causal": Causal(),
    "window": Causal() & SlidingWindow(5),
    "chunk": Chunked(5),
    "array": Explicit(np.random.default_rng(0).random((2, 4, 12, 12)) < 0.4),
}


@pytest.mark.parametrize("name", MASKS)
def test_streamed_gradients_are_central_differences(name: str) -> None:
    case = layered(MASKS[name])
    d_output, d_logsumexp = cotangents(case.p)
    inputs = {"q": case.p.q, "k": case.p.k, "v": case.p.v, "sinks": case.arguments["sinks"]}
    gradients = streamed(case)

    def value(name: str, x: Array) -> float:
        changed = inputs | {name: x}
        sinks = changed.pop("sinks")
        result = attend(**changed, **(case.arguments | {"sinks": sinks}))
        finite = np.isfinite(result.logsumexp)
        weighted = d_logsumexp[finite] * result.logsumexp[finite]
        return float((d_output * result.output).sum() + weighted.sum())

    # A central difference of step `h` is off by a multiple of `h ** 2` (a third of what `2 h`
    # changes it by, while that is small), and by the roundoff of two values over `2 h`.
    a, visible = case.arguments, seen(case.arguments["mask"], *[np.arange(12)] * 2, case.p.shape)
    bound = attend_bound(
        *sized(case.p), visible, scale=case.p.scale, softcap=a["softcap"], sinks=a["sinks"]
    )
    values = bound.output * np.abs(d_output), bound.logsumexp * np.abs(d_logsumexp)
    step = 2.0**-16
    roundoff = sum(float(x.sum()) for x in values) / step
    for which, x in inputs.items():
        direction = normal(13, *x.shape)

        def slope(h: float, which: str = which, x: Array = x, along: Array = direction) -> float:
            return (value(which, x + h * along) - value(which, x - h * along)) / (2 * h)

        numeric = slope(step)
        analytic = float((getattr(gradients, which) * direction).sum())
        assert abs(numeric - analytic) <= abs(slope(2 * step) - numeric) + roundoff
        assert abs(numeric - analytic) < 1e-4 * abs(analytic), "a limit that tells something"


@pytest.mark.parametrize("name", MASKS)
def test_streamed_gradients_are_those_of_torch(name: str) -> None:
    case = layered(MASKS[name], softcap=None, sinks=None)
    d_output, _ = cotangents(case.p)
    q, k, v = (torch.from_numpy(x.copy()).requires_grad_() for x in sized(case.p))
    visible = torch.from_numpy(seen(MASKS[name], np.arange(12), np.arange(12), case.p.shape).copy())
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), attn_mask=visible
    )
    rows = visible.any(-1)
    (out[rows] * torch.from_numpy(d_output)[rows]).sum().backward()
    got = streamed(case, d_logsumexp=None)
    bound = vjp_bound(case, d_output, np.zeros_like(case.p.q[..., 0]))
    for ours, theirs, limit in zip(got[:3], (q, k, v), bound[:3], strict=True):
        assert theirs.grad is not None
        assert_within(ours, theirs.grad.numpy(), limit)


def test_the_comparison_with_dense_sees_a_slope_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = golden.blockwise_gradients.capped_scores

    def uncapped_slope(work: Any, *rest: Any) -> Array:
        scores = right(work, *rest)
        object.__setattr__(work, "softcap", None)
        return scores

    monkeypatch.setattr(golden.blockwise_gradients, "capped_scores", uncapped_slope)
    case = layered()
    d_output, d_logsumexp = cotangents(case.p)
    want = attend_vjp(*sized(case.p), d_output, **case.arguments, d_logsumexp=d_logsumexp)
    with pytest.raises(AssertionError):
        assert_close(streamed(case), want, vjp_bound(case, d_output, d_logsumexp))


def test_threads_change_no_bit_of_a_gradient() -> None:
    one, three = streamed(layered(), threads=1), streamed(layered(), threads=3)
    for ours, theirs in zip(one, three, strict=True):
        assert ours is not None
        assert theirs is not None
        assert identical(ours, theirs)


def test_empty_slots_may_hold_anything() -> None:
    positions = np.where(np.arange(12) % 4 == 1, -1, np.arange(12))
    case = layered(q_positions=positions, kv_positions=positions)
    clean = streamed(case)
    dirty = [np.where((positions < 0)[:, None], math.nan, x) for x in sized(case.p)]
    got = streamed(Case(Problem(*dirty), case.arguments, case.tiles))
    for ours, theirs in zip(got, clean, strict=True):
        assert ours is not None
        assert theirs is not None
        assert identical(ours, theirs)


def test_an_occupied_slot_must_be_finite() -> None:
    case = layered()
    k = case.p.k.copy()
    k[0, 0, 3, 1] = math.inf
    with pytest.raises(ShapeError, match="k must be finite wherever a slot is occupied"):
        streamed(Case(Problem(case.p.q, k, case.p.v), case.arguments, case.tiles))
