"""The suites under plain pytest: options, exit codes, and files written by the one main process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conformance.false_alarms import STANDARD
from conformance.lost_cases import DIED, lost_record
from conformance.parallel.cases import parallel_cases
from conformance.subjects import load_subject
from reports.records import case_from_dict, case_to_dict, read_results

HERE = Path(__file__).parent
WINDOW = "h256-hq8-hkv8-d32-window16/cte-bf16-b1-q40-gaussian-seed0"
SINKS = "h256-hq8-hkv8-d32-sinks/cte-bf16-b1-q40-gaussian-seed0"
UNCLAIMED = "h256-hq8-hkv8-d32-sinks-chunk32/cte-bf16-b1-q40-gaussian-seed0"


def run_pytest(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", "pytest", "--pyargs", "conformance.suites"]
    return run_python(directory, *command, "-p", "no:cacheprovider", *options)


def run_python(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST_", "ATTN_CONFORMANCE_"))
    }
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_planted_bug_fails_its_case_in_two_processes_and_one_writes_the_files(
    tmp_path: Path,
) -> None:
    done = run_pytest(
        tmp_path,
        *("--subject", "planted:window_one_more", "-n", "2"),
        *("--case", WINDOW, "--case", SINKS),
        *("--results", "results.jsonl", "--report", "report.html"),
    )
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout
    assert "DEVIATES: output: " in done.stdout
    assert f"reproduce: attn-conformance run --subject planted:window_one_more --case {WINDOW}" in (
        done.stdout
    )
    results = read_results(tmp_path / "results.jsonl")
    verdicts = {case.case_id: case.verdict for case in results.cases}
    assert verdicts == {WINDOW: "DEVIATES", SINKS: "CONFORMS"}
    assert results.environment["subject"] == "planted:window_one_more"
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Does not conform: 1 of 2 cases fails." in page
    assert WINDOW in page


def test_case_that_is_not_claimed_is_skipped_and_recorded(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "--case", UNCLAIMED, "--results", "results.jsonl", "-rs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "UNSUPPORTED: the module refuses learned sinks with chunked attention" in done.stdout
    (case,) = read_results(tmp_path / "results.jsonl").cases
    assert case.verdict == "UNSUPPORTED"
    assert not (tmp_path / "report.html").exists()


def test_bad_options_end_the_run_before_any_case_and_name_the_reason(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "--subject", "no_such_module:kernel")
    assert done.returncode in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.USAGE_ERROR)
    assert "subject 'no_such_module:kernel' does not import" in done.stdout + done.stderr
    assert "passed" not in done.stdout


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--cache-mb", "0", "-n", "2"), "megabytes must be positive, got 0"),
        (("--cache-dir", "file"), "the cache's folder must be a directory, got file"),
    ],
)
def test_a_cache_that_cannot_be_is_refused_in_one_sentence(
    options: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    done = run_pytest(tmp_path, *options, "--case", WINDOW)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    assert (done.stdout, done.stderr.strip()) == ("", f"ERROR: {says}")


DIES = [f"core-h64-hq4-hkv2-d16/cte-{dtype}-b1-q9-gaussian-seed0" for dtype in ("bf16", "fp16")]


def test_a_case_that_ends_its_process_is_recorded_and_no_verdict_on_the_subject(
    tmp_path: Path,
) -> None:
    done = run_python(
        tmp_path,
        *("-m", "conformance.cli", "run", "-j", "2", "--subject", "planted:dies_in_half"),
        *(word for case in DIES for word in ("--case", case)),
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr == "Error: 1 of 2 cases ended the process that judged them\n"
    assert f"CRASHED {DIES[1]}\n{DIED}\n" in done.stdout
    other, lost = read_results(tmp_path / "results.jsonl").cases
    assert (other.case_id, other.verdict) == (DIES[0], "DEVIATES")
    assert (lost.case_id, lost.verdict, lost.reason) == (DIES[1], "CRASHED", DIED)
    assert f"--case {DIES[1]} --profile flash --cases-in-run 2" in lost.reproduce
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Does not conform: 2 of 2 cases fail." in page
    assert DIED in page


def test_so_it_is_under_plain_pytest_with_several_subjects(tmp_path: Path) -> None:
    done = run_pytest(
        tmp_path,
        *("--subject", "planted:dies_in_half", "--subject", "torch-sdpa", "-n", "2"),
        *("--exact-rules", "on", "--case", DIES[1], "--results", "results.jsonl"),
    )
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    lost, judged = read_results(tmp_path / "results.jsonl").cases
    assert (lost.subject, lost.verdict, lost.reason) == ("planted:dies_in_half", "CRASHED", DIED)
    assert lost.reproduce.endswith("--exact-rules on")
    assert (judged.subject, judged.verdict) == ("torch-sdpa", "CONFORMS")


def test_a_parallel_case_that_ends_its_process_is_recorded_too() -> None:
    workload = parallel_cases()[0]
    lost = lost_record(workload, load_subject("impl"), STANDARD, exact_rules=False)
    assert (lost.case_id, lost.suite, lost.verdict) == (workload.id, "parallel", "CRASHED")
    assert lost.reason == DIED
    written = case_to_dict(lost)
    assert case_to_dict(case_from_dict(json.loads(json.dumps(written)))) == written


@pytest.mark.parametrize("processes", ["0", "2"])
def test_cases_that_are_left_out_on_purpose_are_not_missed(tmp_path: Path, processes: str) -> None:
    done = run_pytest(
        tmp_path,
        *("--case", WINDOW, "--case", SINKS, "-k", "window16", "-n", processes),
        *("--results", "results.jsonl", "--report", "report.html"),
    )
    assert done.returncode == pytest.ExitCode.OK, done.stdout + done.stderr
    found = read_results(tmp_path / "results.jsonl")
    assert [case.case_id for case in found.cases] == [WINDOW]
    assert found.missing == 0
    assert "Conforms: the one case passes." in (tmp_path / "report.html").read_text()
