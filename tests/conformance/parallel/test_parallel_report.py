"""Verdicts on ranks in results and page: beside the other suites, with the ranks named."""

import html
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import planted_ranks
import pytest
from click.testing import CliRunner

from conformance.cli import main
from conformance.errors import UsageError
from conformance.false_alarms import FalseAlarms
from conformance.matrix import cases_for
from conformance.parallel.cases import AXES, build_case, parallel_cases
from conformance.parallel.session import judge_on_real_ranks, telling
from conformance.parallel.verdict import ParallelVerdict, RankVerdict
from conformance.selection import parallel_case, select_cases
from conformance.subjects import load_subject
from reports.html import render
from reports.records import Results, Statistic, read_results, write_results

PLAIN = {**{axis: choices[0] for axis, choices in AXES.items()}, "heads": (8, 2)}
CASE = replace(
    build_case({**PLAIN, "mesh": (4, 1, 1), "sinks": True}), lengths=(24, 9, 24, 9), steps=1
)


def test_a_failing_case_names_its_ranks_and_says_how_to_see_it_again(tmp_path: Path) -> None:
    alarms = FalseAlarms(cases=155)
    good = judge_on_real_ranks(CASE, alarms=alarms)
    bad = judge_on_real_ranks(CASE, planted_ranks.sinks_of_another_rank, alarms=alarms)
    bad = replace(bad, seed=1)  # the page keys a case by its id
    path = tmp_path / "results.jsonl"
    write_results(path, {"subject": "impl"}, [good, bad])
    read = read_results(path)
    for kept, of in zip(read.cases, (good, bad), strict=True):
        assert (kept.ranks, kept.statistics) == (of.ranks, of.statistics)
    assert [(r.rank, r.verdict, r.first) for r in good.ranks] == [
        (rank, "CONFORMS", False) for rank in range(4)
    ]
    assert [r.rank for r in bad.ranks if r.first] == [1]
    assert "prompt attn" in bad.ranks[1].reason

    page = render(read)
    section = page[page.index('id="failures"') : page.index('id="cases"')]
    words = html.unescape(re.sub(r"<[^>]+>", " ", section))
    assert "rank 1 deviates first, in prompt attn: " in words
    assert f"attn-conformance run --case {CASE.id} --cases-in-run 155" in words
    table = section[section.index("<h4>Ranks") :]
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", table[: table.index("</table>")], flags=re.DOTALL)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]
    first = [row[0] for row in cells if len(row) == 4 and row[2] == "yes"]
    assert first == ["rank 1"]
    matrix = page[page.index("<h2>Many ranks") :]
    assert "tp4 cp1 dp1" in matrix[: matrix.index("</table>")]


def test_records_keep_each_ranks_furthest_figures_and_where_it_went_wrong_first() -> None:
    def figure(output: str, name: str, value: float) -> Statistic:
        return Statistic(output=output, name=name, value=value, limit=1.0, derivation="")

    taken = [
        figure("rank 0 prompt attn", "spread", 0.5),
        figure("rank 0 step 1 attn", "spread", 0.7),
        figure("rank 0 step 1 attn", "magnitude", 0.1),
        figure("rank 1 prompt attn", "spread", 1.5),
        figure("rank 1 prompt attn", "magnitude", 1.1),
        figure("rank 1 step 1 attn", "spread", 1.2),
        figure("rank 1 step 1 attn", "magnitude", 2.2),
        figure("rank 1 step 2 attn", "spread", 0.9),
        figure("rank 10 prompt attn", "spread", 0.2),
    ]
    ranks = (RankVerdict(0, "CONFORMS"), RankVerdict(1, "DEVIATES", "wrong", "prompt attn"))
    verdict = ParallelVerdict("DEVIATES", "wrong", (1,), ranks, tuple(taken))
    assert telling(verdict) == [taken[i] for i in (1, 2, 3, 4, 6, 8)]


def test_the_suite_is_chosen_by_name_beside_others_and_only_for_impl() -> None:
    impl, other = load_subject("impl"), load_subject("torch-sdpa")
    found = select_cases(impl, suites=("core", "parallel"))
    core = cases_for("smoke", "core")
    assert found[: len(core)] == core
    assert Counter(c.id for c in found[len(core) :]) == Counter(c.id for c in parallel_cases())
    some = parallel_cases()[0]
    assert select_cases(impl, ids=(core[0].id, some.id)) == [core[0], some]
    for asked in ({"suites": ("parallel",)}, {"ids": (some.id,)}):
        with pytest.raises(UsageError, match="must have the subject impl, got torch-sdpa"):
            select_cases(other, **asked)
    with pytest.raises(UsageError, match="case must be among those"):
        parallel_case("h1/tp9/cte")


def test_one_run_writes_cases_of_one_rank_and_of_many_to_one_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one = "h64-hq4-hkv2-d16/cte-bf16-b1-q9-gaussian-seed0"
    many = next(c for c in parallel_cases() if c.world_size == 2)
    ran = CliRunner().invoke(main, ["run", "--case", one, "--case", many.id, "--jobs", "1"])
    assert ran.exit_code == 0, ran.output
    results: Results = read_results(tmp_path / "results.jsonl")
    assert {case.suite: case.case_id for case in results.cases} == {
        "features": one,
        "parallel": many.id,
    }
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h2>Features" in page
    assert "<h2>Many ranks" in page
