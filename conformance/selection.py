"""Turns what a user asks for into a list of cases."""

from __future__ import annotations

from collections.abc import Sequence

from conformance.case_ids import parse
from conformance.cases import Case
from conformance.errors import UsageError
from conformance.matrix import cases_for, preset_cases
from conformance.presets import PresetError
from conformance.real_models import real_model_cases
from conformance.subjects import Subject
from conformance.tiers import checked_tier

SUITES = ("features", "serving", "core", "gradients", "presets")
"""Suites a tier holds; `model` comes with `--model`."""


def select_cases(
    subject: Subject,
    *,
    tier: str = "smoke",
    suites: Sequence[str] = (),
    presets: Sequence[str] = (),
    model: str | None = None,
    ids: Sequence[str] = (),
) -> list[Case]:
    """Return the cases to judge.

    Args:
        subject: decides which suites apply when none is named.
        tier: one of `conformance.tiers.TIERS`.
        suites: suites of the tier to take; empty takes all that fit the subject's scope.
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
        return [parse(text) for text in dict.fromkeys(ids)]
    if model is not None:
        return real_model_cases(model)
    checked_tier(tier)
    if presets:
        try:
            return preset_cases(tier, dict.fromkeys(presets))
        except PresetError as error:
            raise UsageError(str(error)) from error
    fitting = [
        suite
        for suite in SUITES
        if suite != "serving" or subject.serves
        if suite != "gradients" or subject.backward is not None
        if suite == "gradients" or (suite == "core") == (subject.scope == "core")
    ]
    return [
        case
        for suite in suites or fitting
        for case in cases_for(tier, suite)
        if suite != "gradients" or case.scope == subject.scope  # the one suite of both scopes
    ]
