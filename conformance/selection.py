"""Turns what a user asks for into a list of cases."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from conformance.case_ids import parse
from conformance.cases import Case
from conformance.errors import UsageError
from conformance.matrix import cases_for, preset_cases
from conformance.presets import PresetError
from conformance.real_models import real_model_cases
from conformance.subjects import Subject
from conformance.tiers import checked_tier

if TYPE_CHECKING:
    from conformance.parallel.workloads import ParallelWorkload

SUITES = ("features", "serving", "core", "gradients", "presets")
"""Suites a tier holds; `model` comes with `--model`."""

PARALLEL = "parallel"
"""Suite of `impl` on real ranks: the same in every tier, judged where it is asked for."""

_CLAIMED_ON_RANKS = "native"
_ON_RANKS = re.compile(r"[^/]+/tp\d+[^/]*/[^/]+")


def select_cases(
    subject: Subject,
    *,
    tier: str = "smoke",
    suites: Sequence[str] = (),
    presets: Sequence[str] = (),
    model: str | None = None,
    ids: Sequence[str] = (),
) -> list[Case | ParallelWorkload]:
    """Return the cases to judge.

    Args:
        subject: decides which suites apply when none is named.
        tier: one of `conformance.tiers.TIERS`.
        suites: suites of the tier to take, or `PARALLEL`; empty takes all of the tier that fit the
            subject's scope.
        presets: published models whose layers alone to take.
        model: real model whose layers alone to take.
        ids: cases to take, by id, and nothing else.

    Raises:
        UsageError: something asked for is unknown, or cannot be combined.
    """
    ways = [bool(ids), bool(model), bool(presets)]
    if sum(ways) > 1:
        raise UsageError("case, model and preset exclude each other; give one of them")
    if suites and any(ways):
        raise UsageError("suite cannot be combined with case, model or preset")
    if ids:
        return [_named(text, subject) for text in dict.fromkeys(ids)]
    if model is not None:
        return list(real_model_cases(model))
    checked_tier(tier)
    if presets:
        try:
            return list(preset_cases(tier, dict.fromkeys(presets)))
        except PresetError as error:
            raise UsageError(str(error)) from error
    fitting = [
        suite
        for suite in SUITES
        if suite != "serving" or subject.serves
        if suite != "gradients" or subject.backward is not None
        if suite == "gradients" or (suite == "core") == (subject.scope == "core")
    ]
    found: list[Case | ParallelWorkload] = []
    for suite in suites or fitting:
        if suite == PARALLEL:
            found += _on_ranks(subject)
        else:  # gradients is the one suite of both scopes
            of_suite = cases_for(tier, suite)
            found += [c for c in of_suite if suite != "gradients" or c.scope == subject.scope]
    return found


def parallel_case(text: str) -> ParallelWorkload:
    """Return the case on many ranks of this id.

    Raises:
        UsageError: there is none.
    """
    from conformance.parallel.cases import parallel_cases

    found = next((case for case in parallel_cases() if case.id == text), None)
    if found is None:
        raise UsageError(f"case must be among those of `list cases --suite parallel`, got {text}")
    return found


def _named(text: str, subject: Subject) -> Case | ParallelWorkload:
    if not _ON_RANKS.fullmatch(text):
        return parse(text)
    _check_runs_on_ranks(subject)
    return parallel_case(text)


def _on_ranks(subject: Subject) -> list[ParallelWorkload]:
    """Return all cases on many ranks, the costly ones first."""
    from conformance.parallel.cases import parallel_cases

    _check_runs_on_ranks(subject)
    return sorted(parallel_cases(), key=lambda case: -case.world_size)


def _check_runs_on_ranks(subject: Subject) -> None:
    if subject.name != "impl":
        raise UsageError(f"suite {PARALLEL} must have the subject impl, got {subject.name}")
    if subject.profile != _CLAIMED_ON_RANKS:
        raise UsageError(
            f"profile must be {_CLAIMED_ON_RANKS} for suite {PARALLEL}, got {subject.profile}"
        )
