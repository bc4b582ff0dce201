"""One self-contained HTML page from the records of a run.

The page needs no network and no other file. Its verdicts, matrices and failing cases are plain
HTML; a script adds the table of all cases, its filters, and the sections of conforming cases. A
content security policy names that one script and style sheet by hash, so nothing else can run.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup

from reports import formatting, summary
from reports.distribution import BAR_HEIGHT, BAR_WIDTH, distribution
from reports.embed import embedded
from reports.links import case_keys, fragment
from reports.matrix import (
    FEATURE_SUITES,
    MODEL_SUITES,
    NONE,
    Matrix,
    feature_matrix,
    mesh_matrix,
    model_matrix,
)
from reports.records import VERDICTS, CaseRecord, Results
from reports.sections import Block, blocks

STATIC_SECTIONS = 200
"""Failing cases whose whole section is plain HTML; the rest name verdict, reason and command there,
and the script fills in their figures, so that a run in which all fails still opens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A failing case as the page shows it.

    Attributes:
        key: permalink key.
        case: the record.
        ratio: worst ratio as written, empty when nothing was measured.
        blocks: its whole section, or empty beyond `STATIC_SECTIONS`.
    """

    key: str
    case: CaseRecord
    ratio: str
    blocks: tuple[Block, ...]


def _asset(name: str) -> Markup:
    """Return a file of this package as it stands; it holds nothing from outside."""
    text = (files("reports") / "templates" / name).read_text(encoding="utf-8")
    return Markup(text)


def _hash(text: str) -> str:
    """Return the content security policy source that admits exactly this inline text."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("reports", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(fragment=fragment, count=formatting.count)
    return environment


def _failures(keys: tuple[str, ...], cases: tuple[CaseRecord, ...]) -> list[Failure]:
    """Return failing cases by verdict in the order of the schema, then furthest over first."""
    failing = [(key, case) for key, case in zip(keys, cases, strict=True) if case.failed]
    failing.sort(key=lambda item: (VERDICTS.index(item[1].verdict), -item[1].worst_ratio))
    return [
        Failure(
            key=key,
            case=case,
            ratio=formatting.ratio(case.worst_ratio) if case.statistics else "",
            blocks=tuple(blocks(case)) if place < STATIC_SECTIONS else (),
        )
        for place, (key, case) in enumerate(failing)
    ]


def render(results: Results) -> str:
    """Return the report as the text of one HTML file.

    Args:
        results: what `reports.records.read_results` returns.
    """
    cases, environment = results.cases, results.environment
    keys = case_keys(cases)
    failures = _failures(keys, cases)
    drawn = {failure.key for failure in failures if failure.blocks}
    names = summary.subjects(results)
    state, sentence = summary.overall(cases, results.missing)
    style, script = _asset("report.css"), _asset("report.js")
    template = _environment().get_template("report.html.j2")
    page = template.render(
        subjects=names,
        state=state,
        sentence=sentence,
        each=[] if results.missing else _each(names, cases),
        verdicts=summary.verdict_counts(cases),
        facts=list(summary.run_facts(results)),
        false_alarms=summary.false_alarms(environment),
        matrices=_matrices(names, cases),
        distribution=distribution(cases),
        bar_width=BAR_WIDTH,
        bar_height=BAR_HEIGHT,
        failures=failures,
        unsupported=summary.unsupported_reasons(cases),
        choices=_choices(cases),
        total=len(cases),
        command=formatting.setting(environment.get("command") or ""),
        environment=summary.environment_facts(environment),
        packages=summary.packages(environment),
        data=embedded([(key, case, key in drawn) for key, case in zip(keys, cases, strict=True)]),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
    )
    return page.encode("utf-8", errors="replace").decode("utf-8")


def _each(names: tuple[str, ...], cases: tuple[CaseRecord, ...]) -> list[tuple[str, str, str]]:
    """Return every subject with its own state and sentence."""
    return [
        (name, *summary.overall([case for case in cases if case.subject == name])) for name in names
    ]


def _matrices(
    names: tuple[str, ...], cases: tuple[CaseRecord, ...]
) -> list[tuple[str, str, str, Matrix]]:
    """Return subject, title, name of the rows and matrix; several subjects are compared first."""
    chosen = ("", *names) if len(names) > 1 else ("",)
    return [
        (subject, title, row, matrix(cases, subject=subject))
        for subject in chosen
        for title, row, matrix in (
            ("Features", "feature", feature_matrix),
            ("Models", "model and layer", model_matrix),
            ("Many ranks", "mesh", mesh_matrix),
        )
    ]


def _choices(cases: tuple[CaseRecord, ...]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the filters of the case table: name, then value and label of every choice."""
    values: dict[str, set[str]] = {
        "verdict": {case.verdict for case in cases},
        "suite": {case.suite for case in cases},
        "dtype": {case.dtype for case in cases},
        "phase": {case.phase for case in cases},
        "feature": {feature for case in cases for feature in case.features or (NONE,)},
        "model": {case.model or NONE for case in cases},
        "layer": {case.layer or NONE for case in cases},
        "subject": {case.subject for case in cases},
    }
    choices = [(name, [(item, item) for item in sorted(found)]) for name, found in values.items()]
    by_name = dict(choices)
    by_name["suite"] += [
        (" ".join(group), " + ".join(group)) for group in (FEATURE_SUITES, MODEL_SUITES)
    ]
    return [(name, items) for name, items in choices if len(values[name]) > 1]


def write_report(results: Results, path: Path) -> None:
    """Write the report to `path`, replacing what was there."""
    path.write_text(render(results), encoding="utf-8", newline="\n")
