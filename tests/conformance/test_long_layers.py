"""Steps long enough for each of impl's kernels conform, and take the kernel they are meant for."""

from __future__ import annotations

from typing import Any

import pytest

from conformance import assert_conforms
from conformance.subjects import load_subject
from impl import attention_core
from impl.strategy import Implementation


def kernels(monkeypatch: pytest.MonkeyPatch) -> set[Implementation]:
    """Who computes attention from now on."""
    taken: set[Implementation] = set()
    for name in ("prefill", "decode"):
        right = getattr(attention_core, name)

        def spy(*args: Any, right: Any = right, **named: Any) -> Any:
            taken.add(named["implementation"])
            return right(*args, **named)

        monkeypatch.setattr(attention_core, name, spy)
    return taken


@pytest.mark.parametrize(
    ("case", "kernel"),
    [
        ("h64-hq2-hkv1-d32/cte-bf16-b1-q520-gaussian-seed0", Implementation.SDPA),
        ("h64-hq2-hkv1-d32-sinks/cte-fp32-b1-q520-gaussian-seed0", Implementation.SDPA),
        ("h64-hq2-hkv1-d32-sinks/cte-bf16-b1-q520-gaussian-seed0", Implementation.SDPA),
        ("h64-hq2-hkv1-d32-sinks/cte-bf16-b1-q520-outlier-seed0", Implementation.SDPA),
        ("h64-hq2-hkv1-d32-sinks/cte-fp16-b1-q520-gaussian-seed0", Implementation.SDPA),
        ("h64-hq2-hkv1-d32-sinks-window64/cte-bf16-b1-q520-gaussian-seed0", Implementation.FLASH),
        ("h256-hq4-hkv2-d128/tkg-fp32-b2-kv1100_700-steps2-gaussian-seed0", Implementation.NATIVE),
        (
            "h256-hq4-hkv2-d128/tkg-bf16-b2-kv1100_700-steps2-gaussian-seed0",
            Implementation.HEADWISE,
        ),
        ("h256-hq4-hkv2-d128/tkg-bf16-b2-kv1100_700-steps2-outlier-seed0", Implementation.HEADWISE),
        ("h256-hq4-hkv2-d128/tkg-fp16-b2-kv1100_700-steps2-peaked-seed0", Implementation.HEADWISE),
        (
            "h256-hq4-hkv2-d128-sinks/tkg-bf16-b2-kv1100_700-steps2-gaussian-seed0",
            Implementation.HEADWISE,
        ),
    ],
)
def test_a_long_step_conforms(
    case: str, kernel: Implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = kernels(monkeypatch)
    assert_conforms(load_subject("impl"), case)
    assert taken == {kernel}
