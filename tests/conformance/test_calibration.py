"""The calibration covers what it says, goes on where it stopped, and reports what it found."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from conformance import calibration
from conformance.calibration_cases import calibration_case
from conformance.calibration_runs import Run, append_runs, read_runs, runs_of
from conformance.calibration_table import markdown, spread
from conformance.case_ids import parse
from conformance.cases import DTYPES, REGIMES
from conformance.processes import in_processes

INDICES = range(300)


def test_cases_rebuild_from_their_ids() -> None:
    for index in INDICES:
        case = calibration_case(index)
        assert case == calibration_case(index)
        assert parse(case.id) == case


def test_cases_cover_every_dtype_with_every_regime_phase_and_feature() -> None:
    cases = [calibration_case(index) for index in INDICES]
    phases = {
        (case.dtype, case.workload.phase, case.workload.prior > 0, case.workload.steps > 1)
        for case in cases
    }
    assert {(c.dtype, c.regime) for c in cases} == {(d, r) for d in DTYPES for r in REGIMES}
    for dtype in DTYPES:
        assert (dtype, "cte", False, False) in phases
        assert (dtype, "cte", True, False) in phases
        assert (dtype, "tkg", False, False) in phases
        assert (dtype, "tkg", False, True) in phases
    seen = {feature for case in cases for feature in case.features}
    assert {"sliding window", "chunked", "learned sinks", "softcap", "GQA", "MQA"} <= seen
    assert any(case.config.sliding_window == 1 for case in cases)
    assert min(max(case.workload.lengths) + case.workload.prior for case in cases) < 24
    assert max(max(case.workload.lengths) + case.workload.prior for case in cases) > 3500


@pytest.mark.parametrize(
    "index",
    [
        pytest.param(221, id="output-below-the-smallest-normal-number"),
        pytest.param(2, id="window-of-one-is-exact"),
    ],
)
def test_no_correct_kernel_is_rejected_on_a_corner(index: int) -> None:
    assert {run.kernel: run.reason for run in runs_of(index) if not run.conforms} == {}


def made_up(kernel: str, value: float, *, conforms: bool = True) -> Run:
    return Run(
        index=0,
        case_id="case",
        dtype="bfloat16",
        regime="gaussian",
        phase="cte",
        kernel=kernel,
        profile="eager",
        matches=True,
        conforms=conforms,
        reason="" if conforms else "output: spread 2 exceeds its limit 1.2",
        statistics=(("spread", value, 1.2),),
    )


def test_a_page_shows_spread_and_false_alarms() -> None:
    text = markdown([made_up("eager", 1.0), made_up("flash", 2.0, conforms=False)])
    assert "2 runs on 1 cases, 1 false alarms" in text
    assert "| bfloat16 | 2 | 1.05 | 1.50 | 1.95 | 50.0% | 1 |" in text
    assert "* flash, `case`: output: spread 2 exceeds its limit 1.2" in text


def test_an_output_without_any_error_has_no_spread() -> None:
    assert spread(made_up("eager", 0.0)) is None


def test_records_survive_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    assert read_runs(path) == []
    append_runs(path, [made_up("eager", 1.0)])
    whole = path.read_text()
    path.write_text(whole + whole[:40])
    assert read_runs(path) == [made_up("eager", 1.0)]


def test_a_calibration_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def noted(index: int) -> list[Run]:
        asked.append(index)
        return [replace(made_up("eager", 1.0), index=index)]

    monkeypatch.setattr(calibration, "runs_of", noted)
    records, page = tmp_path / "runs.jsonl", tmp_path / "page.md"
    first = calibration.run(None, 12, records=records, jobs=1)
    assert asked == [0]
    both = calibration.run(page, 24, records=records, jobs=1)
    assert asked == [0, 1]
    assert set(first.runs) < set(both.runs)
    assert both.false_alarms == ()
    assert "0 false alarms" in page.read_text()


@pytest.mark.parametrize("jobs", [1, 2])
def test_work_done_in_processes_comes_back_whole(jobs: int) -> None:
    found = in_processes(math.sqrt, [1.0, 4.0, 9.0], jobs=jobs, title="roots", console=Console())
    assert sorted(found) == [1.0, 2.0, 3.0]
