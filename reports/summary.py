"""The head of a report: the overall verdict in words, counts, and what the run was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from reports.formatting import count, duration, exact, flatten, setting
from reports.records import VERDICTS, CaseRecord, Results

_HEADED = ("command", "packages")
"""Environment keys that get a place of their own instead of a line in the list."""


def subjects(results: Results) -> tuple[str, ...]:
    """Return every subject judged, in order of appearance, or the one the environment names."""
    found = tuple(dict.fromkeys(case.subject for case in results.cases))
    named = results.environment.get("subject")
    return found or ((setting(named),) if named else ())


def verdict_counts(cases: Sequence[CaseRecord]) -> list[tuple[str, int]]:
    """Return every verdict of the schema with its number of cases, zeros included."""
    counts = Counter(case.verdict for case in cases)
    return [(verdict, counts[verdict]) for verdict in VERDICTS]


def overall(cases: Sequence[CaseRecord], missing: int = 0) -> tuple[str, str]:
    """Return the state of the whole run and the sentence that says it.

    Args:
        cases: the records.
        missing: cases that the run was to judge and that left none: it was stopped.

    Returns:
        `failed`, `passed` or `unsupported` (nothing was judged, or not all), and a sentence.
    """
    counts = Counter(case.verdict for case in cases)
    unsupported = counts["UNSUPPORTED"]
    judged = len(cases) - unsupported
    aside = f"; {unsupported:,} more not supported by the subject" if unsupported else ""
    failures = judged - counts["CONFORMS"]
    if failures:
        verb = "fails" if failures == 1 else "fail"
        sentence = f"Does not conform: {failures:,} of {count(judged, 'case')} {verb}{aside}."
        stopped = f" {count(missing, 'more case')} left no record." if missing else ""
        return "failed", sentence + stopped
    if missing:
        whole = count(len(cases) + missing, "case")
        return (
            "unsupported",
            f"No verdict: {missing:,} of {whole} left no record; none failed{aside}.",
        )
    if judged:
        whole = f"all {judged:,} cases pass" if judged > 1 else "the one case passes"
        return "passed", f"Conforms: {whole}{aside}."
    return "unsupported", f"No verdict: no case was judged{aside}."


def run_facts(results: Results) -> Iterator[tuple[str, str]]:
    """Yield the facts of the run that belong beside its verdict; absent ones are left out."""
    environment = results.environment
    for label, key in (("Tier", "tier"), ("Started", "started")):
        if environment.get(key) not in (None, ""):
            yield label, setting(environment[key])
    seconds = environment.get("seconds")
    if _is_number(seconds):
        yield "Took", duration(seconds)
    machine = [
        setting(environment[key])
        for key in ("platform", "machine")
        if environment.get(key) not in (None, "")
    ]
    if machine:
        yield "On", ", ".join(dict.fromkeys(machine))


def false_alarms(environment: Mapping[str, Any]) -> str:
    """Return the statement about the false-alarm rate, which is that of a whole run."""
    rate = environment.get("false_alarm_rate")
    if _is_number(rate):
        return (
            "Limits are set so that a correct subject fails anywhere in this whole run with a "
            f"probability of at most {exact(rate)}."
        )
    if isinstance(rate, str) and rate:
        return f"False alarms: {setting(rate)}"
    return "This run states no false-alarm rate."


def environment_facts(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the environment as written pairs, without what is shown apart from them."""
    return list(flatten({key: environment[key] for key in environment if key not in _HEADED}))


def packages(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return package names and versions, sorted by name."""
    found = environment.get("packages")
    return sorted(flatten(found)) if isinstance(found, Mapping) else []


def unsupported_reasons(cases: Sequence[CaseRecord]) -> list[tuple[str, int]]:
    """Return why cases were not supported and how many, most frequent first."""
    reasons = Counter(
        case.reason or "no reason given" for case in cases if case.verdict == "UNSUPPORTED"
    )
    return sorted(reasons.items(), key=lambda item: (-item[1], item[0]))


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
