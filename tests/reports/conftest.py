"""Records to report on: one typical case, changed field by field where a test needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from reports.records import CaseRecord, Results, Statistic, Worst

DERIVATION = "extreme-value limit over 131,072 elements"


def statistic(ratio: float, name: str = "magnitude") -> Statistic:
    """A figure at `ratio` times its limit; the limit is a power of two, so the ratio is exact."""
    return Statistic(
        output="output",
        name=name,
        value=4.0 * ratio,
        limit=4.0,
        derivation=DERIVATION,
        where=(0, 17, 0, 93),
    )


def case(**changes: Any) -> CaseRecord:
    """A conforming case with the named fields replaced."""
    fields: dict[str, Any] = {
        "case_id": "cte-bf16-b1-hq32-hkv8-s512-d128",
        "suite": "features",
        "features": ("sliding window",),
        "model": "",
        "layer": "",
        "phase": "context encoding",
        "dtype": "bfloat16",
        "regime": "normal",
        "seed": 7,
        "config": {"num_attention_heads": 32, "rope": {"theta": 10000.0, "style": "half"}},
        "workload": {"batch_size": 1, "q_len": 512, "kv_len": 512},
        "subject": "impl",
        "profile": "bfloat16-fp32-accumulate",
        "profile_stages": {"q_proj": "bfloat16", "scores": "float32"},
        "verdict": "CONFORMS",
        "reason": "",
        "statistics": (statistic(0.5), statistic(0.25, "spread")),
        "worst": Worst(
            output="output",
            index=(0, 17, 0, 93),
            observed=0.43359375,
            expected=0.401234567,
            error=0.032359183,
            sigma=0.0162,
            z=1.9975,
        ),
        "reproduce": "attn-conformance judge --case cte-bf16-b1-hq32-hkv8-s512-d128",
        "seconds": {"golden": 0.31, "subject": 0.0123},
    }
    return CaseRecord(**{**fields, **changes})


@pytest.fixture(scope="session")
def make_case() -> Callable[..., CaseRecord]:
    """Builds a conforming case with the named fields replaced."""
    return case


@pytest.fixture(scope="session")
def make_statistic() -> Callable[..., Statistic]:
    """Builds a figure at the given multiple of its limit."""
    return statistic


@pytest.fixture(scope="session")
def make_results() -> Callable[..., Results]:
    """Builds results of the given cases with a full environment."""

    def build(*cases: CaseRecord, **changes: Any) -> Results:
        environment = {
            "command": "pytest --pyargs conformance.suites",
            "tier": "standard",
            "subject": "impl",
            "started": "2025-11-23T10:00:00+00:00",
            "seconds": 754.2,
            "platform": "Linux",
            "machine": "x86_64",
            "packages": {"numpy": "2.3.1"},
            "false_alarm_rate": 1e-3,
        }
        return Results(environment={**environment, **changes}, cases=cases)

    return build
