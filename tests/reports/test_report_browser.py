"""The script of the page, in a browser where one is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from reports.html import write_report
from reports.links import fragment
from reports.records import CaseRecord, Results, Statistic

MakeCase = Callable[..., CaseRecord]
MakeStatistic = Callable[..., Statistic]
MakeResults = Callable[..., Results]
OpenPage = Callable[[Results, str], str]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


@pytest.fixture
def open_page(tmp_path: Path) -> OpenPage:
    """Writes results as a report, opens it at a fragment and returns its elements as text."""

    def open_at(results: Results, address: str) -> str:
        path = tmp_path / "report.html"
        write_report(results, path)
        command = [
            *(str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000"),
            *("--dump-dom", path.as_uri() + address),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout

    return open_at


def rows(page: str) -> list[str]:
    return re.findall(r'<tr class="row" data-key="([^"]*)"', page)


def test_filter_in_the_address_chooses_the_rows(
    open_page: OpenPage,
    make_case: MakeCase,
    make_results: MakeResults,
    make_statistic: MakeStatistic,
) -> None:
    results = make_results(
        make_case(case_id="a", features=("sinks", "softcap")),
        make_case(case_id="b", features=("sinks",), suite="model", model="m"),
        make_case(case_id="c", features=("sinks",), dtype="float32"),
        make_case(case_id="d", features=("sinks",), statistics=(make_statistic(0.95),)),
    )
    address = fragment(feature="sinks", suite="features serving core gradients", dtype="bfloat16")
    page = open_page(results, address)
    assert rows(page) == ["d", "a"]
    assert "2 of 4 cases" in page
    address = fragment(q="ratio>0.9 -softcap", sort="key")
    assert rows(open_page(results, address)) == ["d"]


def test_permalink_opens_a_passing_case_with_a_hostile_id(
    open_page: OpenPage, make_case: MakeCase, make_results: MakeResults
) -> None:
    name = "</script><script>document.title='broken'</script> +%&=#"
    results = make_results(make_case(), make_case(case_id=name), make_case(case_id="z"))
    page = open_page(results, fragment(case=name))
    assert page.count('<tr class="detail"') == 1
    assert "rope.theta" in page.split('<tr class="detail"')[1]
    assert "<title>✓ impl" in page


def test_permalink_opens_a_failing_case_in_place(
    open_page: OpenPage, make_case: MakeCase, make_results: MakeResults
) -> None:
    results = make_results(make_case(), make_case(case_id="it broke", verdict="CRASHED"))
    page = open_page(results, fragment(case="it broke"))
    assert re.search(r'<details class="case" data-key="it broke" open', page)
