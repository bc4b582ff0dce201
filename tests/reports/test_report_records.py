"""A results file comes back as it was written, and a file that is none is refused in words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports.records import (
    VERDICTS,
    CaseRecord,
    RecordError,
    Statistic,
    Worst,
    append_result,
    case_from_dict,
    case_to_dict,
    read_results,
    write_results,
)

MakeCase = Callable[..., CaseRecord]

index = st.lists(st.integers(0, 10**6), max_size=4).map(tuple)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
settings = st.dictionaries(st.text(), json_values, max_size=4)
statistics = st.builds(
    Statistic,
    output=st.text(),
    name=st.text(),
    value=st.floats(),
    limit=st.floats(),
    derivation=st.text(),
    where=index,
)
worsts = st.builds(
    Worst,
    output=st.text(),
    index=index,
    **{name: st.floats() for name in ("observed", "expected", "error", "sigma", "z")},
)
TEXTS = (
    *("case_id", "suite", "model", "layer", "phase", "dtype", "regime", "subject", "profile"),
    *("reason", "reproduce", "traceback"),
)
records = st.builds(
    CaseRecord,
    **{name: st.text() for name in TEXTS},
    features=st.lists(st.text(), max_size=3).map(tuple),
    seed=st.integers(0, 2**63),
    config=settings,
    workload=settings,
    profile_stages=st.dictionaries(st.text(), st.text(), max_size=3),
    verdict=st.sampled_from(VERDICTS),
    statistics=st.lists(statistics, max_size=3).map(tuple),
    worst=st.none() | worsts,
    seconds=st.dictionaries(st.text(), st.floats(), max_size=3),
)


@hypothesis.settings(deadline=None)
@given(records)
def test_record_round_trips_through_strict_json(record: CaseRecord) -> None:
    text = json.dumps(case_to_dict(record), allow_nan=False)
    again = case_from_dict(json.loads(text))
    assert repr(again.statistics) == repr(record.statistics)
    assert repr(again.worst) == repr(record.worst)
    assert case_to_dict(again) == case_to_dict(record)


def test_file_round_trips_with_its_environment(tmp_path: Path, make_case: MakeCase) -> None:
    path = tmp_path / "results.jsonl"
    cases = (make_case(), make_case(case_id="other", verdict="CRASHED", worst=None))
    write_results(path, {"tier": "fast", "seconds": math.inf}, cases)
    results = read_results(path)
    assert results.environment == {"tier": "fast", "seconds": "inf"}
    assert results.cases == cases


@pytest.mark.parametrize(
    ("environment", "missing"),
    [({}, 0), ({"planned_cases": 3}, 1), ({"planned_cases": 2}, 0), ({"planned_cases": "3"}, 0)],
)
def test_file_grows_by_a_case_and_says_how_many_it_lacks(
    tmp_path: Path, make_case: MakeCase, environment: dict[str, Any], missing: int
) -> None:
    path = tmp_path / "results.jsonl"
    first, second = make_case(), make_case(case_id="other", verdict="CRASHED", worst=None)
    write_results(path, environment, [first])
    append_result(path, second)
    results = read_results(path)
    assert results.cases == (first, second)
    assert results.missing == missing


def test_file_without_any_environment_key_is_read(tmp_path: Path, make_case: MakeCase) -> None:
    path = tmp_path / "results.jsonl"
    write_results(path, {}, [make_case()])
    assert len(read_results(path).cases) == 1


def test_environment_may_not_use_the_keys_of_the_format(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="'schema'"):
        write_results(tmp_path / "results.jsonl", {"schema": 3}, [])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_figures_that_json_cannot_hold_come_back(make_case: MakeCase, value: float) -> None:
    record = make_case(
        statistics=(Statistic(output="o", name="n", value=value, limit=1.0, derivation="d"),)
    )
    again = case_from_dict(json.loads(json.dumps(case_to_dict(record), allow_nan=False)))
    assert repr(again.statistics[0].value) == repr(value)


@pytest.mark.parametrize(
    ("value", "limit", "ratio"),
    [
        (3.0, 4.0, 0.75),
        (0.0, 0.0, 0.0),
        (1.0, 0.0, math.inf),
        (math.nan, 4.0, math.inf),
        (math.nan, 0.0, math.inf),
        (1.0, math.nan, math.inf),
        (math.inf, math.inf, math.inf),
    ],
)
def test_ratio_is_total_and_never_nan(value: float, limit: float, ratio: float) -> None:
    assert Statistic(output="o", name="n", value=value, limit=limit, derivation="").ratio == ratio


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


HEAD = {"kind": "environment", "schema": 1}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        ([{"kind": "environment", "schema": 2}], "follows schema 2, this version reads 1"),
        ([{"kind": "environment"}], "follows schema None"),
        ([{"kind": "case"}], "before the environment line"),
        ([HEAD, {"kind": "note"}], "line 2 must be an object of kind"),
        ([HEAD, [1]], "line 2 must be an object of kind"),
        ([HEAD, {"kind": "case", "case_id": "x"}], "does not follow schema 1"),
    ],
)
def test_file_of_another_kind_is_refused(tmp_path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        read_results(write(tmp_path / "results.jsonl", *lines))


def test_cut_off_file_is_refused_with_its_line(tmp_path: Path, make_case: MakeCase) -> None:
    path = tmp_path / "results.jsonl"
    write_results(path, {"tier": "fast"}, [make_case()])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(RecordError, match=r"line 2 is not JSON .*; is the file cut off\?"):
        read_results(path)


def test_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(b"PK\x03\x04\xff\xfe\x00")
    with pytest.raises(RecordError, match="line 1 is not JSON"):
        read_results(path)


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": "FINE"},
        {"unknown": 1},
        {"seed": "7"},
        {"config": None},
        {"reason": None},
        {"seconds": {"golden": "slow"}},
        {"worst": {"output": "o", "index": [0]}},
    ],
)
def test_record_with_a_wrong_field_is_refused(make_case: MakeCase, change: dict[str, Any]) -> None:
    with pytest.raises(RecordError, match="does not follow schema 1"):
        case_from_dict({**case_to_dict(make_case()), **change})
