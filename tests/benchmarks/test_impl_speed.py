"""The benchmark of `impl` compares layers that compute the same, and reports what it measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.benchmarks import impl_contenders, impl_memory, impl_speed
from conformance.benchmarks.figures import Figure, figure
from conformance.benchmarks.impl_contenders import Call, Step, contenders
from impl.kernels import prefill
from impl.strategy import Implementation


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HIDDEN_OF_DECODE", "HIDDEN_OF_PREFILL"):
        monkeypatch.setattr(impl_contenders, name, 64)


@pytest.mark.parametrize(("prior", "tokens"), [(0, 9), (7, 1)])
def test_contenders_compute_the_same(prior: int, tokens: int) -> None:
    step = Step(prior=prior, tokens=tokens, dtype=torch.float32)
    with torch.no_grad():
        calls = contenders(step, flex=False)
        outputs = {name: call() for name, call in calls.items()}
    ours = outputs.pop("impl")
    assert set(outputs) >= {"torch-sdpa"}
    for other in outputs.values():
        # contractions of at most 4096 terms follow each other four times: 4 * 4096 * 2^-24
        assert float((other - ours).abs().max() / ours.abs().max()) < 1e-3


def test_the_best_peer_is_the_one_with_the_lowest_median(monkeypatch: pytest.MonkeyPatch) -> None:
    took = {"impl": [2.0, 2.0, 9.0], "slow": [4.0, 4.0, 0.1], "fast": [1.0, 1.0, 3.0]}
    monkeypatch.setattr(impl_speed, "contenders", lambda *_, **__: {})
    monkeypatch.setattr(impl_speed, "take_turns", lambda *_, **__: dict(took))
    step = Step(prior=4, tokens=1, dtype=torch.float32)
    best, *_ = impl_speed.layer("decode/float32/cache4", step, 3, quick=True)
    assert best.name == "impl/decode/float32/cache4/over-best"
    assert best.samples == (2.0, 2.0, 3.0)
    assert (best.target, best.met) == (1.15, False)


@pytest.mark.parametrize(("tokens", "target"), [(2048, 1.1), (4096, None)])
def test_prefill_has_a_target_up_to_its_length(
    tokens: int, target: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(impl_speed, "contenders", lambda *_, **__: {})
    monkeypatch.setattr(
        impl_speed, "take_turns", lambda *_, **__: {"impl": [1.0], "torch-sdpa": [1.0]}
    )
    step = Step(prior=0, tokens=tokens, dtype=torch.float32)
    assert impl_speed.layer("x", step, 1, quick=True)[0].target == target


def figures() -> list[Figure]:
    return [
        figure("impl/decode/float32/cache64/over-best", [0.5], "ratio", "lower", 1.15),
        figure("impl/decode/float32/cache64/seconds", [0.001], "seconds"),
        figure("impl/decode/float32/cache64/torch-sdpa-seconds", [0.002], "seconds"),
        figure("impl/memory/s128/over-s64", [2.5], "ratio", "lower", 2.2),
    ]


def test_the_page_shows_every_step_and_says_what_was_missed() -> None:
    text = impl_speed.tables(figures())
    assert "| decode/float32/cache64 | 1 | 2 | - | - | - | 0.50 | ≤ 1.15, met |" in text
    assert "| impl/memory/s128/over-s64 | 2.5 | ratio | ≤ 2.2, not met |" in text


def test_a_run_writes_figures_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("attention", "layer", "memory"):
        monkeypatch.setattr(impl_speed, name, lambda *_, **__: [])
    monkeypatch.setattr(impl_speed, "memory", lambda *_: figures())
    json_path, page = tmp_path / "figures.json", tmp_path / "page.md"
    impl_speed.run(json_path, quick=True, page=page)
    assert '"impl/memory/s128/over-s64"' in json_path.read_text()
    assert "<!-- measured -->" in page.read_text()


def test_attention_is_measured_beside_pytorchs_by_the_kernel_a_layer_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[Implementation] = []

    def spy(*tensors: torch.Tensor, implementation: Implementation, **named: Any) -> Any:
        taken.append(implementation)
        return prefill(*tensors, implementation=implementation, **named)

    def once(calls: dict[str, Call], **_: object) -> dict[str, list[float]]:
        return {name: [float(call().isfinite().all())] for name, call in calls.items()}

    monkeypatch.setattr(impl_speed, "prefill", spy)
    monkeypatch.setattr(impl_speed, "take_turns", once)
    found = {item.name for item in impl_speed.attention(8, torch.float32, 1)}
    kinds = ("causal", "sinks", "softcap", "streamed")
    assert found >= {f"impl/attention/{kind}/float32/s8/over-sdpa" for kind in kinds}
    fused, streamed = Implementation.SDPA, Implementation.FLASH
    assert taken == [fused, fused, streamed, streamed]


@pytest.mark.parametrize(("length", "target"), [(4096, 1.5), (1024, None)])
def test_attention_has_a_target_at_one_length(
    length: int, target: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(impl_speed, "HEADS", 1)
    monkeypatch.setattr(impl_speed, "KV_HEADS", 1)
    monkeypatch.setattr(impl_speed, "HEAD_DIM", 8)
    monkeypatch.setattr(
        impl_speed, "take_turns", lambda calls, **_: {name: [1.0] for name in calls}
    )
    ratios = [i for i in impl_speed.attention(length, torch.float32, 1) if i.unit == "ratio"]
    assert [i.target for i in ratios] == [target, target, target, None]


def test_memory_beyond_the_weights_is_positive_and_finite() -> None:
    assert 0 <= impl_memory.take(64) < 1000
