"""Each bug planted in serving turns its own cells red and no other."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import variants
from golden_server import GoldenServer
from planted_serving import BUGS, CASES, serving

from conformance.case_ids import parse
from conformance.cases import Case
from conformance.runner import judge_case
from conformance.subjects import Subject
from reports.matrix import feature_matrix
from reports.records import CaseRecord

OWN_ROW = {
    "ring": "rolling cache",
    "prefix": "prefix prefill",
    "sequence ids": "continuous batching",
    "row taken over": "continuous batching",
    "drafts": "speculation",
    "sinks": "learned sinks",
    "adapters": "LoRA",
    "axes": "M-RoPE",
}
"""The row of the report that says what each schedule shows."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def case_of(name: str) -> Case:
    return parse(f"{CASES[name]}-gaussian-seed0")


def subject_of(server: type[GoldenServer]) -> Subject:
    function = serving(server)
    return Subject(
        name=server.__name__, function=function, scope="layer", profile="native", serves=True
    )


@cache
def records() -> dict[str, dict[str, CaseRecord]]:
    """Every bug's records, by the case's name; the correct server's under an empty name."""
    subjects = {"": subject_of(GoldenServer)}
    subjects |= {bug: subject_of(server) for bug, (server, _) in BUGS.items()}
    found: dict[str, dict[str, CaseRecord]] = {bug: {} for bug in subjects}
    with variants.shared_work():
        for name in CASES:
            for bug, subject in subjects.items():
                found[bug][name] = judge_case(case_of(name), subject)
    return found


def test_correct_server_conforms_everywhere() -> None:
    assert {record.verdict for record in records()[""].values()} == {"CONFORMS"}


@pytest.mark.parametrize("bug", BUGS)
def test_bug_fails_the_schedule_that_shows_it_and_no_other(bug: str) -> None:
    wrong = {name for name, record in records()[bug].items() if record.verdict != "CONFORMS"}
    assert wrong == {BUGS[bug][1]}
    assert records()[bug][BUGS[bug][1]].verdict == "DEVIATES"


@pytest.mark.parametrize("bug", BUGS)
def test_bug_reddens_the_rows_of_its_schedule_in_the_report(bug: str) -> None:
    name = BUGS[bug][1]
    matrix = feature_matrix(tuple(records()[bug].values()))
    red = {label for label, row in matrix.rows[1:] if row[1].state == "failed"}
    assert red == set(records()[bug][name].features)
    assert OWN_ROW[name] in red


def test_bug_of_decode_is_told_at_the_part_that_decodes() -> None:
    record = records()["sink counted per part"]["sinks"]
    failing = {s.output for s in record.statistics if s.ratio > 1}
    assert failing == {"2.decode"}
