"""Properties of the judge, each with a correct subject and a wrong one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import variants
from torch import Tensor

import golden
from conformance import runner
from conformance.case_ids import parse
from conformance.error_model import MANY_RUNS, Outputs, predict_scale
from conformance.inputs import CoreInputs, draw_core
from conformance.judge import Judgement, judge_outputs
from conformance.precision import profile_named
from conformance.subjects import CoreCall, LayerCall, LayerOutput, Subject
from conformance.subjects.impl import attention_layer
from golden import FORMATS, Array, Observer, unobserved
from reports.records import CaseRecord

DTYPES = ("fp32", "bf16", "fp16")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def judged(case_id: str, function: Callable[[CoreCall], Any], profile: str) -> CaseRecord:
    subject = Subject(name="kernel", function=function, profile=profile)
    return runner.judge_case(parse(case_id), subject)


@contextmanager
def drawn_as(change: Callable[[CoreInputs], CoreInputs]) -> Iterator[None]:
    """Judge on changed inputs in here; they must stay exact in the case's dtype."""
    with mock.patch.object(runner, "inputs_of", lambda case: change(draw_core(case))):
        yield


def one_ulp_off(kernel: Callable[[CoreCall], Tensor], *index: int) -> Callable[[CoreCall], Tensor]:
    def run(call: CoreCall) -> Tensor:
        output = kernel(call).clone()
        away = torch.tensor(float("inf"), dtype=output.dtype)
        output[index] = torch.nextafter(output[index], away)
        return output

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("profile", ["eager", "native", "flash"])
def test_row_that_sees_one_key_must_be_that_value_to_the_bit(dtype: str, profile: str) -> None:
    case_id = f"core-h256-hq8-hkv8-d32-window1/cte-{dtype}-b2-q33-gaussian-seed0"
    right = variants.flash(16) if profile == "flash" else variants.native_kernel
    if dtype == "fp32":
        # sums of float32 are predicted to err even where one term is not zero
        assert judged(case_id, right, profile).verdict == "CONFORMS"
        return
    record = judged(case_id, right, profile)
    assert record.verdict == "CONFORMS"
    # in float32 noise before a coarser store, a random rounding may move a row of these by chance
    names = [statistic.name for statistic in record.statistics]
    assert names[0] == "exact rows"
    assert profile != "native" or names == ["exact rows"]
    wrong = judged(case_id, one_ulp_off(right, 1, 4, 20, 7), profile)
    assert wrong.verdict == "DEVIATES"
    assert wrong.reason.startswith("output: exact rows 1 at [1, 4, 20] exceeds its limit 0")
    assert wrong.worst is not None
    assert wrong.worst.index == (1, 4, 20, 7)
    assert math.isinf(wrong.worst.z)


def masked_judgement(change: Callable[[Array], Array]) -> Judgement:
    """Judge outputs of attention in which two rows see no key at all."""
    rng = np.random.default_rng(0)
    form = FORMATS["bfloat16"]
    q, k, v = (form.nearest(rng.standard_normal((1, 2, 12, 16))) for _ in range(3))
    allowed = np.tril(np.ones((12, 12), dtype=np.bool_))
    allowed[[3, 7]] = False
    positions = np.arange(12)

    def evaluate(observe: Observer = unobserved) -> Outputs:
        attended = golden.attend(
            q,
            k,
            v,
            q_positions=positions,
            kv_positions=positions,
            mask=golden.Explicit(allowed),
            observe=observe,
        )
        return {"output": attended.output}

    profile = profile_named("native", "bfloat16")
    expected, rows = evaluate(), {"output": np.ones((1, 2, 12), dtype=np.bool_)}
    scales = predict_scale(evaluate, expected, rows, profile, seed=0, runs=MANY_RUNS)
    observed = {"output": change(form.nearest(expected["output"]))}
    return judge_outputs(observed, expected, rows, scales)


def test_fully_masked_row_must_be_zero_and_1e_30_is_caught() -> None:
    assert masked_judgement(lambda output: output).conforms

    def leak(output: Array) -> Array:
        output[0, 1, 7, 5] = 1e-30
        return output

    judgement = masked_judgement(leak)
    assert not judgement.conforms
    assert "exact rows 1 at [0, 1, 7]" in judgement.reason


SINKS = "core-h256-hq8-hkv2-d32-sinks/cte-{}-b2-q33-gaussian-seed0"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logit", [8.0, 14.0])
def test_sink_that_takes_nearly_everything_is_judged_on_what_is_left(
    dtype: str, logit: float
) -> None:
    # at 14 a row's output is some 1e-5 of its values: below float16's normal numbers
    def dominated(inputs: CoreInputs) -> CoreInputs:
        return replace(inputs, sinks=np.full(8, logit))

    def weaker(call: CoreCall) -> Tensor:
        assert call.sinks is not None
        return variants.float32_inside(replace(call, sinks=call.sinks - 0.5))

    def dropped(call: CoreCall) -> Tensor:
        return variants.float32_inside(replace(call, sinks=None))

    case_id = SINKS.format(dtype)
    with drawn_as(dominated):
        for name in ("eager", "native", "flash, tile 16", "flash, tile 32", "split and merged"):
            subject = variants.core_subject(name)
            assert runner.judge_case(parse(case_id), subject).verdict == "CONFORMS", name
        for wrong in (weaker, dropped, lambda call: torch.zeros_like(call.q)):
            assert judged(case_id, wrong, "flash").verdict == "DEVIATES"


def test_subnormal_float16_outputs_are_judged_and_flushing_them_is_caught() -> None:
    smallest_normal = 2.0**-14
    subnormal_shares = []

    def dominated(inputs: CoreInputs) -> CoreInputs:
        return replace(inputs, sinks=np.full(8, 14.0))

    def flushed(call: CoreCall) -> Tensor:
        output = variants.flash(32)(call)
        tiny = (output.abs() < smallest_normal) & (output != 0)
        subnormal_shares.append(float(tiny.float().mean()))
        return torch.where(output.abs() < smallest_normal, 0.0, output)

    case_id = SINKS.format("fp16")
    with drawn_as(dominated):
        assert judged(case_id, variants.flash(32), "flash").verdict == "CONFORMS"
        assert judged(case_id, flushed, "flash").verdict == "DEVIATES"
    assert subnormal_shares[0] > 0.5


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_integers_make_exact_caches_and_one_ulp_in_them_is_caught(dtype: str) -> None:
    case = parse(f"h64-hq4-hkv2-d16/cte-{dtype}-b2-q9-integers-seed0")

    def off(call: LayerCall) -> LayerOutput:
        result = attention_layer(call)
        k_cache = result.k_cache.clone()
        away = torch.tensor(float("inf"), dtype=k_cache.dtype)
        k_cache[1, 0, 3, 5] = torch.nextafter(k_cache[1, 0, 3, 5], away)
        return replace(result, k_cache=k_cache)

    def subject(function: Any) -> Subject:
        return Subject(name="layer", function=function, scope="layer", profile="native")

    right = runner.judge_case(case, subject(attention_layer))
    assert right.verdict == "CONFORMS"
    exact = {s.output for s in right.statistics if s.name == "exact rows"}
    assert {"k_cache", "v_cache"} <= exact
    wrong = runner.judge_case(case, subject(off))
    assert wrong.reason.startswith("k_cache: exact rows 1 at [1, 0, 3]")


def rounded_scores(call: CoreCall) -> Tensor:
    """Scores stored in the model's dtype."""
    scores = variants.masked_scores(call, torch.float32).to(call.q.dtype).float()
    weights = variants.softmax(scores, variants.sink_logits(call, torch.float32)).to(call.q.dtype)
    return weights @ variants.per_query_head(call.v, call.q)


def rounded_softmax(call: CoreCall) -> Tensor:
    """Every step of the softmax in the model's dtype."""
    scores = variants.masked_scores(call, torch.float32).to(call.q.dtype)
    weights = variants.softmax(scores, variants.sink_logits(call, call.q.dtype))
    return weights @ variants.per_query_head(call.v, call.q)


def rounded_accumulator(call: CoreCall) -> Tensor:
    """Tiles of 32 keys added up in the model's dtype."""
    scores = variants.masked_scores(call, torch.float32)
    weights = variants.softmax(scores, variants.sink_logits(call, torch.float32)).to(call.q.dtype)
    v = variants.per_query_head(call.v, call.q)
    output = torch.zeros_like(call.q)
    for start in range(0, scores.shape[-1], 32):
        tile = slice(start, start + 32)
        output += (weights[..., tile].float() @ v[:, :, tile].float()).to(call.q.dtype)
    return output


def float8_weights(call: CoreCall) -> Tensor:
    """Weights stored in float8."""
    scores = variants.masked_scores(call, torch.float32)
    weights = variants.softmax(scores, variants.sink_logits(call, torch.float32))
    stored = weights.to(torch.float8_e4m3fn).float()
    return (stored @ variants.per_query_head(call.v, call.q).float()).to(call.q.dtype)


COARSE = (rounded_scores, rounded_softmax, rounded_accumulator, float8_weights)
CORE = "core-h256-hq8-hkv2-d32/cte-{}-b2-q97-{}-seed0"


@pytest.mark.parametrize("regime", ["gaussian", "peaked"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_profile_that_claims_more_than_the_subject_keeps_is_caught(dtype: str, regime: str) -> None:
    case_id = CORE.format(dtype, regime)
    with variants.shared_work():
        assert judged(case_id, variants.native_kernel, "native").verdict == "CONFORMS"
        for wrong in COARSE:
            assert judged(case_id, wrong, "native").verdict == "DEVIATES", wrong.__name__
        # where the profile says that scores are rounded, the same subject keeps its claim
        assert judged(case_id, rounded_scores, "eager").verdict == "CONFORMS"


def test_bfloat16_hidden_in_a_float32_subject_is_caught() -> None:
    def narrow(call: CoreCall) -> Tensor:
        halves = {name: getattr(call, name).bfloat16() for name in "qkv"}
        return variants.float32_inside(replace(call, **halves)).float()

    case_id = CORE.format("fp32", "gaussian")
    assert judged(case_id, variants.float32_inside, "flash").verdict == "CONFORMS"
    assert judged(case_id, narrow, "flash").verdict == "DEVIATES"


def test_last_key_of_the_last_row_lost_is_caught() -> None:
    def lost(call: CoreCall) -> Tensor:
        mask = call.mask.clone()
        mask[..., -1, -1] = False
        return variants.native_kernel(replace(call, mask=mask))

    for dtype in DTYPES:
        assert judged(CORE.format(dtype, "gaussian"), lost, "native").verdict == "DEVIATES"


def test_reason_names_the_output_the_statistic_the_place_and_both_numbers() -> None:
    def off(call: CoreCall) -> Tensor:
        output = variants.native_kernel(call).clone()
        output[1, 3, 50, 9] += 1.0
        return output

    record = judged(CORE.format("bf16", "gaussian"), off, "native")
    magnitude = next(s for s in record.statistics if s.name == "magnitude")
    assert magnitude.ratio > 1
    assert magnitude.where == (1, 3, 50, 9)
    assert record.reason.startswith("output: ")
    assert " at [1, 3, 50" in record.reason
    assert " exceeds its limit " in record.reason
    worst = record.worst
    assert worst is not None
    assert worst.index == (1, 3, 50, 9)
    assert worst.error == worst.observed - worst.expected
    assert worst.z == worst.error / worst.sigma
    assert all("Monte Carlo" in s.derivation for s in record.statistics if s.limit)
