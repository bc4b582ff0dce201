"""The command line: lists, verdicts as exit codes, one sentence for every misuse."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from conformance.cli import main
from conformance.matrix import cases_for
from conformance.presets import PRESETS
from conformance.subjects import LayerCall, LayerOutput, subject
from conformance.subjects.impl import attention_layer
from conformance.tiers import TIERS
from golden import AttentionConfig, ConfigError
from reports.records import read_results

GOOD = "h64-hq4-hkv2-d16/cte-bf16-b1-q9-gaussian-seed0"
CORE = "core-h64-hq4-hkv2-d16/cte-bf16-b1-q9-gaussian-seed0"


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    # what `run` leaves in the environment goes again with the test
    monkeypatch.setattr(os, "environ", dict(os.environ))


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def refused(*arguments: str) -> str:
    """Invoke with arguments that are bad use; return the one sentence on standard error."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0].removeprefix("Error: ")


@pytest.mark.parametrize("command", [(), ("run",), ("list",), ("report",)])
def test_every_command_explains_itself(command: tuple[str, ...]) -> None:
    for flag in ("--help", "-h"):
        result = invoke(*command, flag)
        assert result.exit_code == 0
        assert "Usage:" in result.output


@pytest.mark.parametrize("tier", TIERS)
def test_list_cases_prints_the_ids_of_a_tier_and_nothing_else(tier: str) -> None:
    result = invoke("list", "cases", "--tier", tier)
    suites = ("features", "serving", "gradients", "presets")
    expected = [
        case.id for suite in suites for case in cases_for(tier, suite) if case.scope == "layer"
    ]
    assert result.exit_code == 0
    assert result.output.splitlines() == expected


def test_list_cases_narrows_by_suite_subject_and_preset() -> None:
    core = [case.id for case in cases_for("smoke", "core")]
    assert invoke("list", "cases", "--suite", "core").output.splitlines() == core
    found = invoke("list", "cases", "--subject", "torch-sdpa").output.splitlines()
    assert [text for text in found if "backward" not in text] == core
    found = invoke("list", "cases", "--preset", "gpt-oss-20b").output.splitlines()
    assert found
    assert all(line.startswith("gpt-oss-20b.") for line in found)


def test_list_presets_subjects_and_profiles_name_each_of_them() -> None:
    presets = invoke("list", "presets").output
    assert all(name in presets for name in PRESETS)
    subjects = invoke("list", "subjects").output
    assert "torch-sdpa" in subjects
    profiles = invoke("list", "profiles").output
    assert all(name in profiles for name in ("eager", "native", "flash", "sdpa"))


BAD_USE: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown preset": (("run", "--preset", "gpt-oss-21b"), "did you mean 'gpt-oss-20b'"),
    "unknown model": (("run", "--model", "smollm3"), "model must be one of smollm2, got 'smollm3'"),
    "unknown subject": (("run", "--subject", "mine"), "subject must be one of impl, impl-compiled"),
    "subject that does not import": (
        ("run", "--subject", "no_such_module:kernel"),
        "subject 'no_such_module:kernel' does not import: ModuleNotFoundError",
    ),
    "subject that is not there": (
        ("run", "--subject", "planted:nothing"),
        "planted has no callable 'nothing'",
    ),
    "subject that is no callable": (
        ("run", "--subject", "planted:BUGS"),
        "planted has no callable 'BUGS'",
    ),
    "kv heads that do not divide": (
        ("run", "--case", GOOD.replace("hkv2", "hkv3")),
        "num_attention_heads must be a multiple of num_key_value_heads, got 4 and 3",
    ),
    "malformed case": (("run", "--case", "gpt-oss"), "case must be '<layer>/<workload>'"),
    "case and preset": (
        ("run", "--case", GOOD, "--preset", "gpt-oss-20b"),
        "case, model and preset exclude each other",
    ),
    "suite and case": (
        ("run", "--case", GOOD, "--suite", "core"),
        "suite cannot be combined with case, model or preset",
    ),
    "unknown tier": (("run", "--tier", "huge"), "'huge' is not one of"),
    "unknown profile": (("run", "--profile", "exact"), "'exact' is not one of"),
    "unknown suite": (("run", "--suite", "speed"), "'speed' is not one of"),
    "no jobs": (("run", "-j", "0"), "0 is not in the range"),
    "unknown option": (("run", "--fast"), "No such option"),
    "results in no directory": (
        ("run", "--case", GOOD, "--results", "nowhere/results.jsonl"),
        "nowhere/results.jsonl cannot be written",
    ),
    "results in a directory's place": (
        ("run", "--case", GOOD, "--results", "."),
        "File '.' is a directory",
    ),
    "report in no directory": (
        ("run", "--case", GOOD, "--report", "nowhere/report.html"),
        "nowhere/report.html cannot be written",
    ),
    "list of an unknown preset": (("list", "cases", "--preset", "x"), "name must be that of a"),
    "list of an unknown subject": (("list", "cases", "--subject", "x"), "subject must be one of"),
    "list of nothing known": (("list", "colours"), "'colours' is not one of"),
    "report of no file": (("report", "none.jsonl"), "File 'none.jsonl' does not exist"),
}


@pytest.mark.parametrize(("arguments", "says"), BAD_USE.values(), ids=BAD_USE)
def test_bad_use_is_told_in_one_sentence_and_exits_with_2(
    arguments: tuple[str, ...], says: str
) -> None:
    assert says in refused(*arguments)
    assert not Path("results.jsonl").exists()


def test_two_learned_sinks_are_refused_where_the_layer_is_configured() -> None:
    with pytest.raises(ConfigError, match=r"learned_sinks_size must be 1 .* or None, got 2"):
        AttentionConfig(
            hidden_size=64, num_attention_heads=4, num_key_value_heads=2, learned_sinks_size=2
        )
    # in an id they are `sinks`, without a number
    assert "sinks2" in refused("run", "--case", GOOD.replace("d16", "d16-sinks2"))


def run_case(name: str, *case_ids: str, jobs: int = 1) -> Result:
    options = [word for case_id in case_ids for word in ("--case", case_id)]
    return invoke("run", "--subject", name, "-j", str(jobs), *options)


def test_conforming_subject_exits_with_0_and_leaves_results_and_report() -> None:
    result = run_case("impl", GOOD)
    assert result.exit_code == 0, result.output
    results = read_results(Path("results.jsonl"))
    (case,) = results.cases
    assert (case.case_id, case.verdict, case.subject) == (GOOD, "CONFORMS", "impl")
    page = Path("report.html").read_text(encoding="utf-8")
    assert "Conforms: the one case passes." in page
    assert GOOD in page
    assert results.environment["subject"] == "impl"


@subject(scope="layer", profile="native")
def wrong_shape(call: LayerCall) -> LayerOutput:
    result = attention_layer(call)
    return replace(result, output=result.output[:, :-1])


@subject(scope="layer", profile="native")
def wrong_dtype(call: LayerCall) -> LayerOutput:
    result = attention_layer(call)
    return replace(result, output=result.output.float())


@subject(scope="layer", profile="native")
def not_a_number(call: LayerCall) -> LayerOutput:
    result = attention_layer(call)
    return replace(result, output=result.output * float("nan"))


@subject(scope="layer", profile="native")
def crashing(call: LayerCall) -> LayerOutput:
    raise RuntimeError("[bold]no[/] kernel <script>alert(1)</script>")


FAILING: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "wrong_shape": (wrong_shape, "MALFORMED", "output must have shape (1, 9, 64), got (1, 8, 64)"),
    "wrong_dtype": (wrong_dtype, "MALFORMED", "output must have dtype bfloat16, got float32"),
    "not_a_number": (not_a_number, "MALFORMED", "output[0, 0, 0] is nan"),
    "crashing": (crashing, "CRASHED", "RuntimeError: [bold]no[/] kernel <script>"),
}


@pytest.mark.parametrize(("name", "verdict", "says"), [(n, *f[1:]) for n, f in FAILING.items()])
def test_failing_subject_exits_with_1_and_says_why(name: str, verdict: str, says: str) -> None:
    result = run_case(f"test_cli:{name}", GOOD)
    assert result.exit_code == 1, result.output
    assert verdict in result.output
    assert says in result.output
    (case,) = read_results(Path("results.jsonl")).cases
    assert case.verdict == verdict
    page = Path("report.html").read_text(encoding="utf-8")
    assert "Does not conform: 1 of 1 case fails." in page
    assert "<script>alert" not in page


def test_reproducing_command_is_printed_in_one_line() -> None:
    case_id = "h256-hq8-hkv8-d32-rope500000-llama3_8_1_4_8192/tkg-bf16-b1-kv9-gaussian-seed0"
    result = run_case("planted:zeros", case_id)
    command = f"attn-conformance run --subject planted:zeros --case {case_id} --profile native"
    command += " --cases-in-run 1"
    assert command in result.output.splitlines()


def test_subject_that_claims_none_of_the_cases_is_told_so() -> None:
    assert "impl claims none of these cases, so nothing was judged" in refused(
        "run", "--case", CORE, "-j", "1"
    )


def test_profile_of_the_subject_can_be_replaced() -> None:
    result = invoke("run", "--case", GOOD, "--profile", "eager", "-j", "1")
    assert result.exit_code == 0
    (case,) = read_results(Path("results.jsonl")).cases
    assert case.profile == "eager-bfloat16"


def test_report_is_made_again_from_results() -> None:
    run_case("impl", GOOD)
    first = Path("report.html").read_text(encoding="utf-8")
    result = invoke("report", "results.jsonl", "-o", "again.html")
    assert (result.exit_code, result.output) == (0, "report: again.html\n")
    assert Path("again.html").read_text(encoding="utf-8") == first


def record_lines() -> list[str]:
    run_case("impl", GOOD)
    return Path("results.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)


def test_report_of_a_damaged_file_says_what_is_wrong_with_it() -> None:
    lines = record_lines()
    damaged = {
        "".join(lines)[:-40]: "line 2 is not JSON",
        "": "is empty",
        "".join(lines[1:]): "line 1 comes before the environment line",
        '{"kind": "environment", "schema": 999}\n': "follows schema 999",
        "id,verdict\n1,ok\n": "line 1 is not JSON",
        '["a", "list"]\n': "must be an object of kind",
        lines[0] + json.dumps({**json.loads(lines[1]), "verdict": "FINE"}): "verdict must be one",
    }
    for text, says in damaged.items():
        Path("damaged.jsonl").write_text(text, encoding="utf-8")
        assert says in refused("report", "damaged.jsonl", "-o", "page.html")
        assert not Path("page.html").exists()
    Path("damaged.jsonl").write_bytes(bytes(range(256)))
    assert "line 1 is not JSON" in refused("report", "damaged.jsonl")


def test_report_into_no_directory_is_refused() -> None:
    record_lines()
    assert "nowhere" in refused("report", "results.jsonl", "-o", "nowhere/page.html")


def test_two_processes_give_the_records_that_one_gives() -> None:
    ids = [GOOD, GOOD.replace("bf16", "fp32"), GOOD.replace("seed0", "seed1"), CORE]

    def records() -> list[Any]:
        return [replace(case, seconds={}) for case in read_results(Path("results.jsonl")).cases]

    assert run_case("impl", *ids).exit_code == 0
    alone = records()
    Path("results.jsonl").unlink()
    assert run_case("impl", *ids, jobs=2).exit_code == 0
    assert records() == alone
    assert {case.case_id for case in alone} == set(ids)


def test_ranks_are_judged_by_one_profile() -> None:
    sentence = refused("run", "--suite", "parallel", "--profile", "eager")
    assert sentence == "profile must be native for suite parallel, got eager"


def test_core_kernels_run_by_their_module_and_name() -> None:
    result = run_case("variants:native_kernel", CORE)
    assert result.exit_code == 0, result.output
    (case,) = read_results(Path("results.jsonl")).cases
    assert (case.subject, case.profile) == ("variants:native_kernel", "native-bfloat16")


def test_environment_says_what_runs_here_and_what_is_missing() -> None:
    said = invoke("environment").output
    assert f"torch: {torch.__version__}" in said
    assert "cpu by inductor" in said
    assert "stablehlo: " in said
