"""From a judged case to a line of the results file, back, and into the page."""

from __future__ import annotations

import json
from pathlib import Path

import planted
import pytest
import torch

from conformance.case_ids import parse
from conformance.runner import judge_case
from conformance.subjects import Subject, load_subject
from reports.html import render
from reports.records import CaseRecord, Results, read_results, write_results

IDS = (
    "h64-hq4-hkv2-d16-sinks-window4/cte-fp16-b2-q9_5-gaussian-seed0",
    "h64-hq4-hkv2-d16-rope10000/tkg-fp32-b2-kv7_3-steps2-peaked-seed0",
    "gpt-oss-20b.sliding/tkg-bf16-h64-b1-kv130-gaussian-seed0",
)
ZEROS = Subject(name="zeros", function=planted.zeros, scope="layer", profile="native")


@pytest.fixture(scope="module")
def records() -> tuple[CaseRecord, ...]:
    torch.set_num_threads(1)
    subjects = (load_subject("impl"), ZEROS)
    return tuple(judge_case(parse(case_id), subject) for case_id in IDS for subject in subjects)


def test_records_survive_the_results_file(records: tuple[CaseRecord, ...], tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    write_results(path, {"subject": "two"}, records)
    found = read_results(path).cases
    for record, back in zip(records, found, strict=True):
        # nested configurations come back as the mappings they were written as, tuples as lists
        assert json.loads(json.dumps(record.config)) == back.config
        assert json.loads(json.dumps(record.workload)) == back.workload
        assert record.statistics == back.statistics
        assert record.worst == back.worst
        assert (record.verdict, record.reason) == (back.verdict, back.reason)
        assert record.features == back.features


def test_every_record_rebuilds_its_case_and_says_what_it_was(
    records: tuple[CaseRecord, ...],
) -> None:
    for record in records:
        case = parse(record.case_id)
        assert record.dtype == case.dtype
        assert (record.model, record.layer, record.suite) == (case.model, case.layer, case.suite)
        assert record.config["num_attention_heads"] == case.config.num_attention_heads
        assert record.workload["lengths"] == list(case.workload.lengths)
        assert record.case_id in record.reproduce


def test_synthetic_layer_with_two_features_is_one_row_and_a_preset_one_per_feature(
    records: tuple[CaseRecord, ...],
) -> None:
    features = {record.case_id: record.features for record in records}
    assert features[IDS[0]] == ("GQA + sliding window + learned sinks + unequal lengths",)
    assert {"GQA", "sliding window", "learned sinks"} <= set(features[IDS[2]])


def test_page_shows_every_case_verdict_and_failing_number(records: tuple[CaseRecord, ...]) -> None:
    page = render(Results(environment={"subject": "two"}, cases=records))
    for record in records:
        assert record.case_id in page
        if record.failed:
            assert record.reason in page
    assert {record.verdict for record in records if record.subject == "zeros"} == {"DEVIATES"}
    assert {record.verdict for record in records if record.subject == "impl"} == {"CONFORMS"}
