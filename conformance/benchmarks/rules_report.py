"""Counts false alarms and misses, and writes them as a table, as Markdown and as figures."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table

from conformance.benchmarks.rules_peers import PEERS
from conformance.benchmarks.rules_trials import OURS, Verdicts
from conformance.defects import DEFECTS
from conformance.generated import markdown_table

RULES = (*(rule.name for rule in PEERS), OURS)


@dataclass(frozen=True, slots=True)
class Tally:
    """How often a rule was wrong.

    Attributes:
        rule: its name.
        alarms: correct kernels rejected.
        correct: correct kernels shown.
        misses: visible defects accepted.
        defects: visible defects shown.
    """

    rule: str
    alarms: int
    correct: int
    misses: int
    defects: int


def tallies(found: Sequence[Verdicts]) -> list[Tally]:
    """Count the mistakes of every rule."""
    correct = [one for one in found if one.kind == "correct"]
    defects = [one for one in found if one.kind == "defect"]
    return [
        Tally(
            rule,
            alarms=sum(not one.accepted[rule] for one in correct),
            correct=len(correct),
            misses=sum(one.accepted[rule] for one in defects),
            defects=len(defects),
        )
        for rule in RULES
    ]


def rich_table(found: Sequence[Verdicts]) -> Table:
    """Return the counts for a terminal."""
    table = Table(box=None)
    for column in ("rule", "false alarms", "misses", "missed"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    for tally in tallies(found):
        table.add_row(*_cells(tally))
    return table


def _cells(tally: Tally) -> tuple[str, str, str, str]:
    share = tally.misses / max(tally.defects, 1)
    return (
        tally.rule,
        f"{tally.alarms} of {tally.correct}",
        f"{tally.misses} of {tally.defects}",
        f"{share:.1%}",
    )


def markdown(found: Sequence[Verdicts]) -> str:
    """Return the counts by rule, by dtype and by defect."""
    cases = {one.case_id for one in found}
    invisible = sum(one.kind == "invisible" for one in found)
    parts = [
        f"{len(cases)} cases. {invisible} times a defect changed nothing on its case; those are "
        "not counted.",
        markdown_table(("rule", "false alarms", "misses", "missed"), map(_cells, tallies(found))),
        "Misses and, in brackets, false alarms by dtype:",
        _by_dtype(found),
        "Misses by defect, of the cases in which it is visible:",
        _by_defect(found),
        "The defects:",
        markdown_table(
            ("defect", "what is wrong", "source"),
            [(f"`{defect.id}`", defect.title, defect.source) for defect in DEFECTS],
        ),
    ]
    return "\n\n".join(parts)


def _by_dtype(found: Sequence[Verdicts]) -> str:
    dtypes = sorted({one.dtype for one in found})
    split = {dtype: tallies([one for one in found if one.dtype == dtype]) for dtype in dtypes}
    rows = [
        (rule, *(f"{split[d][i].misses} ({split[d][i].alarms})" for d in dtypes))
        for i, rule in enumerate(RULES)
    ]
    return markdown_table(("rule", *dtypes), rows)


def _by_defect(found: Sequence[Verdicts]) -> str:
    shown = Counter(one.kernel for one in found if one.kind == "defect")
    missed = Counter(
        (one.kernel, rule)
        for one in found
        if one.kind == "defect"
        for rule in RULES
        if one.accepted[rule]
    )
    shorter = [rule.replace(" defaults", "").replace("flash-attention", "FA") for rule in RULES]
    rows = [
        (f"`{defect.id}`", str(shown[defect.id]), *(str(missed[defect.id, r]) for r in RULES))
        for defect in DEFECTS
        if shown[defect.id]
    ]
    return markdown_table(("defect", "cases", *shorter), rows)


def figures(found: Sequence[Verdicts]) -> dict[str, Any]:
    """Return the counts as figures: shares of correct kernels rejected and of defects missed."""
    entries = []
    for tally in tallies(found):
        rule = tally.rule.lower().replace(" ", "-").replace("/", "-").replace("%", "percent")
        for name, count, total in (
            ("false-alarms", tally.alarms, tally.correct),
            ("misses", tally.misses, tally.defects),
        ):
            entries.append(
                {
                    "name": f"rules/{name}/{rule}",
                    "value": count / max(total, 1),
                    "unit": "share",
                    "better": "lower",
                    "samples": [count, total],
                }
            )
    return {"machine": machine(), "figures": entries}


def machine() -> dict[str, str]:
    """Describe where figures were measured."""
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
    }
