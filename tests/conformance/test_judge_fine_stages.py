"""Float32 cores: the closed form with sums against the runs, and verdicts by sampled rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
import variants
from sampled_ways import FORM, assert_sampled_rows_agree
from torch import Tensor

from conformance import runner
from conformance.calls import call_of
from conformance.cases import Case, Workload
from conformance.closed_form import closed_form
from conformance.error_model import FEW_RUNS, draw
from conformance.expected import reference
from conformance.fine_stages import FineStages
from conformance.inputs import CoreInputs, draw_core
from conformance.judge import Judgement, judge_outputs
from conformance.precision import profile_named
from conformance.runner import judge_case, predicted
from conformance.stored_variance import drawn_variance, settling_variance
from conformance.subjects import CoreCall, Subject
from conformance.sums import accumulation_variance
from conformance.variants import dense, streamed
from golden import FORMATS, Accumulation, Array, AttentionConfig
from golden.attention import grouped_matmul

HEADS = AttentionConfig(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
CONFIGS = {
    "plain": HEADS,
    "window, sinks": replace(HEADS, sliding_window=40, learned_sinks_size=1),
    "soft cap": replace(HEADS, softcap=5.0),
    "softmax scale a power of two": replace(HEADS, head_dim=16),
}
RUNS = 16
CASE = Case(
    config=replace(HEADS, hidden_size=256, head_dim=64, learned_sinks_size=1),
    workload=Workload(phase="cte", lengths=(640, 500)),
    dtype="float32",
    scope="core",
)
FLASH = variants.CORES["flash, tile 64"].function


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def mean_ratio(name: str, regime: str, profile: str) -> tuple[float, float]:
    """Return the mean over rows of the runs' variance over the form's, and its sampling error."""
    case = Case(
        config=CONFIGS[name],
        workload=Workload(phase="cte", lengths=(160, 97)),
        dtype="float32",
        regime=regime,
        scope="core",
    )
    inputs, claims = draw_core(case), profile_named(profile, "float32")
    expected = reference(case, inputs)
    form = closed_form(expected.evaluate, inputs, case.config, claims)
    errors = draw(expected.evaluate, expected.outputs, claims, seed=1, runs=RUNS, last={})
    rows = expected.rows["output"]
    drawn = np.square(errors["output"].stored[:RUNS]).mean(axis=(0, -1))[rows]
    variance = form.variance.mean(axis=-1)[rows]
    assert (drawn[variance == 0] == 0).all()
    ratio = drawn[variance > 0] / variance[variance > 0]
    return float(ratio.mean()), float(ratio.std() / np.sqrt(len(ratio)))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("regime", ["gaussian", "peaked", "outlier"])
@pytest.mark.parametrize("profile", ["flash", "nki"])
def test_closed_form_with_sums_agrees_with_the_monte_carlo_runs(
    name: str, regime: str, profile: str
) -> None:
    mean, spread = mean_ratio(name, regime, profile)
    # Rows err independently, so the mean is known to `spread`, about 0.5 to 1 %.
    assert abs(mean - 1) < 4 * spread + FORM


def test_agreement_is_lost_without_sums_and_without_exp() -> None:
    """Each part of the form is needed: the comparison above finds its absence."""
    mean, spread = mean_ratio("plain", "gaussian", "flash")
    assert abs(mean - 1) < 4 * spread + FORM
    with mock.patch.object(FineStages, "_summed", return_value=0.0):
        assert mean_ratio("plain", "gaussian", "flash")[0] > 1.1
    with mock.patch.object(FineStages, "_function", return_value=0.0):
        assert mean_ratio("plain", "gaussian", "nki")[0] > 1.5


def plain_variance(case: Case, inputs: CoreInputs) -> tuple[Array, Array]:
    """Return the closed form of flash in float32, term by term in float64, and its largest parts.

    Those are what `sum_j a_j (v_j - o)**2` would be if nothing in it cancelled.
    """
    claims, form, config = profile_named("flash", "float32"), FORMATS["float32"], case.config
    seen: dict[str, Array] = {}
    sums: dict[str, Array] = {}

    def observe(stage: str, value: Array, sum_: Accumulation | None = None, /) -> Array:
        seen[stage] = value
        if stage == "attn" and sum_ is not None:  # golden's own rest is roundoff in saturated rows
            others = seen["weights"].copy()
            np.put_along_axis(others, others.argmax(axis=-1)[..., None], 0.0, axis=-1)
            squares = grouped_matmul(np.square(others), np.square(inputs.v))
            sum_ = replace(sum_, rest=lambda: np.sqrt(squares))
        if sum_ is not None:
            sums[stage] = accumulation_variance(claims, stage, value, sum_)
        return value

    def stored(x: Array) -> Array:
        mantissa, exponent = np.frexp(np.where(np.isinf(x), 0.0, x))
        return np.where(mantissa == 0, 0.0, np.square(np.ldexp(1.0, exponent - 24)) / 12)

    reference(case, inputs).evaluate(observe=observe)
    e, p, o, total = (seen[name] for name in ("exp", "weights", "attn", "denominator"))
    v = inputs.v.repeat(o.shape[1] // inputs.v.shape[1], axis=1)
    scores = (sums["qk"] + stored(seen["qk"])) * config.softmax_scale**2
    if np.log2(config.softmax_scale) % 1:
        scores += stored(seen["scores"])
    scores += stored(seen["shifted_scores"])
    exps = stored(e) * np.where(e == 1.0, 2.0 - 0.375, 2.0)  # F2
    moved = np.square(p) * scores + exps / np.square(total)
    first = e.argmax(axis=-1)[..., None]
    one = np.take_along_axis(e, first, axis=-1) == 1.0
    of_first = np.take_along_axis(moved, first, axis=-1)
    others = (moved.sum(axis=-1, keepdims=True) - of_first) * np.square(total)
    before = others + np.square(np.where(one, total - 1, total)) * of_first + sums["denominator"]
    by_total = sums["denominator"] + settling_variance(form, total, before)
    quotient = 1.0 / form.nearest(total)
    gap = form.ulp(quotient)
    placed = drawn_variance(np.mod(quotient / gap, 1.0)) * np.square(gap)
    weights = stored(p)
    known = one & (total < 2.0)
    placed = np.where(known, placed, np.take_along_axis(weights, first, axis=-1))
    np.put_along_axis(weights, first, placed, axis=-1)  # F4
    apart = np.square(v[:, :, None] - o[..., None, :])
    variance = np.einsum("bhqk,bhqkd->bhqd", moved, apart)
    variance += np.einsum("bhqk,bhkd->bhqd", weights, np.square(v))
    variance += by_total / np.square(total) * np.square(o) + sums["attn"]
    np.put_along_axis(moved, first, 0.0, axis=-1)  # the largest weight's term is kept apart
    parts = np.einsum("bhqk,bhkd->bhqd", moved, np.square(v))
    parts += np.square(o) * moved.sum(axis=-1, keepdims=True)
    return variance + settling_variance(form, o, variance), 2 * parts


@pytest.mark.parametrize("regime", ["gaussian", "peaked", "large"])
@pytest.mark.parametrize("sink", [None, 0.0, 55.0])
def test_closed_form_in_float32_is_the_plain_one_within_its_roundoff(
    regime: str, sink: float | None
) -> None:
    """Saturated rows, and rows whose sink leaves weights of 1e-24 with squares below float32."""
    config = replace(HEADS, learned_sinks_size=None if sink is None else 1)
    workload = Workload(phase="cte", lengths=(48,))
    case = Case(config=config, workload=workload, dtype="float32", regime=regime, scope="core")
    inputs = draw_core(case)
    if sink is not None:
        products = inputs.q @ inputs.k.repeat(2, axis=1).swapaxes(-1, -2)
        score = config.softmax_scale * products.max(axis=(0, 2, 3))
        inputs = replace(inputs, sinks=sink + score)
    plain, parts = plain_variance(case, inputs)
    expected = reference(case, inputs)
    claims = profile_named("flash", "float32")
    found = closed_form(expected.evaluate, inputs, config, claims).variance
    largest = np.abs(expected.outputs["output"]).max(axis=-1, keepdims=True)
    roundoff = np.square(2.0**-46 * largest) + 2.0**-252  # of golden; and float32's least number
    # Sums of at most 48 terms, each the product of a dozen float32 values, err by 60 units; so do
    # the three parts of which the square of a difference is made.
    bound = 60 * 2.0**-24 * (plain + parts) + roundoff
    assert (np.abs(found - plain) <= bound).all(), np.max(np.abs(found - plain) / bound)
    # a bound of less than 1 % for most elements; in a saturated row the variance itself is roundoff
    told = plain > roundoff
    assert np.median(bound[told] / plain[told]) < 0.01


def test_places_average_to_the_variance_of_nearest_and_are_zero_on_the_format() -> None:
    place = (np.arange(4096) + 0.5) / 4096
    # the midpoint rule of a spacing h errs by h**2 / 24 times a slope's change: far below 1e-4
    assert drawn_variance(place).mean() == pytest.approx(1 / 12, rel=1e-4)
    assert drawn_variance(np.zeros(1))[0] == 0
    form, ulp = FORMATS["float32"], 2.0**-23
    x = np.array([1.0, 1.5, 1 + ulp / 2])
    still = settling_variance(form, x, np.zeros(3)) / ulp**2
    moved = settling_variance(form, x, np.full(3, ulp**2)) / ulp**2
    assert still[:2].tolist() == [0, 0]
    assert still[2] == drawn_variance(np.array([0.5]))[0]  # powers of two apart
    # a constant and a product, squared, and the square: five roundings of float32 at most
    np.testing.assert_allclose(moved, 1 / 12, rtol=5 * 2.0**-24)


def test_sampled_rows_predict_what_all_rows_predict() -> None:
    inputs, claims = draw_core(CASE), profile_named("flash", "float32")
    expected = reference(CASE, inputs)
    long_way = predicted(CASE, inputs, expected, claims, runs=FEW_RUNS)["output"]
    with mock.patch("conformance.closed_form.LONG", 1):
        short_way = predicted(CASE, inputs, expected, claims, runs=FEW_RUNS)["output"]
    assert long_way.sampled is None
    assert short_way.sampled is not None
    exact, rows = expected.outputs["output"], expected.rows["output"]
    assert_sampled_rows_agree(long_way, short_way, exact, rows)
    tests = {test.name: test for test in short_way.score_tests}
    for test in long_way.score_tests:
        short = tests[test.name]
        # 8 degrees of freedom of all runs: a factor of two is 4 of their standard deviations
        assert 1 / 2 < short.spread / test.spread < 2
        # what runs to nearest err by is not taken to be less than where all rows are run
        assert short.nearest > test.nearest / 2


def test_disagreement_takes_the_long_way() -> None:
    inputs, claims = draw_core(CASE), profile_named("flash", "float32")
    expected = reference(CASE, inputs)
    with (
        mock.patch("conformance.closed_form.LONG", 1),
        mock.patch.object(FineStages, "_summed", return_value=0.0),
    ):
        found = runner.predicted(CASE, inputs, expected, claims, runs=FEW_RUNS)["output"]
    assert found.sampled is None


def scaled(call: CoreCall, factor: float) -> Tensor:
    return FLASH(replace(call, softmax_scale=call.softmax_scale * factor))


def sunk(call: CoreCall, shift: float) -> Tensor:
    """Attend with sinks too large by less than float32 tells: scores and sinks in float64."""
    assert call.sinks is not None
    wide = replace(call, q=call.q.double(), k=call.k.double(), v=call.v.double())
    return dense.float64_inside(replace(wide, sinks=call.sinks.double() + shift)).float()


def weights_in_bfloat16(call: CoreCall) -> Tensor:
    """Attend in one tile whose weights are rounded to bfloat16 for their product with values."""
    scores = dense.masked_scores(call, torch.float32)
    sink = dense.sink_logits(call, torch.float32)
    weights = dense.normalised(scores, sink).bfloat16().float()
    return weights @ dense.per_query_head(call.v, call.q)


def test_long_float32_case_passes_correct_kernels_and_fails_wrong_ones() -> None:
    inputs, claims = draw_core(CASE), profile_named("flash", "float32")
    expected = reference(CASE, inputs)
    with mock.patch("conformance.closed_form.LONG", 1):
        record = judge_case(CASE, Subject(name="flash", function=FLASH, profile="flash"))
        assert record.verdict == "CONFORMS", record.reason
        scales = predicted(CASE, inputs, expected, claims, runs=FEW_RUNS)
    assert scales["output"].sampled is not None

    def judged(kernel: Callable[[CoreCall], Tensor]) -> Judgement:
        call = call_of(CASE, inputs)
        assert isinstance(call, CoreCall)
        observed = {"output": kernel(call).double().numpy()}
        return judge_outputs(observed, expected.outputs, expected.rows, scales, group_size=2)

    for kernel in (*map(streamed.flash, (32, 128, 512)), dense.float64_inside):
        assert judged(kernel).conforms, judged(kernel).reason
    power = judged(FLASH).power
    sink = power["sink of head 0 [logit]"]
    wrong = {
        "score: softmax scale": partial(scaled, factor=1 + 2 * power["softmax scale [%]"] / 100),
        "score: sink of head 0": partial(sunk, shift=2 * sink),
        "spread": weights_in_bfloat16,
    }
    for name, kernel in wrong.items():
        found = {s.name for s in judged(kernel).statistics if s.ratio > 1}
        assert name in found, (name, found)
