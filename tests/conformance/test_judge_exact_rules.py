"""Exact rules: each passes the correct subjects and fails one that breaks it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import variants
from torch import Tensor

from conformance.case_ids import parse
from conformance.cases import Case
from conformance.errors import UsageError
from conformance.runner import judge_case
from conformance.subjects import CoreCall, LayerCall, LayerOutput, Subject, load_subject
from conformance.subjects.impl import attention_layer
from conformance.variants import dense, streamed
from reports.records import CaseRecord

PREFILL = parse("core-h256-hq8-hkv2-d32/cte-bf16-b2-q97_33-gaussian-seed0")
DECODE = parse("core-h256-hq8-hkv8-d32/tkg-bf16-b2-kv80_17-gaussian-seed0")
LAYER_PREFILL = parse("h64-hq4-hkv2-d16-rope10000/cte-fp32-b2-q9-gaussian-seed0")
LAYER_DECODE = parse("h64-hq4-hkv2-d16-rope10000/tkg-bf16-b2-kv7_3-steps2-gaussian-seed0")
RULES = {"repeated run", "other strides", "masked values", "batch mates"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def judged(case: Case, subject: Subject) -> CaseRecord:
    return judge_case(case, subject, exact_rules=True)


def broken(record: CaseRecord) -> set[str]:
    return {
        s.name.removeprefix("exact: ")
        for s in record.statistics
        if s.name.startswith("exact: ") and s.ratio > 1
    }


@pytest.mark.parametrize("case", [PREFILL, DECODE], ids=["prefill", "decode"])
def test_correct_kernels_keep_every_rule(case: Case) -> None:
    with variants.shared_work():
        for name in variants.CORES:
            record = judged(case, variants.CORES[name])
            assert record.verdict == "CONFORMS", f"{name}: {record.reason}"
            held = {s.name for s in record.statistics if s.name.startswith("exact: ")}
            assert held == {f"exact: {rule}" for rule in RULES}


@pytest.mark.parametrize("case", [LAYER_PREFILL, LAYER_DECODE], ids=["prefill", "decode"])
def test_impl_keeps_every_rule(case: Case) -> None:
    record = judged(case, load_subject("impl"))
    assert record.verdict == "CONFORMS", record.reason
    held = {s.name for s in record.statistics if s.name.startswith("exact: ")}
    assert held == {f"exact: {rule}" for rule in RULES}


def drifting() -> Callable[[CoreCall], Tensor]:
    calls = itertools.count()

    def kernel(call: CoreCall) -> Tensor:
        """Round up on every second call, by far less than the error scale."""
        output = dense.float32_inside(call)
        return output if next(calls) % 2 == 0 else output * (1 + 2.0**-8)

    return kernel


def additive_mask(call: CoreCall) -> Tensor:
    """Hide keys by a penalty that huge scores outweigh."""
    scores = call.q.float() @ dense.per_query_head(call.k, call.q).float().transpose(2, 3)
    scores = scores * call.softmax_scale + torch.where(call.mask, 0.0, -1e4)
    weights = torch.softmax(scores, dim=-1) * call.mask
    return (weights @ dense.per_query_head(call.v, call.q).float()).to(call.q.dtype)


def tile_by_batch_mate(call: CoreCall) -> Tensor:
    """Choose the tile by what the batch's last row holds."""
    tile = 16 if call.q[-1].float().sum() > 0 else 64
    return streamed.flash(tile)(call)


def assumes_strides(call: CoreCall) -> Tensor:
    """Read the storage of q as if it were contiguous."""
    q = torch.as_strided(call.q, call.q.shape, torch.empty(call.q.shape).stride())
    return dense.float32_inside(replace(call, q=q))


BREAKERS: dict[str, Callable[[CoreCall], Any]] = {
    "masked values": additive_mask,
    "batch mates": tile_by_batch_mate,
    "other strides": assumes_strides,
}


@pytest.mark.parametrize("rule", BREAKERS)
def test_subject_that_breaks_one_rule_conforms_but_for_that_rule(rule: str) -> None:
    subject = Subject(name=rule, function=BREAKERS[rule], profile="flash")
    assert judge_case(PREFILL, subject).verdict == "CONFORMS"
    record = judged(PREFILL, subject)
    assert record.verdict == "DEVIATES"
    assert broken(record) == {rule}
    assert f"exact: {rule}" in record.reason


def test_repeated_run_that_differs_is_told() -> None:
    record = judged(PREFILL, Subject(name="drifts", function=drifting(), profile="flash"))
    assert "repeated run" in broken(record)


def test_rule_can_be_disclaimed_and_nan_must_be_claimed() -> None:
    lax = Subject(
        name="lax",
        function=tile_by_batch_mate,
        profile="flash",
        disclaims=("batch mates", "masked NaN"),
    )
    assert judged(PREFILL, lax).verdict == "CONFORMS"
    assert broken(judged(PREFILL, replace(variants.CORES["eager"], disclaims=()))) == {"masked NaN"}
    with pytest.raises(UsageError, match="disclaims must be among"):
        replace(lax, disclaims=("everything",))


def test_kernel_that_cleans_masked_values_may_claim_nan() -> None:
    def cleaned(call: CoreCall) -> Tensor:
        """Zero values that no row of the batch sees, row by row of the batch."""

        def attend(row: slice) -> Tensor:
            seen = call.mask[:, :, row].any(dim=2)[..., None]
            part = replace(
                call,
                q=call.q[:, :, row],
                k=torch.where(seen, call.k, 0.0),
                v=torch.where(seen, call.v, 0.0),
                mask=call.mask[:, :, row],
                q_positions=call.q_positions[:, row],
            )
            return variants.native_kernel(part)

        return torch.cat([attend(slice(i, i + 1)) for i in range(call.q.shape[2])], dim=2)

    subject = Subject(name="cleaned", function=cleaned, profile="native", disclaims=())
    record = judged(PREFILL, subject)
    assert record.verdict == "CONFORMS", record.reason
    assert "exact: masked NaN" in {s.name for s in record.statistics}


def test_layer_that_reads_empty_slots_is_told() -> None:
    def leaky(call: LayerCall) -> LayerOutput:
        """Add a trace of the last cache slot, empty but in the longest row, to the output."""
        result = attention_layer(call)
        if call.v_cache is None:
            return result
        return replace(result, output=result.output + call.v_cache[:, :1, -1, :1] * 2.0**-60)

    subject = Subject(name="leaky", function=leaky, scope="layer", profile="native")
    assert judge_case(LAYER_DECODE, subject).verdict == "CONFORMS"
    assert broken(judged(LAYER_DECODE, subject)) == {"masked values"}


def test_subject_that_crashes_on_a_changed_call_deviates_and_says_so() -> None:
    def fragile(call: CoreCall) -> Tensor:
        if not call.q.is_contiguous():
            raise RuntimeError("q must be contiguous")
        return variants.native_kernel(call)

    record = judged(PREFILL, Subject(name="fragile", function=fragile, profile="native"))
    assert broken(record) == {"other strides"}
    told = [s for s in record.statistics if s.name == "exact: other strides"]
    assert told[0].derivation == "RuntimeError: q must be contiguous"
    assert record.reproduce.endswith("--exact-rules on")
