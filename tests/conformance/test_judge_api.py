"""The judge in three lines: what it raises, what its text says, what it imports."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import variants
from torch import Tensor

import conformance
from conformance import Deviation, assert_conforms, case_inputs, judge_output
from conformance.errors import UsageError
from conformance.subjects import CoreCall, load_subject
from conformance.variants import dense

CASE = "core-h256-hq8-hkv2-d32-sinks/cte-bf16-b2-q97_33-gaussian-seed0"
LAYER = "h64-hq4-hkv2-d16-rope10000/cte-bf16-b2-q9-gaussian-seed0"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def scale_off(call: CoreCall) -> Tensor:
    return dense.float32_inside(replace(call, softmax_scale=call.softmax_scale * 1.01))


def test_kernel_that_conforms_gives_its_record() -> None:
    record = assert_conforms(dense.float32_inside, CASE, profile="flash")
    assert (record.verdict, record.profile) == ("CONFORMS", "flash-bfloat16")
    assert assert_conforms(variants.native_kernel, CASE).profile == "native-bfloat16"
    assert assert_conforms(load_subject("impl"), LAYER).subject == "impl"


def test_text_of_a_deviation_says_verdict_statistic_place_and_command() -> None:
    with pytest.raises(Deviation) as caught:
        assert_conforms(scale_off, CASE, profile="flash")
    lines = str(caught.value).splitlines()
    assert lines[0].endswith(f"scale_off DEVIATES {CASE}")
    assert any("score: softmax scale" in line and "estimated off by +" in line for line in lines)
    assert any("limit" in line for line in lines)
    assert any("worst element output[" in line and "sigma" in line for line in lines)
    assert lines[-1].startswith("  reproduce: attn-conformance run --subject test_judge_api:")
    assert max(len(line) for line in lines[1:-1]) < 150
    assert caught.value.record.failed


def test_output_computed_before_is_judged() -> None:
    call = case_inputs(CASE)
    assert isinstance(call, CoreCall)
    right = judge_output(dense.float32_inside(call), CASE, profile="flash")
    wrong = judge_output(scale_off(call), CASE, profile="flash")
    assert (right.verdict, wrong.verdict) == ("CONFORMS", "DEVIATES")


def test_misuse_is_told_apart_from_a_deviation() -> None:
    with pytest.raises(UsageError, match="does not claim"):
        assert_conforms(load_subject("torch-sdpa"), CASE)
    with pytest.raises(UsageError, match="profile must be one of"):
        assert_conforms(scale_off, CASE, profile="exact")


def test_importing_the_package_needs_no_torch() -> None:
    code = "import sys, conformance; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert set(conformance.__all__) == {
        "Deviation",
        "assert_conforms",
        "case_inputs",
        "judge_output",
    }
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        conformance.nothing  # noqa: B018
