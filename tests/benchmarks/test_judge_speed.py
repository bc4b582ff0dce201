"""The benchmark of the judge times whole verdicts that conform, and reports what it measured."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from conformance import cli
from conformance.benchmarks import judge_speed
from conformance.benchmarks.figures import figure
from conformance.case_ids import parse
from conformance.scale_cache import ScaleCache
from golden import Attended

SMALL = "core-h256-hq4-hkv2-d64-sinks-window16/cte-bf16-b1-q48-gaussian-seed0"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_contenders_are_the_same_attention_and_a_verdict_that_conforms(tmp_path: Path) -> None:
    calls = judge_speed.contenders(parse(SMALL), "flash", ScaleCache(tmp_path, worth=0.0))
    dense, streamed = calls["golden"](), calls["streamed"]()
    assert isinstance(dense, Attended)
    assert isinstance(streamed, Attended)
    # clause B1 of `attend_blockwise` with scores of at most 60: 2 (exp(2 * 80 * 60 u) - 1)
    np.testing.assert_allclose(streamed.output, dense.output, rtol=0, atol=1e-11)
    with mock.patch.object(judge_speed, "judge_case") as judged:
        judged.return_value.verdict = "CONFORMS"
        for name in ("verdict", "cached"):
            calls[name]()
    with_cache = [call.kwargs["cache"] for call in judged.call_args_list]
    assert with_cache == [None, ScaleCache(tmp_path, worth=0.0)]


def test_a_verdict_that_finds_something_is_not_timed(tmp_path: Path) -> None:
    calls = judge_speed.contenders(parse(SMALL), "flash", ScaleCache(tmp_path, worth=0.0))
    calls["verdict"]()
    with mock.patch.object(judge_speed, "reference") as wrong:
        wrong.return_value.outputs = {"output": np.zeros((1, 4, 48, 64))}
        calls = judge_speed.contenders(parse(SMALL), "flash", ScaleCache(tmp_path, worth=0.0))
    with pytest.raises(RuntimeError, match="must conform"):
        calls["verdict"]()


def test_ratios_are_of_turns_and_held_to_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    took = {"verdict": [3.0, 9.0], "golden": [1.0, 1.0], "streamed": [0.5, 0.5], "cached": [1, 1]}
    monkeypatch.setattr(judge_speed, "contenders", lambda *_: dict.fromkeys(took, lambda: None))
    monkeypatch.setattr(judge_speed, "take_turns", lambda *_, **__: took)
    monkeypatch.setattr(judge_speed, "_peak", lambda _: 2.0)
    found = judge_speed.verdict("judge/x", parse(SMALL), "flash", 2)
    assert found[0].name == "judge/x/over-golden"
    assert (found[0].samples, found[0].target, found[0].met) == ((3.0, 9.0), 4.0, False)
    assert "| x | 1.00 | 6.00 | 12.00 | 1.00 | 1.00 | ≤ 4, not met |" in judge_speed.page_table(
        found
    )


def test_peak_memory_is_that_of_arrays() -> None:
    assert 8.0 <= judge_speed._peak(lambda: np.zeros(1 << 20)) < 9.0
    assert judge_speed._peak(lambda: None) < 0.1


def test_command_writes_figures_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_speed, "verdict", lambda at, *_: [figure(f"{at}/x", [1.0], "ratio")])
    figures, page = tmp_path / "figures.json", tmp_path / "page.md"
    command = ["bench", "judge", "--quick", "--json", str(figures), "--page", str(page)]
    assert CliRunner().invoke(cli.main, command).exit_code == 0
    names = [item["name"] for item in json.loads(figures.read_text())["figures"]]
    assert "judge/eager/bf16/s64/window-d64/x" in names
    assert len(names) == len(judge_speed.LAYERS) * len(judge_speed.CLAIMS)
    assert "measured" in page.read_text()
