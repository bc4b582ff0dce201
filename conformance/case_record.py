"""A verdict on one case as a record of the results file."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from conformance.cases import PHASE_NAMES, Case
from conformance.false_alarms import FalseAlarms
from conformance.gradients.precision import gradient_profile
from conformance.judge import Judgement
from conformance.precision import PrecisionProfile, profile_named
from conformance.schedule_ids import render_cache, render_parts
from conformance.subjects.base import Subject
from reports.records import CaseRecord


def claimed_profile(case: Case, subject: Subject) -> PrecisionProfile:
    """Return what the subject claims to round on this case."""
    profile = profile_named(subject.profile, case.dtype)
    if case.workload.backward:
        return gradient_profile(profile, subject.profile, case.dtype)
    return profile


def reproduce_command(
    case: Case, subject: Subject, alarms: FalseAlarms, exact_rules: bool = False
) -> str:
    """Return the command that judges this case again, by the same limits."""
    words = ["attn-conformance", "run", "--subject", subject.name, "--case", case.id]
    words += ["--profile", subject.profile, *alarms.options()]
    return shlex.join([*words, *(("--exact-rules", "on") if exact_rules else ())])


def case_record(
    case: Case,
    subject: Subject,
    profile: PrecisionProfile,
    alarms: FalseAlarms,
    verdict: str,
    reason: str,
    seconds: Mapping[str, float],
    *,
    judgement: Judgement | None = None,
    vacuous: tuple[str, ...] = (),
    exact_rules: bool = False,
    text: str = "",
) -> CaseRecord:
    """Return the record of a verdict.

    Args:
        case: what was judged on.
        subject: what was judged.
        profile: what it was judged under.
        alarms: the run's chance of a false alarm.
        verdict: of `reports.records.VERDICTS`.
        reason: one sentence, empty when it conforms.
        seconds: time by step.
        judgement: the figures, None when nothing could be compared.
        vacuous: outputs of which the case could not tell zeros from the truth.
        exact_rules: whether the subject was held to them.
        text: the subject's traceback when it crashed.
    """
    return CaseRecord(
        case_id=case.id,
        suite=case.suite,
        features=_feature_rows(case),
        model=case.model,
        layer=case.layer,
        phase=PHASE_NAMES[case.workload.phase],
        dtype=case.dtype,
        regime=case.regime,
        seed=case.seed,
        config=asdict(case.config),
        workload=_workload(case),
        subject=subject.name,
        profile=profile.name,
        profile_stages=dict(profile.stores),
        verdict=verdict,
        reason=reason,
        statistics=judgement.statistics if judgement else (),
        worst=judgement.worst if judgement else None,
        reproduce=reproduce_command(case, subject, alarms, exact_rules),
        seconds=dict(seconds),
        traceback=text,
        power=judgement.power if judgement else {},
        vacuous=vacuous,
    )


def _feature_rows(case: Case) -> tuple[str, ...]:
    """Return the rows of the report that a case counts in.

    A synthetic layer with two features is a row of its own, so a red row names the culprit.
    """
    together = " + ".join(case.features)
    if case.workload.backward:
        return ("gradients", f"gradients: {together}")
    return case.features if case.model or case.suite == "serving" else (together,)


def _workload(case: Case) -> dict[str, Any]:
    work = case.workload
    found = {**asdict(work), "lengths": list(work.lengths)}
    if work.schedule is not None:
        cache = render_cache(work.schedule.cache)
        found["schedule"] = f"{cache} {render_parts(work.schedule.parts, work.batch)}"
    else:
        del found["schedule"]
    if not work.backward:
        del found["backward"]
    return found
