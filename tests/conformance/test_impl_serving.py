"""`impl` serves schedules from its caches, and bugs planted in these are found by judging it."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

import impl.kv_cache.manager
import impl.kv_cache.paged
from conformance.case_ids import parse
from conformance.cases import Case
from conformance.runner import judge_case
from conformance.serve_matrix import serving_cases
from conformance.subjects import load_subject
from impl.kv_cache import Codec, KVCacheManager
from impl.slot_positions import ChunkSlots, RollingSlots, ShardGroupSlots

IMPL = load_subject("impl")
LENGTHY = 10_000
"""Tokens cached from which on a case is left to the command line: seconds each."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def served_cases() -> list[Case]:
    """Every schedule of the standard tier that `impl` claims, its dtype by turns, by halves."""
    drawn = [case for case in serving_cases("standard") if case.regime == "gaussian"]
    by_turns = [case for number, case in enumerate(drawn) if number % 3 == number // 3 % 3]
    short = [case for case in by_turns if max(case.workload.lengths) < LENGTHY]
    return [case for case in short if IMPL.unsupported(case) is None][1::2]


@pytest.mark.parametrize("case", served_cases(), ids=lambda case: case.id)
def test_impl_serves_what_golden_does(case: Case) -> None:
    record = judge_case(case, IMPL)
    drafts_in_chunks = "chunked" in case.features and "speculation" in case.features
    assert record.verdict == ("UNSUPPORTED" if drafts_in_chunks else "CONFORMS"), record.reason


def test_module_says_why_it_takes_no_drafts_in_a_chunked_layer() -> None:
    case = parse(f"{_CHUNK}/serve-bf16-b2-kv0-contiguous-prompt9_5.draft3keep1-gaussian-seed0")
    record = judge_case(case, IMPL)
    assert record.verdict == "UNSUPPORTED"
    assert "speculation is not defined across a chunk's end" in record.reason


def test_impl_claims_every_cache() -> None:
    claimed = {
        (case.workload.schedule.cache.layout, case.workload.schedule.cache.code)
        for case in serving_cases("standard")
        if case.workload.schedule is not None and IMPL.unsupported(case) is None
    }
    assert {layout for layout, _ in claimed} == {
        "contiguous",
        "transposed",
        "rolling",
        "chunk",
        "paged",
        "sharded",
    }
    assert {code for _, code in claimed} == {"", "float8_e4m3fn", "float8_e5m2", "int8"}


def _one_slot_on(self: Any, positions: torch.Tensor) -> torch.Tensor:
    size = self.ring if isinstance(self, RollingSlots) else self.size
    return torch.remainder(positions + 1, size)


def _ring_without_drafts(sliding_window: int, speculation_length: int = 1) -> RollingSlots:
    return RollingSlots(sliding_window - 1)


def _core_by_blocks(self: Any, positions: torch.Tensor) -> torch.Tensor:
    return positions  # the first core holds the first tokens


def _first_block(table: torch.Tensor, at: torch.Tensor, size: int) -> torch.Tensor:
    return (table[:, :1] * size + at % size).masked_fill(at < 0, -1)


def _own_row(
    ids: torch.Tensor | None, batch: int, lines: int, device: Any, *, first_line: int = 0
) -> torch.Tensor:
    return torch.arange(batch)  # batch row b always owns line b


def _unscaled(self: Any, codes: torch.Tensor) -> torch.Tensor:
    return codes.to(self.layer_dtype)


_LAYER = "h64-hq4-hkv2-d16-rope10000"
_WINDOW = "h64-hq4-hkv2-d16-window8-rope10000"
_CHUNK = "h64-hq4-hkv2-d16-chunk8-rope10000"


@pytest.mark.parametrize(
    ("owner", "name", "planted", "layer", "calls"),
    [
        (RollingSlots, "slot_of", _one_slot_on, _WINDOW, "rolling-prompt9_5.decode2"),
        (
            RollingSlots,
            "of",
            _ring_without_drafts,
            _WINDOW,
            "rolling-prompt9_5.draft3keep1_2.decode1",
        ),
        (ChunkSlots, "slot_of", _one_slot_on, _CHUNK, "chunk-prompt11_5.decode2"),
        (ShardGroupSlots, "slot_of", _core_by_blocks, _LAYER, "sharded2-prompt9_5.decode2"),
        (impl.kv_cache.paged, "slot_mapping", _first_block, _LAYER, "paged4-prompt9_5.decode2"),
        (
            impl.kv_cache.manager,
            "cache_lines",
            _own_row,
            _LAYER,
            "contiguous-prompt9_5.decode1at1_0",
        ),
        (Codec, "decode", _unscaled, _LAYER, "contiguous_int8head-prompt9_5.decode2"),
        (
            KVCacheManager,
            "seated",
            lambda self, at, ids: torch.zeros_like(at),
            _LAYER,
            "contiguous-prompt9_5.decode2",
        ),
    ],
)
def test_bugs_planted_in_caches_are_found(
    owner: Any, name: str, planted: Any, layer: str, calls: str
) -> None:
    case = parse(f"{layer}/serve-bf16-b2-kv0-{calls}-gaussian-seed0")
    assert judge_case(case, IMPL).verdict == "CONFORMS"
    with mock.patch.object(owner, name, planted):
        assert judge_case(case, IMPL).verdict in ("DEVIATES", "CRASHED", "MALFORMED")
