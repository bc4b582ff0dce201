"""The judge in three lines, for tests and notebooks.

```python
from conformance import assert_conforms

assert_conforms(my_kernel, "core-h256-hq8-hkv2-d32/cte-bf16-b2-q97-gaussian-seed0", profile="flash")
```

A kernel is a function of a `CoreCall` that returns the attention output, of a `LayerCall` that
returns a `LayerOutput`, or of a `ServeCall` that returns a `ServeOutput`. `judge_output` judges an
output computed before, or elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch

from conformance.calls import Call, call_of
from conformance.case_ids import parse
from conformance.cases import Case
from conformance.errors import UsageError
from conformance.false_alarms import STANDARD, FalseAlarms
from conformance.runner import inputs_of, judge_case
from conformance.scale_cache import cache_in
from conformance.subjects.base import AUTOGRAD, LayerOutput, Subject
from conformance.subjects.serving import ServeOutput
from reports.records import CaseRecord, Statistic

Kernel = Callable[[Any], Any]

_SHOWN = 5
"""Statistics beyond their limit that an error text lists."""


class Deviation(AssertionError):
    """A kernel does not conform; its text says where, by how much, and how to see it again.

    Attributes:
        record: everything measured.
    """

    def __init__(self, record: CaseRecord) -> None:
        super().__init__(explain(record))
        self.record = record


def assert_conforms(
    kernel: Kernel | Subject,
    case: Case | str,
    *,
    profile: str | None = None,
    alarms: FalseAlarms = STANDARD,
    exact_rules: bool = False,
) -> CaseRecord:
    """Raise unless a kernel computes what golden defines, to the precision it claims.

    Args:
        kernel: a function of a `CoreCall`, `LayerCall` or `ServeCall`, as the case asks for, or a
            subject.
        case: the case, or its id.
        profile: precision it claims; None takes what its decorator `subject` says, else `eager`.
        alarms: chance of a false alarm, and the number of cases that share it.
        exact_rules: whether to call it again with changes that must change no bit.

    Returns:
        The record of what was measured.

    Raises:
        Deviation: it does not conform, or fails in another way.
        UsageError: there is no such case or profile, or the kernel does not claim the case.
    """
    case = parse(case) if isinstance(case, str) else case
    subject = _subject(kernel, case, profile)
    record = judge_case(case, subject, alarms=alarms, exact_rules=exact_rules, cache=cache_in(None))
    if record.verdict == "UNSUPPORTED":
        raise UsageError(f"{subject.name} does not claim {case.id}: {record.reason}")
    if record.failed:
        raise Deviation(record)
    return record


def judge_output(
    observed: torch.Tensor | LayerOutput | ServeOutput | Mapping[str, torch.Tensor],
    case: Case | str,
    *,
    profile: str,
    alarms: FalseAlarms = STANDARD,
) -> CaseRecord:
    """Judge what was computed before from a case's inputs (`case_inputs`).

    Args:
        observed: the attention output; a `LayerOutput` for a case of scope `layer`, a
            `ServeOutput` for one with a schedule; the gradients of a backward case by the name of
            what they are of.
        case: the case, or its id.
        profile: precision claimed.
        alarms: chance of a false alarm, and the number of cases that share it.
    """
    case = parse(case) if isinstance(case, str) else case
    subject = Subject(
        name="output",
        function=lambda call: observed,
        scope=case.scope,
        profile=profile,
        serves=case.scope == "layer",
        # whatever it is: what are no gradients by name is malformed
        backward=(lambda *_: cast(Any, observed)) if case.workload.backward else None,
    )
    return judge_case(case, subject, alarms=alarms, cache=cache_in(None))


def case_inputs(case: Case | str) -> Call:
    """Return the tensors a kernel gets in a case, given itself or by id."""
    case = parse(case) if isinstance(case, str) else case
    return call_of(case, inputs_of(case))


def explain(record: CaseRecord) -> str:
    """Return a record as text for a terminal: verdict, excesses, where, how to reproduce."""
    lines = [f"{record.subject} {record.verdict} {record.case_id}", f"  {record.reason}"]
    excesses = sorted((s for s in record.statistics if s.ratio > 1), key=lambda s: -s.ratio)
    lines += [f"  {_line(statistic)}" for statistic in excesses[:_SHOWN]]
    if len(excesses) > _SHOWN:
        lines.append(f"  and {len(excesses) - _SHOWN} more statistics beyond their limits")
    worst = record.worst
    if worst is not None:
        lines.append(
            f"  worst element {worst.output}{list(worst.index)}: got {worst.observed:.6g}, golden "
            f"{worst.expected:.6g}, error {worst.error:.2g} = {worst.z:.1f} sigma"
        )
    for output in record.vacuous:
        lines.append(f"  {output}: vacuous, zeros would pass too")
    lines.append(f"  profile {record.profile}; seed {record.seed}")
    lines.append(f"  reproduce: {record.reproduce}")
    return "\n".join(lines)


def _line(statistic: Statistic) -> str:
    place = f" at {list(statistic.where)}" if statistic.where else ""
    estimate = ""
    if statistic.name.startswith(("score: ", "exact: ")):
        estimate = f"; {statistic.derivation.partition(',')[0]}"
    return (
        f"{statistic.output}: {statistic.name} {statistic.value:.3g}, limit {statistic.limit:.3g}"
        f"{place}{estimate}"
    )


def _subject(kernel: Kernel | Subject, case: Case, profile: str | None) -> Subject:
    if isinstance(kernel, Subject):
        return kernel if profile is None else replace(kernel, profile=profile)
    claims: dict[str, Any] = {"scope": case.scope, "serves": case.scope == "layer"}
    claims["backward"] = AUTOGRAD if case.workload.backward else None
    claims |= getattr(kernel, "__conformance__", {})
    if profile is not None:
        claims["profile"] = profile
    return Subject(name=_name(kernel), function=kernel, **claims)


def _name(kernel: Kernel) -> str:
    """Return `module:name` of a function that the command can import, else its name alone."""
    name = getattr(kernel, "__qualname__", type(kernel).__name__)
    module = getattr(kernel, "__module__", "__main__")
    importable = module != "__main__" and "<" not in name
    return f"{module}:{name}" if importable else name
