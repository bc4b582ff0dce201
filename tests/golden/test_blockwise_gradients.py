from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from layers import Problem, identical, normal, problem, seen
from streamed_cases import Case, streamed_cases

import golden.blockwise_gradients
from golden import Causal, Chunked, Explicit, Mask, ShapeError, SlidingWindow, attend
from golden.blockwise_gradients import attend_blockwise_vjp
from golden.gradients.attention import AttendGradients, attend_vjp
from golden.stages import Array


def cotangents(p: Problem) -> tuple[Array, Array]:
    return normal(11, *p.q.shape[:3], p.v.shape[3]), normal(12, *p.q.shape[:3])


def streamed(case: Case, **changes: Any) -> AttendGradients:
    p, (d_output, d_logsumexp) = case.p, cotangents(case.p)
    arguments = case.arguments | case.tiles | {"d_logsumexp": d_logsumexp} | changes
    return attend_blockwise_vjp(p.q, p.k, p.v, d_output, **arguments)


def assert_close(got: AttendGradients, want: AttendGradients, p: Problem) -> None:
    """Compare to 1e-11 of the largest terms that a gradient sums, scores of a row included."""
    sizes = [max(1.0, float(np.abs(x).max(initial=0.0))) for x in (p.q, p.k, p.v)]
    slack = 1e-11 * math.prod(sizes) * sizes[0] * sizes[1]
    for ours, theirs in zip(got, want, strict=True):
        if theirs is None:
            assert ours is None
        else:
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=slack)


def sized(p: Problem) -> tuple[Array, Array, Array]:
    return p.q, p.k, p.v


@settings(deadline=None, max_examples=300, derandomize=True)
@given(case=streamed_cases())
def test_streamed_gradients_are_dense_ones_for_any_mask_and_feature(case: Case) -> None:
    p, (d_output, d_logsumexp) = case.p, cotangents(case.p)
    want = attend_vjp(p.q, p.k, p.v, d_output, **case.arguments, d_logsumexp=d_logsumexp)
    assert_close(streamed(case), want, p)


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

    for which, x in inputs.items():
        direction = normal(13, *x.shape)
        step = 1e-5
        numeric = (value(which, x + step * direction) - value(which, x - step * direction)) / (
            2 * step
        )
        analytic = float((getattr(gradients, which) * direction).sum())
        assert math.isclose(numeric, analytic, rel_tol=1e-7, abs_tol=1e-7)


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
    for ours, theirs in zip(got[:3], (q, k, v), strict=True):
        assert theirs.grad is not None
        np.testing.assert_allclose(ours, theirs.grad.numpy(), rtol=1e-10, atol=1e-12)


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
        assert_close(streamed(case), want, case.p)


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
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_an_occupied_slot_must_be_finite() -> None:
    case = layered()
    k = case.p.k.copy()
    k[0, 0, 3, 1] = math.inf
    with pytest.raises(ShapeError, match="k must be finite wherever a slot is occupied"):
        streamed(Case(Problem(case.p.q, k, case.p.v), case.arguments, case.tiles))
