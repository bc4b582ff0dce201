"""Properties of the judge, each with a correct subject and a wrong one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import variants
from torch import Tensor

from conformance import runner
from conformance.case_ids import parse
from conformance.subjects import CoreCall, Subject
from conformance.variants import dense
from reports.records import CaseRecord

DTYPES = ("fp32", "bf16", "fp16")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def judged(case_id: str, function: Callable[[CoreCall], Any], profile: str) -> CaseRecord:
    subject = Subject(name="kernel", function=function, profile=profile)
    return runner.judge_case(parse(case_id), subject)


def rounded_scores(call: CoreCall) -> Tensor:
    """Scores stored in the model's dtype."""
    scores = dense.masked_scores(call, torch.float32).to(call.q.dtype).float()
    weights = dense.normalised(scores, dense.sink_logits(call, torch.float32)).to(call.q.dtype)
    return weights @ dense.per_query_head(call.v, call.q)


def rounded_softmax(call: CoreCall) -> Tensor:
    """Every step of the softmax in the model's dtype."""
    scores = dense.masked_scores(call, torch.float32).to(call.q.dtype)
    weights = dense.normalised(scores, dense.sink_logits(call, call.q.dtype))
    return weights @ dense.per_query_head(call.v, call.q)


def rounded_accumulator(call: CoreCall) -> Tensor:
    """Tiles of 32 keys added up in the model's dtype."""
    scores = dense.masked_scores(call, torch.float32)
    weights = dense.normalised(scores, dense.sink_logits(call, torch.float32)).to(call.q.dtype)
    v = dense.per_query_head(call.v, call.q)
    output = torch.zeros_like(call.q)
    for start in range(0, scores.shape[-1], 32):
        tile = slice(start, start + 32)
        output += (weights[..., tile].float() @ v[:, :, tile].float()).to(call.q.dtype)
    return output


def float8_weights(call: CoreCall) -> Tensor:
    """Weights stored in float8."""
    scores = dense.masked_scores(call, torch.float32)
    weights = dense.normalised(scores, dense.sink_logits(call, torch.float32))
    stored = weights.to(torch.float8_e4m3fn).float()
    return (stored @ dense.per_query_head(call.v, call.q).float()).to(call.q.dtype)


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
        return dense.float32_inside(replace(call, **halves)).float()

    case_id = CORE.format("fp32", "gaussian")
    assert judged(case_id, dense.float32_inside, "flash").verdict == "CONFORMS"
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
