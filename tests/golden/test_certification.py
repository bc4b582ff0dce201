from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import conformance.certify
import golden.attention
import golden.rope
from conformance.certify import certify, jobs, run
from conformance.certify.arithmetic import DIGITS
from conformance.certify.attend_cases import attend_case, attend_cases, long_rows
from conformance.certify.checks import check_attend, check_layer, cotangent
from conformance.certify.elementary import elementary_ulps
from conformance.certify.layer_cases import layer_cases
from conformance.certify.layer_formula import LayerCase, layer
from conformance.certify.layer_gradient_formula import layer_gradients
from conformance.certify.measure import SLACK, certificate, measure
from conformance.certify.table import BEGIN, END, markdown, rows, show, write
from conformance.certify.tracked import ELEMENTARY_ULPS, Tracked, U, gamma, tracked
from conformance.errors import UsageError
from golden import Array

pytestmark = pytest.mark.skipif(
    find_spec("mpmath") is None, reason="exact values need the extra `certify`"
)

LAYER_CASES = layer_cases(3)
ATTEND_CASES = attend_cases(3)


def worst_share(measured: dict[str, Any]) -> float:
    return max(float(one.share.max()) for one in measured.values())


# Golden against exact values


@pytest.mark.parametrize("feature", ATTEND_CASES)
def test_attend_and_its_gradients_lie_within_their_bounds(feature: str) -> None:
    assert worst_share(check_attend(ATTEND_CASES[feature], "mpmath")) <= 1.0


@pytest.mark.parametrize("feature", LAYER_CASES)
def test_the_layer_and_its_gradients_lie_within_their_bounds(feature: str) -> None:
    assert worst_share(check_layer(LAYER_CASES[feature], "mpmath")) <= 1.0


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="no extended precision here")
@pytest.mark.parametrize("size", [1.0, 8.0])
def test_long_sums_lie_within_their_bounds(size: float) -> None:
    assert worst_share(check_attend(long_rows(0, kv_len=200, size=size), "longdouble")) <= 1.0


def test_elementary_functions_err_less_than_assumed() -> None:
    assert max(elementary_ulps(500).values()) <= ELEMENTARY_ULPS


# What a certificate refuses


def exact_results(case: LayerCase) -> dict[str, Tracked]:
    exact = layer(case, "mpmath")
    gradients = layer_gradients(case, exact, cotangent(case.hidden_states.shape))
    return {"output": exact.output, "k": exact.k, "v": exact.v} | gradients


@pytest.mark.parametrize("side", [1.0, -1.0])
def test_one_value_3_ulps_beyond_its_bound_is_refused_and_3_ulps_within_is_not(side: float) -> None:
    case = LAYER_CASES["everything at once"]
    for name, exact in exact_results(case).items():
        values = exact.exact.astype(np.float64)
        at = np.unravel_index(exact.size.argmax(), exact.shape)
        for ulps, refused in ((3.0, True), (-3.0, False)):
            planted = values.copy()
            distance = exact.error[at] * SLACK["mpmath"] + ulps * np.spacing(exact.size.max())
            planted[at] += side * max(distance, 0.0)
            share = measure(planted, exact).share.max()
            assert (share > 1.0) == refused, (name, ulps, share)


@pytest.mark.parametrize(
    ("feature", "field", "factor"),
    [
        ("softmax_scale", "softmax_scale", 1.0 + 1e-11),
        ("softcap", "softcap", 1.0 + 1e-11),
        ("clip_qkv", "clip_qkv", 1.0 + 1e-13),
        ("RMS norm", "qk_norm.eps", 1.0 + 1e-4),
        ("RMS norm, weight offset", "qk_norm.weight_offset", 1.0 + 1e-11),
        ("layer norm", "qk_norm.eps", 1.0 + 1e-4),
        ("temperature", "temperature_tuning.attn_scale", 1.0 + 1e-11),
        ("RoPE half", "rope.theta", 1.0 + 1e-10),
        ("RoPE linear", "rope.scaling.factor", 1.0 + 1e-10),
        ("RoPE llama3, from position 16400", "rope.scaling.factor", 1.0 + 1e-8),
        ("RoPE YaRN, from position 131068", "rope.scaling.factor", 1.0 + 1e-8),
        ("RoPE dynamic NTK, from position 16400", "rope.scaling.factor", 1.0 + 1e-8),
    ],
)
def test_a_parameter_off_by_a_hair_is_refused(feature: str, field: str, factor: float) -> None:
    case = LAYER_CASES[feature]
    exact = layer(case, "mpmath")
    weights = golden.make_weights(case.config, **case.weights)

    def shares(config: golden.AttentionConfig) -> float:
        result = golden.context_encoding(
            config, weights, case.hidden_states, position_ids=case.positions
        )
        keys = result.cache.k[0][:, case.positions[0]]
        parts = measure(result.output, exact.output), measure(keys, exact.k[0])
        return max(float(part.share.max()) for part in parts)

    assert shares(case.config) <= 1.0
    assert shares(scaled(case.config, field.split("."), factor)) > 1.0


def scaled(config: Any, path: list[str], factor: float) -> Any:
    value = getattr(config, path[0])
    changed = scaled(value, path[1:], factor) if path[1:] else value * factor
    return replace(config, **{path[0]: changed})


def single_precision(function: Callable[..., Array]) -> Callable[..., Array]:
    def rounded(*args: Any, **kwargs: Any) -> Array:
        return function(*args, **kwargs).astype(np.float32).astype(np.float64)

    return rounded


@pytest.mark.parametrize(
    ("feature", "module", "name"),
    [
        ("RoPE half", golden.rope, "rope_frequencies"),
        ("projections", golden.attention, "grouped_matmul"),
    ],
    ids=["RoPE half", "projections"],
)
def test_a_step_in_single_precision_is_refused(
    feature: str, module: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, single_precision(getattr(module, name)))
    assert worst_share(check_layer(LAYER_CASES[feature], "mpmath")) > 1.0


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("result", ["output", "logsumexp", "k"])
def test_a_value_that_is_not_finite_is_refused(result: str, wrong: float) -> None:
    def plant(name: str, value: Array) -> Array:
        return np.where(np.arange(value.shape[-1]) == 0, wrong, value) if name == result else value

    assert worst_share(check_attend(ATTEND_CASES["attend"], "mpmath", plant)) == np.inf


def test_an_error_where_the_bound_is_zero_is_refused() -> None:
    exact = tracked(np.array([1.0, 2.0]), "mpmath")
    assert measure(np.array([1.0, 2.0]), exact).share.max() == 0.0
    assert measure(np.array([1.0, np.nextafter(2.0, 3.0)]), exact).share.max() == np.inf
    with pytest.raises(ValueError, match=r"computed must have shape \(2,\), got \(3,\)"):
        measure(np.zeros(3), exact)


def test_a_row_without_a_known_digit_counts_in_the_shares_only() -> None:
    exact = Tracked(tracked(np.array([[1.0], [1e-20]]), "mpmath").exact, 1e-16)
    got = measure(np.array([[1.0], [2e-17]]), exact)
    assert got.ulps.shape == (1,)
    assert got.share.shape == (2,)
    with pytest.raises(ValueError, match="probe, output must have values to measure"):
        certificate("probe", "output", "mpmath", [measure(np.zeros((0, 1)), exact[:0])])


# The exact values and the rules of the bounds


STEP = 2.0**-36


def on_coarse_grid(array: Array) -> Array:
    return np.rint(array * 2.0**12) * 2.0**-12  # adding a step is exact


@pytest.mark.parametrize(
    "feature", ["everything at once", "RMS norm of the projection", "layer norm", "RoPE partial"]
)
def test_the_exact_gradients_are_derivatives_of_the_exact_values(feature: str) -> None:
    """At 50 digits a central difference errs by `c h**2`; at twice the step by 4 times that.

    So the difference of the two is 3 times the error of the finer one, and bounds it; where the
    output is linear both are exact up to some 10**5 roundings at 50 digits over the step.
    """
    roundoff = 10.0 ** (5 - DIGITS) / STEP
    case = LAYER_CASES[feature]
    weights = {name: on_coarse_grid(array) for name, array in case.weights.items()}
    case = replace(case, weights=weights, hidden_states=on_coarse_grid(case.hidden_states))
    d_output = cotangent(case.hidden_states.shape)
    gradients = layer_gradients(case, layer(case, "mpmath"), d_output)
    rng = np.random.default_rng(1)

    def difference(name: str, direction: Array, step: float) -> Any:
        ends = []
        for sign in (1.0, -1.0):
            moved = sign * step * direction
            if name == "hidden_states":
                one = replace(case, hidden_states=case.hidden_states + moved)
            else:
                one = replace(case, weights={**weights, name: weights[name] + moved})
            output = layer(one, "mpmath").output
            ends.append((output.exact * output.like(d_output).exact).sum())
        return (ends[0] - ends[1]) / (2.0 * step)

    for name, gradient in gradients.items():
        direction = rng.integers(-2, 3, gradient.shape).astype(np.float64)
        product = (gradient.exact * gradient.like(direction).exact).sum()
        coarse, fine = (difference(name, direction, step) for step in (2.0 * STEP, STEP))
        assert abs(product - fine) <= abs(coarse - fine) + roundoff, name
        assert abs(coarse - fine) < 1e-16, name


@pytest.mark.parametrize(
    ("rule", "function", "exact"),
    [
        ("sum", lambda x, y: x + y, lambda x, y: x + y),
        ("difference", lambda x, y: x - y, lambda x, y: x - y),
        ("product", lambda x, y: x * y, lambda x, y: x * y),
        ("quotient", lambda x, y: x / y, lambda x, y: x / y),
        ("matmul", lambda x, y: x[None] @ y[:, None], lambda x, y: x[None] @ y[:, None]),
        ("exp", lambda x, y: np.exp(x), lambda x, y: x.exp()),
        ("log", lambda x, y: np.log(x), lambda x, y: x.log()),
        ("log1p", lambda x, y: np.log1p(x), lambda x, y: x.log1p()),
        ("tanh", lambda x, y: np.tanh(x), lambda x, y: x.tanh()),
        ("cos", lambda x, y: np.cos(x), lambda x, y: x.cos()),
        ("sin", lambda x, y: np.sin(x), lambda x, y: x.sin()),
        ("root", lambda x, y: np.sqrt(x), lambda x, y: x.root()),
        ("inverse root", lambda x, y: x**-0.5, lambda x, y: x.inverse_root()),
        ("power", lambda x, y: y**x, lambda x, y: x.power_of(y)),
        ("clip", lambda x, y: np.clip(x, 1.0, 2.0), lambda x, y: x.clip(1.0, 2.0)),
        ("mean", lambda x, y: x.mean(keepdims=True), lambda x, y: x.mean()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("error", [0.0, 2.0**-40, 2.0**-10])
def test_operands_as_wrong_as_they_may_be_give_results_within_the_bound(
    rule: str, function: Callable[..., Array], exact: Callable[..., Tracked], error: float
) -> None:
    rng = np.random.default_rng(0)
    x, y = (np.rint(rng.uniform(0.3, 3.0, 400) * 2.0**12) * 2.0**-12 for _ in range(2))
    bound = exact(tracked(x, "mpmath", error), tracked(y, "mpmath", error))
    for x_sign, y_sign in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        ends = x + x_sign * error, y + y_sign * error  # exact
        assert measure(function(*ends), bound).share.max() <= 1.0


def test_bounds_of_a_sum_hold_for_the_worst_order_of_its_terms() -> None:
    terms = np.concatenate([[1.0], np.full(4000, U * 0.999)])
    exact = tracked(terms, "mpmath").sum(0, keepdims=True)
    one_by_one = np.array([np.add.accumulate(terms)[-1]])
    share = measure(one_by_one, exact).share.max()
    assert 0.4 < share <= 1.0
    assert gamma(1) > U


# The table


def test_the_tables_hold_every_feature_and_say_whether_it_holds(tmp_path: Path) -> None:
    chosen = [job for job in jobs([3], long=0) if job[0] in ("attend", "sinks, decode")]
    certificates = tuple(one for job in chosen for one in certify(job))
    assert [row[0] for row in rows(certificates)] == ["attend", "sinks, decode"]
    console = Console(file=io.StringIO(), width=120)
    show(certificates, {"exp": 0.5}, console)
    refuted = (replace(certificates[0], worst_share=1.5), *certificates[1:])
    show(refuted, {"exp": 0.5}, console)
    printed = console.file.getvalue()
    assert "certified: all" in printed
    assert "refuted: 1 beyond their bound: ['attend, output']" in printed
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write(page, markdown(certificates, {"exp": 0.5}))
    text = page.read_text()
    assert re.search(r"^before\n.*\| sinks, decode \|.*\nafter\n$", text, re.DOTALL)
    assert "old" not in text


def test_run_writes_the_page_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformance.certify, "jobs", lambda: [next(iter(jobs([3], long=0)))])
    monkeypatch.setattr(conformance.certify, "SAMPLES", 10)
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    found = run(page, Console(file=io.StringIO()))
    assert all(one.holds for one in found)
    assert "| attend |" in page.read_text()


@pytest.mark.parametrize("text", ["", f"{END}\n{BEGIN}\n", f"{BEGIN}\n"])
def test_a_page_without_its_markers_is_not_touched(text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(UsageError, match="must hold the lines"):
        write(page, "table")
    assert page.read_text() == text
    with pytest.raises(UsageError, match="path must be a page"):
        write(tmp_path / "none.md", "table")


def test_jobs_cover_every_case_and_the_long_rows() -> None:
    names = [name for name, _, _ in jobs([0], long=64)]
    assert set(names) >= LAYER_CASES.keys() | ATTEND_CASES.keys()
    assert len(names) == len(set(names))
    assert any("64 positions" in name for name in names) or np.finfo(np.longdouble).nmant < 63
    assert attend_case(0).visible[:, :, 1].sum() == 0
