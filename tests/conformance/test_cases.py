"""A case refuses what no case can be, and names what it exercises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from conformance.case_ids import parse
from conformance.cases import Case, Workload
from conformance.errors import UsageError
from golden import AttentionConfig

CONFIG = AttentionConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=4, head_dim=16)
PROMPT = Workload(phase="cte", lengths=(9, 5))
CASE = Case(config=CONFIG, workload=PROMPT, dtype="bfloat16")

WORKLOADS: dict[str, tuple[dict[str, Any], str]] = {
    "phase": ({"phase": "train", "lengths": (3,)}, "phase must be 'cte', 'tkg' or 'serve'"),
    "no rows": ({"phase": "cte", "lengths": ()}, "lengths must be at least 1"),
    "empty prompt": ({"phase": "cte", "lengths": (3, 0)}, "lengths must be at least 1"),
    "negative cache": ({"phase": "tkg", "lengths": (-1,)}, "lengths must be at least 0"),
    "start of decode": ({"phase": "tkg", "lengths": (3,), "start": 2}, "start and prior belong to"),
    "prior of decode": ({"phase": "tkg", "lengths": (3,), "prior": 2}, "start and prior belong to"),
    "steps of a prompt": ({"phase": "cte", "lengths": (3,), "steps": 2}, "steps belongs to token"),
    "no steps": ({"phase": "tkg", "lengths": (3,), "steps": 0}, "steps must be positive"),
    "negative start": ({"phase": "cte", "lengths": (3,), "start": -1}, "must not be negative"),
}


@pytest.mark.parametrize(("fields", "says"), WORKLOADS.values(), ids=WORKLOADS)
def test_workload_that_cannot_be_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Workload(**fields)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dtype": "float64"}, "dtype must be one of float32, bfloat16, float16"),
        ({"regime": "uniform"}, "regime must be one of .* got 'uniform'"),
        ({"workload": replace(PROMPT, prior=4)}, "prior needs scope 'core'"),
        (
            {"workload": replace(PROMPT, prior=4, start=4), "scope": "core"},
            "start and prior exclude each other",
        ),
    ],
)
def test_case_that_cannot_be_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        replace(CASE, **changes)


def test_workload_counts_its_rows_and_queries() -> None:
    assert (PROMPT.batch, PROMPT.q_len) == (2, 9)
    decode = Workload(phase="tkg", lengths=(80, 0, 7), steps=3)
    assert (decode.batch, decode.q_len) == (3, 3)


FEATURES = {
    "h64-hq4-hkv4-d16/cte-bf16-b1-q9-gaussian-seed0": ("plain causal",),
    "h64-hq4-hkv1-d16/cte-bf16-b1-q9-gaussian-seed0": ("MQA",),
    "h64-hq4-hkv2-d16-sinks-window4/cte-bf16-b1-q9-gaussian-seed0": (
        "GQA",
        "sliding window",
        "learned sinks",
    ),
    "h64-hq4-hkv4-d16-qkvbias-obias-fused/cte-bf16-b1-q9-gaussian-seed0": (
        "QKV bias",
        "output bias",
        "fused QKV",
    ),
    "h64-hq4-hkv4-d16-rope10000-rot8-linear_8/cte-bf16-b1-q9-start5-gaussian-seed0": (
        "RoPE half",
        "RoPE partial",
        "RoPE Linear",
        "position offset",
    ),
    "h64-hq4-hkv4-d16-norm_rms_post_head_plain_1em06_0/tkg-bf16-b2-kv9_3-gaussian-seed0": (
        "QK rms norm post-RoPE",
        "unequal lengths",
    ),
    "core-h64-hq4-hkv4-d16-cap20-scale0.5/cte-bf16-b1-q9-prior4-gaussian-seed0": (
        "softcap",
        "softmax scale",
        "q_len != kv_len",
    ),
    # the core has no projections, so what they do is no feature of it
    "core-h64-hq4-hkv4-d16-qkvbias/cte-bf16-b1-q9-gaussian-seed0": ("plain causal",),
}


@pytest.mark.parametrize(("case_id", "features"), FEATURES.items())
def test_features_are_what_the_case_exercises(case_id: str, features: tuple[str, ...]) -> None:
    assert parse(case_id).features == features


def test_suite_follows_from_scope_model_and_regime() -> None:
    ids = {
        "features": CASE.id,
        "core": f"core-{CASE.id}",
        "presets": "gpt-oss-20b.sliding/cte-bf16-b1-q9-gaussian-seed0",
        "model": "smollm2.layer07/cte-bf16-b1-q9-prompt-seed0",
    }
    assert {suite: parse(case_id).suite for suite, case_id in ids.items()} == {s: s for s in ids}
