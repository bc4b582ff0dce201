"""The page holds everything, needs nothing, and cannot be broken by what it reports."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports.embed import embedded
from reports.html import STATIC_SECTIONS, render, write_report
from reports.records import (
    VERDICTS,
    CaseRecord,
    Results,
    Statistic,
    case_from_dict,
    case_to_dict,
)

MakeCase = Callable[..., CaseRecord]
MakeStatistic = Callable[..., Statistic]
MakeResults = Callable[..., Results]

HOSTILE = (
    "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>\"'`&amp;\u2028]]>{{ 7*7 }}"
)


class Page(HTMLParser):
    """The elements and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.ids: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["script"]:
            self.scripts[-1] += data
        else:
            self.text += data

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])


def everywhere(case: CaseRecord, text: str) -> CaseRecord:
    """The case with `text` in every place that takes one."""
    fields = case_to_dict(case)
    for name in ("case_id", "model", "layer", "phase", "dtype", "regime", "subject", "profile"):
        fields[name] = text
    fields.update(reason=text, reproduce=text, traceback=text, features=[text])
    fields.update(config={text: {text: text}}, workload={text: text}, profile_stages={text: text})
    fields.update(seconds={text: 1.0}, worst={**fields["worst"], "output": text})
    fields["statistics"] = [
        {**item, "output": text, "name": text, "derivation": text} for item in fields["statistics"]
    ]
    return case_from_dict(fields)


def hostile_results(case: CaseRecord, text: str) -> Results:
    environment = {
        **dict.fromkeys(("command", "tier", "subject", "started", "platform", "note"), text),
        "packages": {text: text},
        "false_alarm_rate": text,
        "nested": {text: [text]},
    }
    cases = []
    for suite in ("features", "model"):
        for verdict in ("CONFORMS", "DEVIATES", "UNSUPPORTED"):
            fields = {**case_to_dict(everywhere(case, text)), "suite": suite, "verdict": verdict}
            cases.append(case_from_dict(fields))
    return Results(environment=environment, cases=tuple(cases))


def test_hostile_text_leaves_the_elements_of_the_page_as_they_were(make_case: MakeCase) -> None:
    plain = Page(render(hostile_results(make_case(), "plain")))
    hostile = Page(render(hostile_results(make_case(), HOSTILE)))
    assert hostile.tags == plain.tags
    assert [name for name, _ in hostile.attributes] == [name for name, _ in plain.attributes]
    assert hostile.text.count(HOSTILE) >= 40
    assert HOSTILE in hostile.data["strings"]


@settings(deadline=None)
@given(text=st.text(min_size=1))
def test_any_text_survives_in_the_data_and_closes_no_script(make_case: MakeCase, text: str) -> None:
    case = everywhere(make_case(), text)
    blob = embedded([(text, case, False)])
    assert not set(blob) & set("<>&'\u2028\u2029")
    data = json.loads(blob)
    assert data["strings"][data["rows"][0][data["columns"].index("reason")]] == text


def test_lone_surrogates_do_not_stop_the_report(
    make_case: MakeCase, make_results: MakeResults, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    write_report(make_results(make_case(case_id="\ud800", verdict="CRASHED")), path)
    assert "case=?" in Page(path.read_text(encoding="utf-8")).ids


def test_policy_admits_exactly_the_script_and_style_of_the_page(
    make_case: MakeCase, make_results: MakeResults
) -> None:
    text = render(make_results(make_case()))
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    for found in (style, script):
        assert found is not None
        digest = base64.b64encode(hashlib.sha256(found.group(1).encode()).digest()).decode()
        # Autoescaping writes + as &#43; in attributes; a browser reads it back.
        assert f"sha256-{digest}" in text.replace("&#43;", "+")
    assert text.count("</script>") == 2
    assert "unsafe" not in text


def test_page_names_no_other_file_and_no_network(
    make_case: MakeCase, make_results: MakeResults
) -> None:
    text = render(make_results(make_case(), make_case(case_id="b", verdict="CRASHED")))
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text)
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert all(str(value).startswith("#") for name, value in page.attributes if name == "href")
    assert not [name for name, _ in page.attributes if name == "src" or name.startswith("on")]


def test_failing_case_is_whole_without_javascript(
    make_case: MakeCase, make_results: MakeResults, make_statistic: MakeStatistic
) -> None:
    failing = make_case(
        case_id="tkg broken",
        verdict="DEVIATES",
        reason="output[0, 17]: got 0.4336, golden 0.4012",
        statistics=(make_statistic(2.0),),
        traceback="Traceback of the subject",
    )
    page = Page(render(make_results(make_case(), failing)))
    assert "case=tkg broken" in page.ids
    assert ("href", "#case=tkg%20broken") in page.attributes
    for text in (
        *(failing.reason, failing.traceback, failing.reproduce, "2.00×", "[0, 17, 0, 93]"),
        *("extreme-value limit over 131,072 elements", "0.43359375", "0.40123457", "rope.theta"),
        *("bfloat16-fp32-accumulate", "q_proj", "kv_len", "310 ms"),
    ):
        assert text in page.text


def test_passing_case_is_only_in_the_data(make_case: MakeCase, make_results: MakeResults) -> None:
    page = Page(render(make_results(make_case(case_id="quiet"))))
    assert "case=quiet" not in page.ids
    assert "quiet" in page.data["strings"]
    assert "rope.theta" in page.data["strings"]


@pytest.mark.parametrize("verdict", VERDICTS)
def test_exactly_the_failing_verdicts_get_a_static_section(
    make_case: MakeCase, make_results: MakeResults, verdict: str
) -> None:
    record = make_case(case_id="x", verdict=verdict)
    assert ("case=x" in Page(render(make_results(record))).ids) == record.failed


def test_failures_beyond_the_static_ones_still_name_their_reason(
    make_case: MakeCase, make_results: MakeResults
) -> None:
    cases = [
        make_case(case_id=f"case {n}", verdict="CRASHED", reason=f"reason {n}", statistics=())
        for n in range(STATIC_SECTIONS + 5)
    ]
    page = Page(render(make_results(*cases)))
    assert page.ids.count(f"case=case {STATIC_SECTIONS + 4}") == 1
    assert f"reason {STATIC_SECTIONS + 4}" in page.text
    assert page.text.count("rope.theta") == STATIC_SECTIONS


def test_header_states_subject_verdict_and_false_alarm_rate(
    make_case: MakeCase, make_results: MakeResults
) -> None:
    page = Page(render(make_results(make_case(), make_case(case_id="b", verdict="CRASHED"))))
    for text in ("impl", "Does not conform: 1 of 2 cases fails", "at most 0.001", "12 min 34 s"):
        assert text in page.text


def test_environment_may_lack_every_key(make_case: MakeCase) -> None:
    page = Page(render(Results(environment={}, cases=(make_case(),))))
    assert "states no false-alarm rate" in page.text
    assert Page(render(Results(environment={}, cases=()))).text.count("No verdict") == 1


def test_subjects_are_compared_and_have_matrices_of_their_own(
    make_case: MakeCase, make_results: MakeResults
) -> None:
    theirs = make_case(subject="theirs", verdict="UNSUPPORTED")
    page = Page(render(make_results(make_case(), theirs)))
    assert page.tags.count("table") == 5
    assert "Conforms: the one case passes." in page.text
    assert "No verdict: no case was judged" in page.text
    assert "cte-bf16-b1-hq32-hkv8-s512-d128@theirs" in page.data["strings"]


def test_infinite_ratio_stays_strict_json(
    make_case: MakeCase, make_results: MakeResults, make_statistic: MakeStatistic
) -> None:
    record = make_case(verdict="DEVIATES", statistics=(make_statistic(float("nan")),))
    data = Page(render(make_results(record))).data
    assert data["rows"][0][data["columns"].index("ratio")] == "inf"


def test_element_ids_are_unique(make_case: MakeCase, make_results: MakeResults) -> None:
    cases = [make_case(verdict="CRASHED") for _ in range(3)]
    ids = Page(render(make_results(*cases))).ids
    assert len(ids) == len(set(ids))


@pytest.fixture
def many_cases(
    make_case: MakeCase, make_results: MakeResults, make_statistic: MakeStatistic
) -> Callable[[int], Results]:
    """Builds results of so many cases, a tenth of which fail."""

    def build(size: int) -> Results:
        return make_results(
            *(
                make_case(
                    case_id=f"tkg-bf16-b1-hq32-hkv8-kv4096-d128-window1024-{n}",
                    seed=n,
                    features=("sinks", f"feature {n % 30}"),
                    verdict="CRASHED" if n % 10 == 0 else "CONFORMS",
                    config={f"field_{place}": place * n for place in range(30)},
                    statistics=tuple(
                        make_statistic(n / 2000, name)
                        for name in ("magnitude", "spread", "row", "scale")
                    ),
                    traceback="a line of a traceback\n" * 10 if n % 10 == 0 else "",
                )
                for n in range(size)
            )
        )

    return build


def test_two_thousand_cases_stay_light(many_cases: Callable[[int], Results]) -> None:
    assert len(render(many_cases(2000)).encode()) < 6e6


def steps_of(function: Callable[[], object]) -> int:
    """Return how many lines, calls and returns of Python a function takes, callees included."""
    count, before = 0, sys.gettrace()

    def one(frame: FrameType, event: str, value: object) -> Any:
        nonlocal count
        count += 1
        return one

    sys.settrace(one)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def test_work_grows_as_the_number_of_cases(many_cases: Callable[[int], Results]) -> None:
    """Steps are counted, not seconds, which say as much about the machine.

    Twice the cases take twice the steps: from 600 to 1200 exactly twice as many more as from 300 to
    600, whatever the page costs without any. One line for each pair of cases, at the 3,000 steps
    that a case costs, would make it 2.45, and work that grows as n log n 2.2.
    """
    render(many_cases(1))  # templates are compiled once
    small, middle, large = (
        steps_of(functools.partial(render, many_cases(size))) for size in (300, 600, 1200)
    )
    assert large - middle < 2.1 * (middle - small)


def test_equal_results_give_equal_pages(make_case: MakeCase, make_results: MakeResults) -> None:
    cases = [make_case(case_id=f"{n}", features=("a", "b", "c")) for n in range(5)]
    assert render(make_results(*cases)) == render(make_results(*cases))
