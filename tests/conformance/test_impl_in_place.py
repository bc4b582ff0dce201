"""`impl` conforms where decode steps write their cache in place and attend to it as it is then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

import impl
from conformance.case_ids import parse
from conformance.cases import Case
from conformance.runner import judge_case
from conformance.serve_matrix import serving_cases
from conformance.subjects import load_subject
from impl.kernels import updated

IMPL = load_subject("impl")
LENGTHY = 3_000
"""Tokens cached from which on a case is left to the command line: seconds each."""
ASKED = {
    "fused_qkv": True,
    "qkv_kernel_enabled": True,
    "attn_block_tkg_nki_kernel_enabled": True,
    "attn_block_tkg_nki_kernel_cache_update": True,
}
WIDE = "h256-hq8-hkv2-d64"


@pytest.fixture(autouse=True)
def attended() -> Iterator[mock.Mock]:
    """Ask every layer that may for decode in place; calls of PyTorch's attention over a cache."""
    made = impl.NeuronConfig

    def asked(**fields: Any) -> impl.NeuronConfig:
        refused = fields.get("flash_decoding_enabled") or fields.get("is_chunked_prefill")
        return made(**(fields if refused else fields | ASKED))

    torch.set_num_threads(1)
    with (
        mock.patch.object(impl, "NeuronConfig", asked),
        mock.patch.object(updated, "_attend", wraps=updated._attend) as attend,
    ):
        yield attend


def served_cases() -> list[Case]:
    """A few of the short schedules that `impl` claims, by turns."""
    drawn = [
        case
        for case in serving_cases("standard")
        if max(case.workload.lengths) < LENGTHY
        and IMPL.unsupported(case) is None
        and "chunked" not in case.features
        and case.workload.schedule is not None
        and case.workload.schedule.cache.layout in ("contiguous", "rolling", "paged")
    ]
    return drawn[::11]


@pytest.mark.parametrize("case", served_cases(), ids=lambda case: case.id)
def test_schedules_are_served_in_place(case: Case) -> None:
    record = judge_case(case, IMPL)
    assert record.verdict == "CONFORMS", record.reason


@pytest.mark.parametrize(
    ("case", "fused"),
    [
        (f"{WIDE}/tkg-bf16-b3-kv130_64_1-steps3-gaussian-seed0", True),
        (f"{WIDE}/tkg-fp16-b3-kv130_64_1-steps3-gaussian-seed1", True),
        (f"{WIDE}/tkg-bf16-b2-kv515_200-steps2-outlier-seed0", True),
        (f"{WIDE}/tkg-bf16-b2-kv515_200-steps2-peaked-seed0", True),
        (f"{WIDE}/tkg-fp32-b2-kv515_200-steps2-gaussian-seed0", True),
        (f"{WIDE}/tkg-fp32-b2-kv515_200-steps2-peaked-seed0", True),
        (f"{WIDE}/tkg-fp32-b2-kv515_200-steps2-large-seed0", True),
        (f"{WIDE}-window33/tkg-bf16-b2-kv200_20-steps2-gaussian-seed0", True),
        (f"{WIDE}-sinks/tkg-bf16-b2-kv130_64-steps2-gaussian-seed0", False),
        (f"{WIDE}-cap30/tkg-bf16-b2-kv130_64-steps2-gaussian-seed0", False),
        ("h256-hq7-hkv1-d32/tkg-bf16-b2-kv130_64-steps2-gaussian-seed0", True),
        ("h256-hq4-hkv4-d64/tkg-bf16-b2-kv130_64-steps2-gaussian-seed0", True),
        ("h256-hq4-hkv2-d128/tkg-bf16-b1-kv4100-steps2-gaussian-seed0", True),
    ],
)
def test_steps_are_decoded_in_place(case: str, fused: bool, attended: mock.Mock) -> None:
    record = judge_case(parse(case), IMPL)
    assert record.verdict == "CONFORMS", record.reason
    assert attended.called is fused


def _forgets_the_step(prior: Any, active: Any, slots: Any) -> Any:
    return prior.expand(*slots.shape[:1], 1, slots.shape[1], prior.shape[3])


def _sees_one_more(right: Any) -> Any:
    def mask(prior: Any, active: Any, slots: Any) -> Any:
        seen = right(prior, active, slots)
        return seen | seen.roll(1, dims=3)

    return mask


def _wrong_scale(right: Any) -> Any:
    def attend(q: Any, k: Any, v: Any, mask: Any, divisor: float) -> Any:
        return right(q, k, v, mask, 0.99 * divisor)

    return attend


def _heads_mixed_up(right: Any) -> Any:
    def attend(q: Any, k: Any, v: Any, mask: Any, divisor: float) -> Any:
        batch, heads, q_len, width = q.shape
        q = q.view(batch, heads // 4, 4, q_len, width).transpose(1, 2).reshape(q.shape)
        return right(q, k, v, mask, divisor)

    return attend


@pytest.mark.parametrize(
    ("name", "bug"),
    [
        ("_updated_mask", _forgets_the_step),
        ("_updated_mask", _sees_one_more(updated._updated_mask)),
        ("_attend", _wrong_scale(updated._attend)),
        ("_attend", _heads_mixed_up(updated._attend)),
    ],
)
def test_a_bug_in_it_is_found(name: str, bug: Any) -> None:
    case = parse(f"{WIDE}/tkg-bf16-b2-kv130_64-steps2-gaussian-seed0")
    with mock.patch.object(updated, name, bug):
        assert judge_case(case, IMPL).verdict == "DEVIATES"
