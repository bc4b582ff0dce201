"""The matrices count every case where it belongs, and every cell knows the way to its cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from urllib.parse import unquote

import pytest

from reports.distribution import BINS, distribution
from reports.links import case_keys, fragment
from reports.matrix import Cell, Matrix, feature_matrix, model_matrix
from reports.records import CaseRecord, Statistic
from reports.summary import overall

MakeCase = Callable[..., CaseRecord]
MakeStatistic = Callable[..., Statistic]


def cell(matrix: Matrix, row: str, phase: str = "", dtype: str = "") -> Cell:
    cells = dict(matrix.rows)[row]
    return cells[1 + matrix.columns.index((phase, dtype))] if phase else cells[0]


def test_case_counts_in_the_row_of_every_feature_but_once_in_all(make_case: MakeCase) -> None:
    matrix = feature_matrix([make_case(features=("sinks", "padding", "sinks"))])
    assert [row for row, _ in matrix.rows] == ["all cases", "padding", "sinks"]
    assert [cells[0].total for _, cells in matrix.rows] == [1, 1, 1]


def test_columns_are_grouped_by_phase_in_order_of_precision(make_case: MakeCase) -> None:
    cases = [
        make_case(phase=phase, dtype=dtype)
        for phase in ("token generation", "context encoding")
        for dtype in ("bfloat16", "float32", "mxfp4")
    ]
    matrix = feature_matrix(cases)
    assert matrix.groups == [("context encoding", 3), ("token generation", 3)]
    assert [dtype for _, dtype in matrix.columns[:3]] == ["float32", "bfloat16", "mxfp4"]


def test_suites_go_to_their_own_matrix(make_case: MakeCase) -> None:
    cases = [make_case(suite=suite) for suite in ("features", "core", "presets", "model")]
    assert cell(feature_matrix(cases), "all cases").total == 2
    assert cell(model_matrix(cases), "all cases").total == 2


def test_model_rows_name_model_and_layer(make_case: MakeCase) -> None:
    cases = [
        make_case(suite="model", model="gpt-oss", layer="sliding"),
        make_case(suite="model", model="gpt-oss", layer="full"),
        make_case(suite="model", model="qwen3"),
        make_case(suite="model"),
    ]
    rows = [row for row, _ in model_matrix(cases).rows]
    assert rows == ["all cases", "(none)", "gpt-oss · full", "gpt-oss · sliding", "qwen3"]


@pytest.mark.parametrize(
    ("verdicts", "state", "passed", "total"),
    [
        (["CONFORMS", "CONFORMS"], "passed", 2, 2),
        (["CONFORMS", "UNSUPPORTED"], "passed", 1, 1),
        (["CONFORMS", "TIMED_OUT"], "failed", 1, 2),
        (["UNSUPPORTED", "CRASHED"], "failed", 0, 1),
        (["UNSUPPORTED"], "unsupported", 0, 0),
    ],
)
def test_cell_state_and_counts(
    make_case: MakeCase, verdicts: list[str], state: str, passed: int, total: int
) -> None:
    cases = [make_case(verdict=verdict, statistics=()) for verdict in verdicts]
    found = cell(feature_matrix(cases), "sliding window", "context encoding", "bfloat16")
    assert (found.state, found.passed, found.total) == (state, passed, total)


def test_cell_without_a_case_is_blank(make_case: MakeCase) -> None:
    cases = [make_case(features=("a",)), make_case(features=("b",), dtype="float32")]
    assert cell(feature_matrix(cases), "a", "context encoding", "float32").state == "blank"


def test_cell_shows_the_worst_ratio_of_all_its_cases(
    make_case: MakeCase, make_statistic: MakeStatistic
) -> None:
    cases = [make_case(statistics=(make_statistic(ratio),)) for ratio in (0.25, 0.875, 0.5)]
    assert cell(feature_matrix(cases), "all cases").note == "0.88×"


def test_cell_names_a_failure_that_no_ratio_shows(
    make_case: MakeCase, make_statistic: MakeStatistic
) -> None:
    cases = [make_case(), make_case(verdict="TIMED_OUT", statistics=())]
    assert cell(feature_matrix(cases), "all cases").note == "timed out"
    cases.append(make_case(verdict="DEVIATES", statistics=(make_statistic(3.0),)))
    assert cell(feature_matrix(cases), "all cases").note == "3.00×"


def test_cell_with_a_nan_figure_shows_infinity(
    make_case: MakeCase, make_statistic: MakeStatistic
) -> None:
    broken = make_case(verdict="MALFORMED", statistics=(make_statistic(math.nan),))
    assert cell(feature_matrix([broken]), "all cases").note == "∞×"


def test_cell_links_to_the_filter_of_its_row_column_and_suites(make_case: MakeCase) -> None:
    matrix = feature_matrix([make_case(features=("a&b=c",))])
    link = cell(matrix, "a&b=c", "context encoding", "bfloat16").link
    assert link == (
        "#feature=a%26b%3Dc&suite=features%20serving%20core%20gradients"
        "&phase=context%20encoding&dtype=bfloat16"
    )


def test_matrix_of_one_subject_leaves_out_the_others(make_case: MakeCase) -> None:
    cases = [make_case(), make_case(subject="theirs", verdict="CRASHED")]
    assert cell(feature_matrix(cases, subject="impl"), "all cases").state == "passed"
    assert cell(feature_matrix(cases, subject="theirs"), "all cases").state == "failed"


def test_several_subjects_get_a_column_each_with_links_to_their_cases(make_case: MakeCase) -> None:
    cases = [
        make_case(features=("a", "b")),
        make_case(features=("a",), subject="theirs", verdict="CRASHED"),
        make_case(features=("a",), dtype="float32"),
    ]
    matrix = feature_matrix(cases)
    assert matrix.columns == (("subject", "impl"), ("subject", "theirs"))
    assert matrix.groups == [("subject", 2)]
    assert cell(matrix, "a", "subject", "impl").passed == 2
    assert cell(matrix, "a", "subject", "theirs").state == "failed"
    assert cell(matrix, "b", "subject", "theirs").state == "blank"
    link = cell(matrix, "a", "subject", "theirs").link
    assert link == "#feature=a&suite=features%20serving%20core%20gradients&subject=theirs"


def test_matrix_without_cases_has_no_rows() -> None:
    assert feature_matrix([]).rows == ()


def test_case_keys_are_unique_and_plain_where_they_can_be(make_case: MakeCase) -> None:
    cases = [
        make_case(case_id="a"),
        make_case(case_id="b"),
        make_case(case_id="b", subject="theirs"),
        make_case(case_id="b", subject="theirs"),
    ]
    assert case_keys(cases) == ("a", "b@impl", "b@theirs", "b@theirs#2")


def test_fragment_decodes_to_what_went_in() -> None:
    hostile = "a b+c%&=#\"'<é>"
    assert unquote(fragment(case=hostile)) == f"#case={hostile}"
    assert fragment(case="\ud800") == "#case=%3F"


def test_distribution_bins_conforming_cases_only(
    make_case: MakeCase, make_statistic: MakeStatistic
) -> None:
    ratios = (0.0, 0.049, 0.5, 0.99, 1.0)
    cases = [make_case(statistics=(make_statistic(ratio),)) for ratio in ratios]
    cases.append(make_case(verdict="DEVIATES", statistics=(make_statistic(2.0),)))
    cases.append(make_case(statistics=()))
    found = distribution(cases)
    amounts = [bar.amount for bar in found.bars]
    assert (amounts[0], amounts[BINS // 2], amounts[-1]) == (2, 1, 2)
    assert (sum(amounts), found.measured, found.beyond) == (5, 5, 0)
    assert found.summary.startswith("5 conforming cases: median 0.50×")


def test_distribution_tells_of_conforming_cases_beyond_their_limit(
    make_case: MakeCase, make_statistic: MakeStatistic
) -> None:
    assert distribution([make_case(statistics=(make_statistic(1.5),))]).beyond == 1


@pytest.mark.parametrize(
    ("verdicts", "missing", "state", "words"),
    [
        ([], 0, "unsupported", "No verdict: no case was judged."),
        (["UNSUPPORTED"], 0, "unsupported", "no case was judged; 1 more not supported"),
        (["CONFORMS"], 0, "passed", "Conforms: the one case passes."),
        (["CONFORMS"] * 2 + ["UNSUPPORTED"], 0, "passed", "all 2 cases pass; 1 more not supported"),
        (["CONFORMS", "CRASHED"], 0, "failed", "Does not conform: 1 of 2 cases fails."),
        (["DEVIATES", "TIMED_OUT"], 0, "failed", "Does not conform: 2 of 2 cases fail."),
        (["CONFORMS"], 1, "unsupported", "No verdict: 1 of 2 cases left no record; none failed."),
        ([], 1000, "unsupported", "No verdict: 1,000 of 1,000 cases left no record"),
        (["CRASHED"], 2, "failed", "1 of 1 case fails. 2 more cases left no record."),
    ],
)
def test_overall_verdict_in_words(
    make_case: MakeCase, verdicts: list[str], missing: int, state: str, words: str
) -> None:
    found_state, sentence = overall([make_case(verdict=verdict) for verdict in verdicts], missing)
    assert found_state == state
    assert words in sentence
