"""Extra profiles: a kernel that keeps to one conforms under it, and not under a finer one."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from conformance.case_ids import parse
from conformance.defects import DEFECTS, problem_of
from conformance.defects.kernel import Kernel
from conformance.judge import Judgement
from conformance.subjects import CoreCall
from conformance.variants import dense
from conformance.variants.judged import JudgedCase, prepare
from golden import FORMATS, Array


@cache
def judged(case_id: str) -> JudgedCase:
    torch.set_num_threads(1)
    return prepare(parse(case_id))


PROMPT = "core-h256-hq4-hkv2-d64/cte-{}-b2-q150_40-gaussian-seed0"
DECODE = "core-h256-hq4-hkv2-d64/tkg-{}-b2-kv300_90-gaussian-seed0"


def failed(judgement: Judgement) -> set[str]:
    return {statistic.name for statistic in judgement.statistics if statistic.ratio > 1}


def spread(judgement: Judgement) -> float:
    return next(s.value for s in judgement.statistics if s.name == "spread")


def tf32_inside(call: CoreCall) -> torch.Tensor:
    """Round what products read to TensorFloat-32, as tensor cores do."""

    def read(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(FORMATS["tensorfloat32"].nearest(x.double().numpy())).to(x.dtype)

    narrow = replace(call, q=read(call.q), k=read(call.k), v=read(call.v))
    scores = dense.masked_scores(narrow, torch.float32)
    weights = dense.normalised(scores, dense.sink_logits(narrow, torch.float32))
    return read(weights) @ dense.per_query_head(narrow.v, call.q)


@pytest.mark.parametrize("case_id", [PROMPT, DECODE])
def test_tf32_operands_conform_where_they_are_claimed(case_id: str) -> None:
    one = judged(case_id.format("fp32"))
    output = tf32_inside(one.call()).double().numpy()
    claimed = one.judge(output, "tf32")
    assert claimed.conforms, claimed.reason
    # within what a kernel that keeps to its profile should show, and decode has eight rows
    assert 0.8 <= spread(claimed) <= 1.15
    assert "spread" in failed(one.judge(output, "flash"))


@pytest.mark.parametrize(("profile", "bits"), [("flash-e4m3", "e4m3"), ("flash-e5m2", "e5m2")])
def test_float8_weights_conform_where_they_are_claimed(profile: str, bits: str) -> None:
    one = judged(PROMPT.format("bf16"))
    problem = problem_of(one.case, one.inputs)
    narrow = {defect.id: defect for defect in DEFECTS}["weights-float8"].run(problem)
    claimed = one.judge(narrow, profile)
    assert claimed.conforms, (bits, claimed.reason)
    assert not one.judge(narrow, "flash").conforms


@pytest.mark.parametrize("profile", ["tkg", "nki"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_kernel_with_unnormalised_weights_keeps_to_the_neuron_profiles(
    profile: str, dtype: str
) -> None:
    one = judged(DECODE.format(dtype))
    problem = problem_of(one.case, one.inputs)
    right: Array = Kernel()(problem)
    assert one.judge(right, profile).conforms
    wrong = np.array(right)
    wrong[0, 1] *= 1.01
    assert not one.judge(wrong, profile).conforms
