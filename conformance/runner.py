"""Judges one subject on one case, from inputs to record."""

from __future__ import annotations

import time
import traceback
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from conformance.calls import Call, call_of
from conformance.case_record import case_record, claimed_profile
from conformance.cases import Case
from conformance.closed_form import is_long
from conformance.core_scale import predict_core
from conformance.directions import directions
from conformance.error_model import MANY_RUNS, ErrorScale, Outputs, predict_scale
from conformance.exact_rules import Subjected, exact_statistics
from conformance.expected import Inputs, Reference, by_pieces, reference
from conformance.false_alarms import STANDARD, FalseAlarms
from conformance.gradients.inputs import GradientInputs, draw_gradients
from conformance.gradients.subjects import gradients_of
from conformance.inputs import CoreInputs, draw_core, draw_layer
from conformance.judge import Judgement, judge_outputs, zeros_pass
from conformance.looks import look
from conformance.observed import Malformed, check_finite, observe
from conformance.precision import PrecisionProfile
from conformance.real_models import real_layer_inputs
from conformance.sampled_rows import predict_sampled
from conformance.scale_cache import ScaleCache
from conformance.serve_inputs import draw_serve
from conformance.subjects.base import GradientCall, Subject, Unsupported
from reports.records import CaseRecord


@dataclass(slots=True)
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timing(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = self.seconds.get(step, 0.0) + time.perf_counter() - start
            self.seconds[step] = round(spent, 4)


def inputs_of(case: Case) -> Inputs:
    """Return the inputs of a case: drawn, or a real model's own."""
    if case.regime == "prompt":
        return real_layer_inputs(case)
    if case.workload.schedule is not None:
        return draw_serve(case)
    if case.workload.backward:
        return draw_gradients(case)
    return draw_core(case) if case.scope == "core" else draw_layer(case)


def judge_case(
    case: Case,
    subject: Subject,
    *,
    alarms: FalseAlarms = STANDARD,
    exact_rules: bool = False,
    cache: ScaleCache | None = None,
) -> CaseRecord:
    """Judge a subject on a case.

    Args:
        case: what to judge it on.
        subject: what to judge.
        alarms: chance of a false alarm, and the number of cases that share it.
        exact_rules: whether to call the subject again with changes that must change no bit.
        cache: where golden's outputs and the error scales may be kept.

    Returns:
        The record; a failure of the subject, even a crash, is a verdict and not an exception.

    Raises:
        UsageError: the case's inputs cannot be had here.
    """
    profile = claimed_profile(case, subject)
    reason = subject.unsupported(case)
    if subject.scope != case.scope:
        reason = f"{subject.name} takes cases of scope {subject.scope!r}, this is {case.scope!r}"
    elif case.workload.schedule is not None and not subject.serves:
        reason = f"{subject.name} does not serve: it takes no ServeCall"
    elif case.workload.backward and subject.backward is None:
        reason = f"{subject.name} claims no gradients: it has no backward"
    if reason is not None:
        return case_record(case, subject, profile, alarms, "UNSUPPORTED", reason, {})
    clock = _Clock()
    with clock.timing("golden"):
        inputs = inputs_of(case)
        expected = reference(case, inputs, cache, profile)
    try:
        with clock.timing("subject"):
            returned = _answer(subject, call_of(case, inputs))
        observed, kept = observe(returned, case, inputs, expected)
        check_finite(observed, expected)
    except Unsupported as error:
        return case_record(case, subject, profile, alarms, "UNSUPPORTED", str(error), clock.seconds)
    except Malformed as error:
        return case_record(case, subject, profile, alarms, "MALFORMED", str(error), clock.seconds)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        return case_record(
            case,
            subject,
            profile,
            alarms,
            "CRASHED",
            message,
            clock.seconds,
            text=traceback.format_exc(),
        )
    groups = case.config.group_size if case.scope == "core" else 1
    alpha = alarms.per_case

    def predict(runs: int) -> Mapping[str, ErrorScale]:
        def compute() -> Mapping[str, ErrorScale]:
            return predicted(case, inputs, expected, profile, runs=runs)

        with clock.timing("error model"):
            if cache is None:
                return compute()
            return cache.scales(case, inputs, profile, runs, compute)

    def judge(outputs: Outputs, scales: Mapping[str, ErrorScale]) -> Judgement:
        return judge_outputs(
            outputs, expected.outputs, expected.rows, scales, alpha=alpha, group_size=groups
        )

    def judge_first(scales: Mapping[str, ErrorScale]) -> Judgement:
        with clock.timing("judge"):
            return judge(observed, scales).with_statistics(kept)

    judgement, scales = look(expected.outputs, predict, judge_first)
    compared = (expected.outputs, expected.rows, scales)
    vacuous = zeros_pass(*compared, alpha=alpha, group_size=groups)
    if exact_rules:
        with clock.timing("exact rules"):
            again = Subjected(
                call_of=lambda changed: call_of(case, changed),
                run=lambda call, changed: observe(_answer(subject, call), case, changed, expected)[
                    0
                ],
                conforms=lambda outputs: judge(outputs, scales).conforms,
                disclaims=subject.disclaims,
            )
            judgement = judgement.with_statistics(
                exact_statistics(case, inputs, observed, expected.rows, again)
            )
    verdict = "CONFORMS" if judgement.conforms else "DEVIATES"
    return case_record(
        case,
        subject,
        profile,
        alarms,
        verdict,
        judgement.reason,
        clock.seconds,
        judgement=judgement,
        vacuous=vacuous,
        exact_rules=exact_rules,
    )


def _answer(subject: Subject, call: Call) -> Any:
    return gradients_of(subject, call) if isinstance(call, GradientCall) else subject.function(call)


def predicted(
    case: Case, inputs: Inputs, expected: Reference, profile: PrecisionProfile, *, runs: int
) -> Mapping[str, ErrorScale]:
    """Predict the error scale of every output of a case, a long one from some of its rows."""
    seed = zlib.crc32(case.id.encode())
    if isinstance(inputs, GradientInputs):
        return predict_scale(
            expected.evaluate,
            expected.outputs,
            expected.rows,
            profile,
            seed=seed,
            runs=runs,
        )
    if isinstance(inputs, CoreInputs) and is_long(case, inputs, profile) and runs < MANY_RUNS:
        scales = predict_sampled(case, inputs, expected, profile, seed=seed)
        if scales is not None:
            return scales
    elif isinstance(inputs, CoreInputs):
        scales = predict_core(case, inputs, expected, profile, seed=seed, runs=runs)
        if scales is not None:
            return scales
    if isinstance(inputs, CoreInputs):
        expected = by_pieces(case, inputs, expected)
    return predict_scale(
        expected.evaluate,
        expected.outputs,
        expected.rows,
        profile,
        seed=seed,
        runs=runs,
        directions=directions(case, inputs, expected),
        # a kernel's rows round nothing in common but exp's error, a function of its argument
        independent_rows=case.scope == "core" and case.dtype != profile.accumulation,
        last={"output": "attn"} if case.scope == "core" else {},
    )
