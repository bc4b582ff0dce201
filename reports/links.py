"""Addresses within a report: a URL fragment for every case and for every filter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from urllib.parse import quote

from reports.records import CaseRecord


def fragment(**parameters: str) -> str:
    """Return `#name=value&...`, percent-encoded; parameters with an empty value are left out.

    Spaces become `%20`, not `+`, so that a browser without JavaScript finds the element whose id is
    the decoded fragment.
    """
    pairs = (
        f"{name}={quote(value, safe='', errors='replace')}"
        for name, value in parameters.items()
        if value
    )
    return "#" + "&".join(pairs)


def case_keys(cases: Sequence[CaseRecord]) -> tuple[str, ...]:
    """Return one permalink key per case: its id, made unique where several records share it.

    An id that several subjects were judged on is followed by `@subject`; a record that repeats both
    also gets its number, `#2` for the second.
    """
    shared = Counter(case.case_id for case in cases)
    seen: Counter[str] = Counter()
    keys = []
    for case in cases:
        key = case.case_id if shared[case.case_id] == 1 else f"{case.case_id}@{case.subject}"
        seen[key] += 1
        keys.append(key if seen[key] == 1 else f"{key}#{seen[key]}")
    return tuple(keys)
