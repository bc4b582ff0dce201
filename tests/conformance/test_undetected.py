"""A case says which known defects it would not reject, and that it rejects those it shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from conformance.case_ids import parse
from conformance.cli import main
from conformance.defects import DEFECTS
from conformance.errors import UsageError
from conformance.undetected import SAME, judged_defects, undetected
from reports.html import render
from reports.records import Results, read_results

WIDE = "core-h64-hq4-hkv2-d16-window64/cte-bf16-b1-q33-gaussian-seed0"
NARROW = "core-h64-hq4-hkv2-d16-window8/cte-bf16-b1-q33-gaussian-seed0"
LAYER = "h64-hq4-hkv2-d16/cte-bf16-b1-q9-gaussian-seed0"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_a_window_that_no_row_outgrows_is_vacuous_for_one_more_and_one_less() -> None:
    found = undetected(parse(WIDE))
    assert found["window-plus-1"] == found["window-minus-1"] == SAME
    assert "window-plus-1" not in undetected(parse(NARROW))
    assert "window-minus-1" not in undetected(parse(NARROW))


def test_limits_wide_enough_admit_defects_that_compute_something_else() -> None:
    found = undetected(parse(NARROW), alpha=1e-300)
    admitted = {name for name, why in found.items() if why != SAME}
    assert "scale-0.03-percent" in admitted
    assert undetected(parse(NARROW)).keys() < found.keys()


def test_every_defect_that_applies_is_run_and_no_other() -> None:
    case = parse(NARROW)
    ran = [defect.id for defect, _ in judged_defects(case)]
    assert ran == [defect.id for defect in DEFECTS if defect.applies(case)]


def test_the_catalogue_is_of_kernels_and_says_so_of_a_layer() -> None:
    assert undetected(parse(LAYER)) == {}
    with pytest.raises(UsageError, match=r"case must be of scope 'core' .*, got h64-"):
        next(judged_defects(parse(LAYER)))


def test_list_defects_names_the_catalogue_or_what_a_case_makes_of_it() -> None:
    def listed(*words: str) -> list[str]:
        result = CliRunner(env={"COLUMNS": "200"}).invoke(main, ["list", "defects", *words])
        assert result.exit_code == 0, result.output
        return [line.strip() for line in result.output.splitlines()]

    names = {line.split()[0] for line in listed() if line}
    assert {defect.id for defect in DEFECTS} <= names
    lines = listed("--case", WIDE)
    assert any(line.startswith("window-plus-1 ") and "vacuous" in line for line in lines)
    refused = CliRunner().invoke(main, ["list", "defects", "--case", LAYER])
    assert refused.exit_code == 2


def test_run_records_them_when_asked_and_the_page_shows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["run", "--subject", "torch-sdpa", "--case", WIDE, "-j", "1"]
    assert CliRunner().invoke(main, words).exit_code == 0
    (plain,) = read_results(Path("results.jsonl")).cases
    assert plain.undetected == {}
    assert CliRunner().invoke(main, [*words, "--defects"]).exit_code == 0
    (record,) = read_results(Path("results.jsonl")).cases
    assert record.undetected["window-plus-1"] == SAME
    title = "Known defects not rejected here"
    assert title in Path("report.html").read_text(encoding="utf-8")
    assert title not in render(Results(environment={}, cases=(replace(record, undetected={}),)))
