from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conformance.benchmarks import golden_speed, peak_memory
from conformance.benchmarks.figures import Figure, figure, ratios, take_turns, write_json
from golden import Causal, attend

TICK: Callable[[int], Callable[[], None]] = lambda total: lambda: None  # noqa: E731 # a constant


def test_contenders_take_turns() -> None:
    order: list[str] = []
    took = take_turns(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        rounds=2,
        settle=0.0,
        least=0.0,
    )
    assert order == ["a", "a", "b", "b"] * 2  # one call that is not counted, one that is
    assert {name: len(samples) for name, samples in took.items()} == {"a": 2, "b": 2}


def test_a_sample_is_the_time_of_one_call() -> None:
    took = take_turns({"nap": lambda: time.sleep(0.01)}, rounds=1, settle=0.0, least=0.1)
    assert 0.01 <= took["nap"][0] < 0.1


def test_a_figure_is_the_median_of_the_ratios_of_each_turn() -> None:
    got = figure("x", ratios([1.0, 10.0, 3.0], [1.0, 2.0, 1.0]), "ratio", "lower", target=3.5)
    assert got == Figure(
        name="x", value=3.0, unit="ratio", better="lower", samples=(1.0, 5.0, 3.0), target=3.5
    )


@pytest.mark.parametrize(
    ("better", "target", "met"),
    [("lower", 2.0, True), ("lower", 0.5, False), ("higher", 2.0, False), ("higher", 0.5, True)],
)
def test_a_target_is_met_on_its_better_side(better: str, target: float, met: bool) -> None:
    assert figure("x", [1.0], "ratio", better, target).met is met  # type: ignore[arg-type]


def test_a_figure_without_target_is_neither_met_nor_missed() -> None:
    assert figure("x", [1.0], "seconds").met is None


def test_json_names_the_machine_and_every_figure(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    write_json(path, [figure("a/b", [1.0, 2.0, 4.0], "ratio", "lower", 3.0)])
    read = json.loads(path.read_text())
    assert read["figures"] == [
        {
            "name": "a/b",
            "value": 2.0,
            "unit": "ratio",
            "better": "lower",
            "samples": [1.0, 2.0, 4.0],
            "target": 3.0,
        }
    ]
    assert {"platform", "processor", "processors", "python", "packages"} <= read["machine"].keys()


def test_causal_figures_compare_with_every_peer_at_hand() -> None:
    figures = {item.name: item for item in golden_speed.causal(64, 1, TICK)}
    assert {
        "golden/causal/s64/seconds",
        "golden/causal/s64/torch-float64",
        "golden/causal/s64/dgemm-share",
        "golden/causal/s64/faster-than-definition",
    } <= figures.keys()
    assert all(item.value > 0 for item in figures.values())


def test_onnx_reference_computes_the_same_attention() -> None:
    pytest.importorskip("onnx")
    q, k, v = (np.random.default_rng(seed).standard_normal((1, 2, 9, 4)) for seed in range(3))
    want = attend(q, k, v, q_positions=np.arange(9), kv_positions=np.arange(9), mask=Causal())
    got = golden_speed.onnx_reference(q, k, v)()
    assert isinstance(got, list)
    # two computations; a weight errs by at most twice its score's head_dim + 3 roundings and by
    # those of exp, of sums over 9 keys and of a division; |score| <= |q| |k| / sqrt(head_dim)
    score = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max() / 2
    bound = 2 * (2 * (4 + 3) * score + 2 * 9 + 8) * 2.0**-53 * np.abs(v).max()
    assert np.abs(got[0] - want.output).max() <= bound


def test_windows_are_compared_at_two_lengths() -> None:
    names = [item.name for item in golden_speed.windowed((256, 512), 1, TICK)]
    assert names == ["golden/window1024/s512/over-s256", "golden/window1024/s512/seconds"]


def test_memory_is_that_of_a_process_of_its_own() -> None:
    taken = peak_memory.measure("rows256-s65536")
    assert taken.seconds > 0
    assert 0 < taken.megabytes < 200


def test_a_case_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="KeyError"):
        peak_memory.measure("no-such-case")
