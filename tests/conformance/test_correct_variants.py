"""Correct implementations stay green, however they sum, tile or over-deliver."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import variants

from conformance.case_ids import parse
from conformance.cases import DTYPES, REGIMES, Case, Workload
from conformance.matrix import core_cases
from conformance.runner import judge_case
from conformance.subjects import Subject, load_subject
from golden import AttentionConfig

GROUPED = AttentionConfig(
    hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32
)
WINDOWED = AttentionConfig(
    hidden_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    sliding_window=16,
    learned_sinks_size=1,
)
CAPPED = AttentionConfig(
    hidden_size=128, num_attention_heads=4, num_key_value_heads=4, head_dim=32, softcap=20.0
)
PROMPT = Workload(phase="cte", lengths=(139, 33))
DECODE = Workload(phase="tkg", lengths=(139, 33))

SETTINGS = (
    (GROUPED, PROMPT),
    (WINDOWED, PROMPT),
    (CAPPED, DECODE),
)
"""Grouped heads, a window with sinks, a soft cap; longer than the largest tile, rows unequal."""

CASES = [
    Case(config=config, workload=work, dtype=dtype, regime=regime, scope="core")
    for (config, work), dtype, regime in itertools.product(SETTINGS, DTYPES, REGIMES)
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def verdicts(case: Case, subjects: list[Subject]) -> dict[str, str]:
    with variants.shared_work():
        records = [judge_case(case, subject) for subject in subjects]
    return {record.subject: f"{record.verdict} {record.reason}".rstrip() for record in records}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_correct_kernels_conform_whatever_their_order_of_sums_tiles_and_extra_precision(
    case: Case,
) -> None:
    subjects = [variants.CORES[name] for name in variants.CORES]
    assert verdicts(case, subjects) == dict.fromkeys(variants.CORES, "CONFORMS")


LAYER_CASES = [
    f"{layer}/{work}"
    for layer in (
        "h256-hq8-hkv2-d32-rope10000",
        "h256-hq8-hkv8-d32-qkvbias-obias-fused-sinks-window16",
        "h256-hq8-hkv8-d32-norm_rms_pre_head_w_1em06_0-rope10000",
    )
    for work in (
        "cte-fp32-b2-q61_33-gaussian-seed0",
        "cte-bf16-b2-q61_33-outlier-seed0",
        "cte-fp16-b2-q61_33-peaked-seed0",
        "tkg-fp32-b2-kv80_17-steps3-peaked-seed0",
        "tkg-bf16-b2-kv80_17-steps3-gaussian-seed0",
        "tkg-fp16-b2-kv80_17-steps3-outlier-seed0",
    )
]


@pytest.mark.parametrize("case_id", LAYER_CASES)
def test_impl_conforms_with_its_hidden_channels_permuted_and_in_float32(case_id: str) -> None:
    found = verdicts(parse(case_id), list(variants.LAYERS.values()))
    assert found == dict.fromkeys(variants.LAYERS, "CONFORMS")


def test_more_exact_than_claimed_passes_with_a_smaller_spread() -> None:
    case = parse("core-h256-hq8-hkv2-d32/cte-bf16-b2-q97-gaussian-seed0")
    spreads = {}
    with variants.shared_work():
        for name in ("eager", "flash, tile 32", "float64 inside"):
            subject = replace(variants.CORES[name], profile="eager")
            record = judge_case(case, subject)
            assert record.verdict == "CONFORMS"
            (spread,) = (s for s in record.statistics if s.name == "spread")
            spreads[name] = spread.value
    assert spreads["float64 inside"] < spreads["flash, tile 32"] < spreads["eager"]
    # An eager kernel is what the profile describes, so its mean square is 1 but for chance: of the
    # 8 runs that give sigma, and of its own rows, each of which counts for at least one free error.
    rows = 2 * 8 * 97
    deviation = math.sqrt(2 / rows * (1 + 1 / 8))
    assert abs(spreads["eager"] ** 2 - 1) < 5 * deviation


def test_torch_sdpa_conforms_where_it_claims_to() -> None:
    subject = load_subject("torch-sdpa")
    cases = [case for case in core_cases("smoke") if max(case.workload.lengths) < 1000]
    found = {case.id: judge_case(case, subject) for case in cases}
    assert {record.verdict for record in found.values()} == {"CONFORMS", "UNSUPPORTED"}
    for case in cases:
        claimed = case.config.learned_sinks_size is None and case.config.softcap is None
        assert (found[case.id].verdict == "CONFORMS") == claimed, found[case.id].reason
