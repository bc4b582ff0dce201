"""One false-alarm rate per run, shared by its cases, and the same limits for one case alone."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from conformance.case_ids import parse
from conformance.cli import main
from conformance.errors import UsageError
from conformance.false_alarms import FalseAlarms
from conformance.runner import judge_case
from conformance.subjects import load_subject
from reports.records import read_results

CASES = [
    "core-h64-hq4-hkv2-d16/cte-bf16-b2-q9_5-gaussian-seed0",
    "core-h64-hq4-hkv2-d16/tkg-bf16-b2-kv7_3-gaussian-seed0",
]


def test_rate_is_shared_equally_by_the_cases() -> None:
    assert FalseAlarms(rate=1e-3, cases=500).per_case == 1e-3 / 500
    assert FalseAlarms(cases=7).options() == ("--cases-in-run", "7")
    assert FalseAlarms(rate=0.01, cases=7).options()[2:] == ("--false-alarm-rate", "0.01")
    for wrong in ({"rate": 0.0}, {"rate": 1.0}, {"cases": 0}):
        with pytest.raises(UsageError, match="must lie between 0 and 1"):
            FalseAlarms(**wrong)  # type: ignore[arg-type]


def test_more_cases_mean_wider_limits() -> None:
    case, subject = parse(CASES[0]), load_subject("torch-sdpa")
    few, many = (judge_case(case, subject, alarms=FalseAlarms(cases=n)) for n in (1, 10_000))
    for narrow, wide in zip(few.statistics, many.statistics, strict=True):
        assert narrow.limit < wide.limit or narrow.limit == wide.limit == 0
        assert narrow.value == wide.value


def test_reproducing_a_case_keeps_its_limits_and_the_environment_states_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["-j", "1", "--false-alarm-rate", "0.01"]
    chosen = [word for case in CASES for word in ("--case", case)]
    run = CliRunner().invoke(main, ["run", "--subject", "torch-sdpa", *options, *chosen])
    assert run.exit_code == 0, run.output
    first = read_results(Path("results.jsonl"))
    assert first.environment["false_alarm_rate"] == "0.01 per run, 5.0e-03 for each of 2 cases"
    command = shlex.split(first.cases[0].reproduce)
    assert command[:2] == ["attn-conformance", "run"]
    again = CliRunner().invoke(main, [*command[1:], "-j", "1"])
    assert again.exit_code == 0, again.output
    second = read_results(Path("results.jsonl"))
    assert second.environment["false_alarm_rate"] == first.environment["false_alarm_rate"]
    (record,) = second.cases
    assert record.statistics == first.cases[0].statistics
    assert record.power == first.cases[0].power
