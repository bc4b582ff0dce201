"""The cases as one compact JSON text that is safe inside a script element.

Every text is stored once, in `strings`, and named by its place there; configurations, profiles and
derivations repeat from case to case, so this is what keeps a page of thousands of cases small.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

from reports.formatting import ratio
from reports.records import CaseRecord
from reports.sections import Block, Code, Facts, blocks

FIELDS = ("verdict", "suite", "dtype", "phase", "model", "layer", "subject", "reason")
"""Text fields of a record that the table filters by or shows."""

_UNSAFE = {ord(mark): f"\\u{ord(mark):04x}" for mark in "<>&'\u2028\u2029"}


class _Strings:
    """Texts in order of first use."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}

    def place(self, text: str) -> int:
        """Return where the text stands, adding it when it is new."""
        return self.places.setdefault(text, len(self.places))

    def all(self, texts: Iterable[str]) -> list[int]:
        """Return where each of the texts stands."""
        return [self.place(text) for text in texts]


def _encoded(block: Block, strings: _Strings) -> list[Any]:
    head = [block.kind, strings.place(block.title)]
    if isinstance(block, Facts):
        return [*head, [strings.all(pair) for pair in block.pairs]]
    if isinstance(block, Code):
        return [*head, strings.place(block.text)]
    rows = [strings.all(row) for row in block.rows]
    return [*head, strings.all(block.header), rows, list(block.marked)]


def _ratio(case: CaseRecord) -> float | str | None:
    if not case.statistics:
        return None
    return case.worst_ratio if math.isfinite(case.worst_ratio) else "inf"


def embedded(entries: Sequence[tuple[str, CaseRecord, bool]]) -> Markup:
    """Return the cases as JSON that no text in them can break out of.

    Args:
        entries: permalink key, record, and whether its section is already part of the page.
    """
    strings = _Strings()
    cases = []
    for key, case, drawn in entries:
        cases.append(
            {
                "key": strings.place(key),
                "id": strings.place(case.case_id),
                **{name: strings.place(getattr(case, name)) for name in FIELDS},
                "features": strings.all(case.features),
                "ratio": _ratio(case),
                "ratioText": strings.place(ratio(case.worst_ratio) if case.statistics else ""),
                "blocks": None if drawn else [_encoded(block, strings) for block in blocks(case)],
            }
        )
    columns = list(cases[0]) if cases else []
    data = {
        "strings": list(strings.places),
        "columns": columns,
        "rows": [[case[column] for column in columns] for case in cases],
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return Markup(text.translate(_UNSAFE))
