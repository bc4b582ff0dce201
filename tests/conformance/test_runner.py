"""Every way a subject can fail has its verdict, and none of them is an exception."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import planted
import pytest
import torch
import variants
from torch import Tensor

from conformance import error_model, runner
from conformance.case_ids import parse
from conformance.cases import Case
from conformance.matrix import core_cases, feature_cases, preset_cases
from conformance.subjects import (
    CoreCall,
    LayerCall,
    LayerOutput,
    Subject,
    Unsupported,
    load_subject,
)
from conformance.subjects.impl import attention_layer
from reports.records import CaseRecord

CORE = parse("core-h64-hq4-hkv2-d16/cte-bf16-b2-q9_5-gaussian-seed0")
PREFILL = parse("h64-hq4-hkv2-d16/cte-bf16-b2-q9-gaussian-seed0")
DECODE = parse("h64-hq4-hkv2-d16-rope10000/tkg-bf16-b2-kv7_3-steps2-gaussian-seed0")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def core(function: Callable[[CoreCall], Any]) -> Subject:
    return Subject(name="kernel", function=function, profile="native")


def layer(function: Callable[[LayerCall], Any]) -> Subject:
    return Subject(name="layer", function=function, scope="layer", profile="native")


def with_nan(call: CoreCall) -> Tensor:
    output = variants.native_kernel(call)
    output[1, 2, 3, 4] = float("nan")
    return output


def with_infinity(call: CoreCall) -> Tensor:
    output = variants.native_kernel(call)
    output[0, 0, 0, 0] = -float("inf")
    return output


MALFORMED: dict[str, tuple[Callable[[CoreCall], Any], str]] = {
    "shape": (
        lambda call: variants.native_kernel(call).transpose(1, 2),
        "output must have shape (2, 4, 9, 16), got (2, 9, 4, 16)",
    ),
    "dtype": (
        lambda call: variants.native_kernel(call).float(),
        "output must have dtype bfloat16, got float32",
    ),
    "NaN": (with_nan, "output[1, 2, 3, 4] is nan, golden has "),
    "infinity": (with_infinity, "output[0, 0, 0, 0] is -inf, golden has "),
    "an array": (
        lambda call: variants.native_kernel(call).float().numpy(),
        "output must be a torch.Tensor, got ndarray",
    ),
    "nothing": (lambda call: None, "output must be a torch.Tensor, got NoneType"),
    "a tuple": (
        lambda call: (variants.native_kernel(call), None),
        "output must be a torch.Tensor, got tuple",
    ),
}


@pytest.mark.parametrize(("function", "says"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_output_is_told_in_one_sentence(
    function: Callable[[CoreCall], Any], says: str
) -> None:
    record = runner.judge_case(CORE, core(function))
    assert record.verdict == "MALFORMED"
    assert says in record.reason
    assert "\n" not in record.reason
    assert record.failed
    assert not record.statistics


def test_padded_rows_may_hold_anything() -> None:
    def scribbled(call: CoreCall) -> Tensor:
        output = variants.native_kernel(call)
        padded = (call.q_positions < 0)[:, None, :, None]
        return output.masked_fill(padded, float("nan"))

    assert runner.judge_case(CORE, core(scribbled)).verdict == "CONFORMS"


def test_layer_that_returns_a_bare_tensor_is_malformed() -> None:
    record = runner.judge_case(PREFILL, layer(lambda call: attention_layer(call).output))
    assert record.verdict == "MALFORMED"
    assert record.reason == "a layer must return a LayerOutput, got Tensor"


@pytest.mark.parametrize("case", [PREFILL, DECODE], ids=["prefill", "decode"])
@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_layer_whose_cache_lacks_a_slot_is_malformed(case: Case, name: str) -> None:
    def short(call: LayerCall) -> LayerOutput:
        result = attention_layer(call)
        return replace(result, **{name: getattr(result, name)[:, :, :-1]})

    record = runner.judge_case(case, layer(short))
    assert record.verdict == "MALFORMED"
    assert record.reason.startswith(f"{name} must have shape (2, 2, 9, 16), got (2, 2, 8, 16)")


def test_crash_keeps_its_traceback() -> None:
    def broken(call: CoreCall) -> Tensor:
        raise RuntimeError("no kernel for this\nand no second line")

    record = runner.judge_case(CORE, core(broken))
    assert record.verdict == "CRASHED"
    assert record.reason.startswith("RuntimeError: no kernel for this")
    assert "Traceback" in record.traceback
    assert "in broken" in record.traceback
    assert record.failed


def test_unsupported_is_no_failure() -> None:
    def refuses(call: CoreCall) -> Tensor:
        raise Unsupported("no grouped heads")

    record = runner.judge_case(CORE, core(refuses))
    assert (record.verdict, record.reason) == ("UNSUPPORTED", "no grouped heads")
    assert not record.failed


def test_case_that_is_not_claimed_never_reaches_the_subject() -> None:
    def refuses(call: CoreCall) -> Tensor:
        raise AssertionError("must not run")

    subject = replace(core(refuses), unsupported=lambda case: "not this one")
    record = runner.judge_case(CORE, subject)
    assert (record.verdict, record.reason) == ("UNSUPPORTED", "not this one")


def test_subject_of_the_other_scope_does_not_claim_the_case() -> None:
    record = runner.judge_case(PREFILL, core(variants.native_kernel))
    assert record.verdict == "UNSUPPORTED"
    assert "scope 'core'" in record.reason


def test_slot_without_a_token_must_keep_its_bits() -> None:
    def touches(call: LayerCall) -> LayerOutput:
        result = attention_layer(call)
        v_cache = result.v_cache.clone()
        v_cache[1, 0, 8, 3] += 1.0  # row 1 generates the tokens of slots 3 and 4
        return replace(result, v_cache=v_cache)

    assert runner.judge_case(DECODE, layer(attention_layer)).verdict == "CONFORMS"
    record = runner.judge_case(DECODE, layer(touches))
    assert record.verdict == "DEVIATES"
    assert record.reason.startswith("v_cache: slots left alone 1 at [1, 0, 8] exceeds its limit 0")


def test_subject_may_write_to_its_arguments() -> None:
    def vandal(call: LayerCall) -> LayerOutput:
        result = attention_layer(call)
        copied = LayerOutput(
            output=result.output.clone(),
            k_cache=result.k_cache.clone(),
            v_cache=result.v_cache.clone(),
        )
        for tensor in (call.hidden_states, call.k_cache, call.v_cache, *call.weights.values()):
            if tensor is not None:
                tensor.zero_()
        return copied

    for case in (PREFILL, DECODE):
        assert runner.judge_case(case, layer(vandal)).verdict == "CONFORMS"


@pytest.mark.parametrize("case", [CORE, PREFILL, DECODE], ids=["core", "prefill", "decode"])
def test_a_case_judged_twice_gives_the_same_record(case: Case) -> None:
    subject = core(variants.native_kernel) if case is CORE else load_subject("impl")
    first, second = (runner.judge_case(case, subject) for _ in range(2))
    assert replace(first, seconds={}) == replace(second, seconds={})
    assert first.seconds.keys() == {"golden", "subject", "error model", "judge"}


def test_record_names_the_command_that_judges_the_case_again() -> None:
    record = runner.judge_case(PREFILL, load_subject("impl"))
    assert record.reproduce == (
        f"attn-conformance run --subject impl --case {PREFILL.id} --profile native "
        "--cases-in-run 1000"
    )


def zeros_kernel(call: CoreCall) -> Tensor:
    return torch.zeros_like(call.q)


def judged_cheaply(case: Case, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> CaseRecord:
    """Judge with two Monte Carlo runs in place of 8 or 32: the limits are cruder, not zero."""
    monkeypatch.setattr(error_model, "FEW_RUNS", 2)
    monkeypatch.setattr(error_model, "MANY_RUNS", 2)
    monkeypatch.setattr(runner, "MANY_RUNS", 2)
    return runner.judge_case(case, subject)


ZEROS = Subject(name="zeros", function=planted.zeros, scope="layer", profile="native")
SMOKE: dict[str, tuple[list[Case], Subject]] = {
    # every row of the features suite in one dtype; test_planted_bugs has a dozen rows in all three
    "features": (
        [
            case
            for case in feature_cases("smoke")
            if case.dtype == "bfloat16" and max(case.workload.lengths) < 1000
        ],
        ZEROS,
    ),
    "core": (core_cases("smoke"), core(zeros_kernel)),
    # every kind of published layer whose decode starts within a short context
    "presets": (
        [
            case
            for case in preset_cases("smoke")
            if case.workload.phase == "tkg" and max(case.workload.lengths) < 1000
        ],
        ZEROS,
    ),
}


@pytest.mark.parametrize("suite", SMOKE)
def test_all_zeros_fail_every_case_of_the_smoke_tier_by_far(
    suite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases, subject = SMOKE[suite]
    found = {case.id: judged_cheaply(case, subject, monkeypatch) for case in cases}
    # Two runs for eight can move sigma and limits by a small factor; zeros are off by the whole
    # output, at least a hundred roundings of bfloat16.
    close = {key: r.worst_ratio for key, r in found.items() if not r.worst_ratio > 20}
    assert {r.verdict for r in found.values()} == {"DEVIATES"}
    assert not close
