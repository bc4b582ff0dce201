"""Each planted bug turns exactly the right cells red, in the records and in the page."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import planted
import pytest
import torch
import variants
from click.testing import CliRunner

from conformance.case_ids import parse
from conformance.cases import DTYPES, Case
from conformance.cli import main
from conformance.matrix import feature_cases
from conformance.runner import judge_case
from conformance.subjects import Subject
from reports import matrix
from reports.html import render
from reports.records import CaseRecord, Results, read_results

ROWS = (
    "plain causal",
    "GQA",
    "MQA",
    "sliding window",
    "learned sinks",
    "sliding window + learned sinks",
    "QKV bias",
    "RoPE half",
    "RoPE interleaved",
    "QKV bias + RoPE half",
    "GQA + RoPE half",
)
"""Rows every bug is judged on: those that some bug concerns, so most are unrelated to each."""

PHASES = ("context encoding", "token generation")

RED_ROWS: dict[str, set[str]] = {
    "window W+1": {"sliding window", "sliding window + learned sinks"},
    "sink dropped": {"learned sinks", "sliding window + learned sinks"},
    "rope pairs interleaved": {"RoPE half", "QKV bias + RoPE half", "GQA + RoPE half"},
    "KV heads tiled": {"GQA", "GQA + RoPE half"},
    "K bias missing": {"QKV bias", "QKV bias + RoPE half"},
    "softmax scale off by 1 %": set(ROWS),
    "cache slot off by one": set(ROWS),
    "zeros": set(ROWS),
}

RED_PHASES = {"cache slot off by one": {"token generation"}}
"""Phases a bug shows in, where not in both."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@cache
def chosen_cases() -> tuple[Case, ...]:
    """The smoke tier's cases of these rows: one geometry each, windows that some row outgrows."""
    return tuple(
        case
        for case in feature_cases("smoke")
        if " + ".join(case.features) in ROWS
        and case.config.num_attention_heads != 14
        and case.config.sliding_window != 97
    )


def planted_subject(bug: str) -> Subject:
    function = planted.BUGS[bug].function
    return Subject(name=f"impl, {bug}", function=function, scope="layer", profile="native")


@cache
def records() -> dict[str, tuple[CaseRecord, ...]]:
    """Every bug's records of the chosen cases."""
    subjects = {bug: planted_subject(bug) for bug in planted.BUGS}
    found: dict[str, list[CaseRecord]] = {bug: [] for bug in subjects}
    with variants.shared_work():
        for case in chosen_cases():
            for bug, subject in subjects.items():
                found[bug].append(judge_case(case, subject))
    return {bug: tuple(made) for bug, made in found.items()}


def expected_cells(bug: str) -> dict[tuple[str, str, str], str]:
    """State of every cell (row, phase, dtype) that this bug must leave behind."""
    phases = RED_PHASES.get(bug, set(PHASES))
    return {
        (row, phase, dtype): "failed" if row in RED_ROWS[bug] and phase in phases else "passed"
        for row in ROWS
        for phase in PHASES
        for dtype in DTYPES
    }


def drawn_cells(page: str) -> dict[tuple[str, str, str], str]:
    """States as the page's feature matrix shows them: the class of each cell."""
    table = page.split('<table class="matrix">')[1].split("</table>")[0]
    spans = re.findall(r'<th colspan="(\d+)" scope="colgroup">([^<]*)</th>', table)
    phases = [phase for span, phase in spans for _ in range(int(span))]
    dtypes = re.findall(r'<th scope="col">([^<]*)</th>', table)
    found = {}
    for row in re.findall(r"<tr>(<th scope=\"row\">.*?)</tr>", table, re.DOTALL):
        label = re.search(r">([^<]*)</th>", row)
        states = re.findall(r'<td class="(\w+)">', row)[1:]  # the first counts all columns
        assert label is not None
        for phase, dtype, state in zip(phases, dtypes, states, strict=True):
            found[label[1], phase, dtype] = state
    return found


def test_every_bug_of_the_list_is_planted_and_every_row_has_cases() -> None:
    assert planted.BUGS.keys() == RED_ROWS.keys()
    assert {" + ".join(case.features) for case in chosen_cases()} == set(ROWS)


@pytest.mark.parametrize("bug", RED_ROWS)
def test_bug_fails_every_case_it_can_show_in_and_no_other(bug: str) -> None:
    shows = planted.BUGS[bug].shows
    wrong = [
        f"{record.verdict} {record.case_id}: {record.reason}"
        for case, record in zip(chosen_cases(), records()[bug], strict=True)
        if record.verdict != ("DEVIATES" if shows(case) else "CONFORMS")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("bug", RED_ROWS)
def test_bug_reddens_exactly_its_cells_of_the_matrix_and_of_the_page(bug: str) -> None:
    found = records()[bug]
    counted = matrix.feature_matrix(found)
    cells = {
        (label, phase, dtype): cell.state
        for label, row in counted.rows[1:]
        for (phase, dtype), cell in zip(counted.columns, row[1:], strict=True)
    }
    assert cells == expected_cells(bug)
    page = render(Results(environment={"subject": bug}, cases=found))
    assert drawn_cells(page) == expected_cells(bug)
    assert "Does not conform" in page


def failing_outputs(record: CaseRecord) -> set[str]:
    return {statistic.output for statistic in record.statistics if statistic.ratio > 1}


def test_k_bias_reaches_the_output_only_where_rope_turns_it() -> None:
    # Without RoPE a prompt's scores all gain q_i . b, which softmax cancels: only the cache tells.
    outputs = {
        row: [
            failing_outputs(record)
            for case, record in zip(chosen_cases(), records()["K bias missing"], strict=True)
            if " + ".join(case.features) == row and case.workload.phase == "cte"
        ]
        for row in ("QKV bias", "QKV bias + RoPE half")
    }
    assert outputs["QKV bias"]
    assert all(found == {"k_cache"} for found in outputs["QKV bias"])
    assert all(found == {"k_cache", "output"} for found in outputs["QKV bias + RoPE half"])


def test_window_that_no_row_outgrows_hides_an_off_by_one() -> None:
    case = parse("h256-hq8-hkv8-d32-window97/cte-bf16-b2-q97-gaussian-seed0")
    assert judge_case(case, planted_subject("window W+1")).verdict == "CONFORMS"


def test_cache_bug_is_told_as_touched_slots() -> None:
    for case, record in zip(chosen_cases(), records()["cache slot off by one"], strict=True):
        if case.workload.phase == "tkg":
            touched = [s for s in record.statistics if s.name == "slots left alone"]
            assert any(statistic.value > 0 for statistic in touched), record.case_id
            # a query that sees its own key alone does not read the cache
            assert ("output" in failing_outputs(record)) == (case.config.sliding_window != 1)


def test_command_exits_with_1_and_its_page_shows_the_red_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ids = [
        "h256-hq8-hkv8-d32-window16/cte-bf16-b2-q97-gaussian-seed0",
        "h256-hq8-hkv8-d32-sinks/cte-bf16-b2-q97-gaussian-seed0",
    ]
    options = [word for case_id in ids for word in ("--case", case_id)]
    result = CliRunner().invoke(
        main, ["run", "--subject", "planted:window_one_more", "-j", "1", *options]
    )
    assert result.exit_code == 1, result.output
    verdicts = {case.case_id: case.verdict for case in read_results(Path("results.jsonl")).cases}
    assert verdicts == dict(zip(ids, ("DEVIATES", "CONFORMS"), strict=True))
    column = ("context encoding", "bfloat16")
    assert drawn_cells(Path("report.html").read_text(encoding="utf-8")) == {
        ("sliding window", *column): "failed",
        ("learned sinks", *column): "passed",
    }
