"""Judges one subject on one case, from inputs to record."""

from __future__ import annotations

import shlex
import time
import traceback
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

import golden
from conformance.cases import PHASE_NAMES, Case
from conformance.directions import directions
from conformance.error_model import (
    MANY_RUNS,
    ErrorScale,
    Outputs,
    fewest_runs,
    predict_scale,
)
from conformance.exact_rules import Subjected, exact_statistics
from conformance.expected import Inputs, Reference, kept_slots, reference, written
from conformance.false_alarms import STANDARD, FalseAlarms
from conformance.inputs import CoreInputs, LayerInputs, draw_core, draw_layer
from conformance.judge import Judgement, judge_outputs, zeros_pass
from conformance.precision import PrecisionProfile, profile_named
from conformance.real_models import real_layer_inputs
from conformance.sampled_rows import is_long, predict_sampled
from conformance.subjects.base import CoreCall, LayerCall, LayerOutput, Subject, Unsupported
from golden import Array
from reports.records import CaseRecord, Statistic


class Malformed(Exception):
    """A subject's output has the wrong shape, dtype or holds NaN or infinity."""


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
    return draw_core(case) if case.scope == "core" else draw_layer(case)


def judge_case(
    case: Case, subject: Subject, *, alarms: FalseAlarms = STANDARD, exact_rules: bool = False
) -> CaseRecord:
    """Judge a subject on a case.

    Args:
        case: what to judge it on.
        subject: what to judge.
        alarms: chance of a false alarm, and the number of cases that share it.
        exact_rules: whether to call the subject again with changes that must change no bit.

    Returns:
        The record; a failure of the subject, even a crash, is a verdict and not an exception.

    Raises:
        UsageError: the case's inputs cannot be had here.
    """
    profile = profile_named(subject.profile, case.dtype)
    reason = subject.unsupported(case)
    if subject.scope != case.scope:
        reason = f"{subject.name} takes cases of scope {subject.scope!r}, this is {case.scope!r}"
    if reason is not None:
        return _record(case, subject, profile, alarms, "UNSUPPORTED", reason, {})
    clock = _Clock()
    with clock.timing("golden"):
        inputs = inputs_of(case)
        expected = reference(case, inputs)
    try:
        with clock.timing("subject"):
            returned = subject.function(call_of(case, inputs))
        observed, kept = _observe(returned, case, inputs, expected)
        _check_finite(observed, expected)
    except Unsupported as error:
        return _record(case, subject, profile, alarms, "UNSUPPORTED", str(error), clock.seconds)
    except Malformed as error:
        return _record(case, subject, profile, alarms, "MALFORMED", str(error), clock.seconds)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        return _record(
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
    alpha, runs = alarms.per_case, fewest_runs(expected.outputs)
    while True:
        with clock.timing("error model"):
            scales = predicted(case, inputs, expected, profile, runs=runs)
        with clock.timing("judge"):
            compared = (expected.outputs, expected.rows, scales)
            judgement = judge_outputs(
                observed, *compared, alpha=alpha, group_size=groups, extra=kept
            )
        if judgement.conforms or runs == MANY_RUNS:
            break
        # few runs may know a row's error scale too little; a finding takes many
        runs = MANY_RUNS
    vacuous = zeros_pass(*compared, alpha=alpha, group_size=groups)
    if exact_rules:
        with clock.timing("exact rules"):
            again = Subjected(
                call_of=lambda changed: call_of(case, changed),
                run=lambda call, changed: _observe(subject.function(call), case, changed, expected)[
                    0
                ],
                conforms=lambda outputs: (
                    judge_outputs(outputs, *compared, alpha=alpha, group_size=groups).conforms
                ),
                disclaims=subject.disclaims,
            )
            judgement = judgement.with_statistics(
                exact_statistics(case, inputs, observed, expected.rows, again)
            )
    verdict = "CONFORMS" if judgement.conforms else "DEVIATES"
    return _record(
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


def predicted(
    case: Case, inputs: Inputs, expected: Reference, profile: PrecisionProfile, *, runs: int
) -> Mapping[str, ErrorScale]:
    """Predict the error scale of every output of a case, a long one from some of its rows."""
    seed = zlib.crc32(case.id.encode())
    if isinstance(inputs, CoreInputs) and is_long(case, inputs, profile) and runs < MANY_RUNS:
        scales = predict_sampled(case, inputs, expected, profile, seed=seed)
        if scales is not None:
            return scales
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
    )


def call_of(case: Case, inputs: Inputs) -> CoreCall | LayerCall:
    """Return what a subject is called with: the case's inputs as tensors of its dtype."""
    dtype = getattr(torch, case.dtype)

    def tensor(array: Array) -> torch.Tensor:
        return torch.from_numpy(np.array(array)).to(dtype)

    if isinstance(inputs, CoreInputs):
        visible = golden.visible_keys(
            golden.layer_mask(case.config), inputs.q_positions, inputs.kv_positions
        )
        return CoreCall(
            q=tensor(inputs.q),
            k=tensor(inputs.k),
            v=tensor(inputs.v),
            mask=torch.from_numpy(np.array(visible)),
            q_positions=torch.from_numpy(inputs.q_positions.copy()),
            kv_positions=torch.from_numpy(inputs.kv_positions.copy()),
            softmax_scale=case.config.softmax_scale,
            softcap=case.config.softcap,
            sinks=None if inputs.sinks is None else tensor(inputs.sinks),
            sliding_window=case.config.sliding_window,
            attention_chunk_size=case.config.attention_chunk_size,
        )
    names = golden.weight_shapes(case.config)
    lengths = inputs.cache_lengths
    return LayerCall(
        config=case.config,
        weights={name: tensor(getattr(inputs.weights, name)) for name in names},
        hidden_states=tensor(inputs.hidden_states),
        position_ids=torch.from_numpy(inputs.position_ids.copy()),
        k_cache=None if inputs.k_cache is None else tensor(inputs.k_cache),
        v_cache=None if inputs.v_cache is None else tensor(inputs.v_cache),
        cache_lengths=None if lengths is None else torch.from_numpy(lengths.copy()),
    )


def _observe(
    returned: Any, case: Case, inputs: Inputs, expected: Reference
) -> tuple[Outputs, tuple[Statistic, ...]]:
    """Turn what a subject returned into float64 arrays, refusing wrong shapes and dtypes."""
    wanted = {name: values.shape for name, values in expected.outputs.items()}
    if isinstance(inputs, CoreInputs):
        output = _array("output", returned, wanted["output"], case.dtype)
        return {"output": output}, ()
    if not isinstance(returned, LayerOutput):
        raise Malformed(f"a layer must return a LayerOutput, got {type(returned).__name__}")
    observed = {"output": _array("output", returned.output, wanted["output"], case.dtype)}
    kept: tuple[Statistic, ...] = ()
    if inputs.k_cache is None:
        observed["k_cache"] = _array("k_cache", returned.k_cache, wanted["k_cache"], case.dtype)
        observed["v_cache"] = _array("v_cache", returned.v_cache, wanted["v_cache"], case.dtype)
    else:
        k = _array("k_cache", returned.k_cache, inputs.k_cache.shape, case.dtype)
        v = _array("v_cache", returned.v_cache, inputs.k_cache.shape, case.dtype)
        observed["k_cache"] = written(k, inputs.position_ids)
        observed["v_cache"] = written(v, inputs.position_ids)
        kept = _kept(k, v, inputs)
    return observed, kept


def _array(name: str, value: Any, shape: tuple[int, ...], dtype: str) -> Array:
    if not isinstance(value, torch.Tensor):
        raise Malformed(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if tuple(value.shape) != shape:
        raise Malformed(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    if value.dtype != getattr(torch, dtype):
        raise Malformed(f"{name} must have dtype {dtype}, got {str(value.dtype)[6:]}")
    array: Array = value.detach().to("cpu", torch.float64).numpy()
    return array


def _check_finite(observed: Outputs, expected: Reference) -> None:
    for name, values in observed.items():
        bad = ~np.isfinite(values) & expected.rows[name][..., None]
        if bad.any():
            index = tuple(int(i) for i in np.argwhere(bad)[0])
            raise Malformed(
                f"{name}{list(index)} is {values[index]}, golden has "
                f"{expected.outputs[name][index]:.4g}; {np.count_nonzero(bad)} of {values.size} "
                "values are not finite"
            )


def _kept(k: Array, v: Array, inputs: LayerInputs) -> tuple[Statistic, ...]:
    """Count slots that token generation changed without having a token to put there."""
    slots = kept_slots(inputs)
    found = []
    for name, now, before in (("k_cache", k, inputs.k_cache), ("v_cache", v, inputs.v_cache)):
        changed = ((now != before).any(axis=-1)) & slots[:, None]
        found.append(
            Statistic(
                output=name,
                name="slots left alone",
                value=float(np.count_nonzero(changed)),
                limit=0.0,
                derivation="slots of tokens not generated here keep their bits",
                where=tuple(int(i) for i in np.argwhere(changed)[0]) if changed.any() else (),
            )
        )
    return tuple(found)


def reproduce_command(
    case: Case, subject: Subject, alarms: FalseAlarms, exact_rules: bool = False
) -> str:
    """Return the command that judges this case again, by the same limits."""
    words = ["attn-conformance", "run", "--subject", subject.name, "--case", case.id]
    words += ["--profile", subject.profile, *alarms.options()]
    return shlex.join([*words, *(("--exact-rules", "on") if exact_rules else ())])


def _record(
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
    return CaseRecord(
        case_id=case.id,
        suite=case.suite,
        # a synthetic layer with two features is a row of its own, so a red row names the culprit
        features=case.features if case.model else (" + ".join(case.features),),
        model=case.model,
        layer=case.layer,
        phase=PHASE_NAMES[case.workload.phase],
        dtype=case.dtype,
        regime=case.regime,
        seed=case.seed,
        config=asdict(case.config),
        workload={**asdict(case.workload), "lengths": list(case.workload.lengths)},
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
