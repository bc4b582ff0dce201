"""Runs every kernel, right and wrong, on one case and asks every rule about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from conformance.benchmarks.rules_peers import PEERS
from conformance.benchmarks.rules_record import Trial
from conformance.cases import Case
from conformance.defects import CONTROLS, DEFECTS, Defect, Kernel, problem_of
from conformance.variants import VARIANTS
from conformance.variants.judged import JudgedCase, prepare
from golden import Array

OURS = "this judge"
"""Name of our own rule in tables."""

_ROUNDOFF = 2.0**-40
"""Share of the largest value that two float64 evaluations of one formula may differ by."""

Kind = Literal["correct", "defect", "invisible"]


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What the rules say about one kernel on one case.

    Attributes:
        case_id: the case.
        dtype: of its tensors.
        kernel: name of a correct kernel, or id of a defect.
        kind: `invisible` is a defect that changes nothing on this case; see `Unchanged`.
        accepted: by rule.
    """

    case_id: str
    dtype: str
    kernel: str
    kind: Kind
    accepted: dict[str, bool]


def verdicts_on(case: Case) -> list[Verdicts]:
    """Run all kernels that support a case, and all defects that apply to it."""
    torch.set_num_threads(1)
    judged = prepare(case)
    baseline = judged.used(judged.output_of(VARIANTS["eager"].subject))
    return [
        Verdicts(
            case_id=case.id,
            dtype=case.dtype,
            kernel=name,
            kind=kind,
            accepted=_accepted(judged, output, profile, baseline),
        )
        for name, kind, output, profile in _outputs(judged)
    ]


def _outputs(judged: JudgedCase) -> Iterator[tuple[str, Kind, Array, str]]:
    """Yield name, kind, output and claimed profile of every kernel."""
    case = judged.case
    for name, variant in VARIANTS.items():
        subject = variant.subject
        if not variant.slow and subject.unsupported(case) is None:
            yield name, "correct", judged.output_of(subject), subject.profile
    problem = problem_of(case, judged.inputs)
    for control in CONTROLS:
        if control.applies(case):
            yield control.id, "correct", control.run(problem), "flash"
    unchanged = Unchanged(judged)
    for defect in DEFECTS:
        if defect.applies(case):
            output = defect.run(problem)
            kind: Kind = "defect" if unchanged.differs_from(defect, output) else "invisible"
            yield defect.id, kind, output, "flash"


class Unchanged:
    """The correct kernel on a case, as stored and exact, that defects are told from."""

    def __init__(self, judged: JudgedCase) -> None:
        self._judged = judged
        self._exact_problem = problem_of(judged.case, judged.inputs, dtype="float64")
        self._stored = judged.used(Kernel()(problem_of(judged.case, judged.inputs)))
        self._exact = judged.used(Kernel()(self._exact_problem))
        self._roundoff = _ROUNDOFF * np.abs(judged.used(judged.golden)).max()

    def differs_from(self, defect: Defect, output: Array) -> bool:
        """Tell whether a defect computes anything else than the correct kernel.

        A bug of rounding must change a bit of the stored output. Any other must do so too, and
        move the exact result by more than float64's own roundoff: a bug that only sums in another
        order on this case is none there.

        Args:
            defect: the bug.
            output: what it stored.
        """
        if np.array_equal(self._judged.used(output), self._stored):
            return False
        if defect.rounding:
            return True
        moved = np.abs(self._judged.used(defect.run(self._exact_problem)) - self._exact)
        return bool((moved > self._roundoff).any())


def _accepted(judged: JudgedCase, output: Array, profile: str, baseline: Array) -> dict[str, bool]:
    trial = Trial(
        output=judged.used(output),
        golden=judged.used(judged.golden),
        baseline=baseline,
        dtype=judged.case.dtype,
        softcapped=judged.case.config.softcap is not None,
    )
    accepted = {rule.name: bool(rule.accepts(trial)) for rule in PEERS}
    finite = bool(np.isfinite(trial.output).all())
    accepted[OURS] = finite and judged.judge(output, profile).conforms
    return accepted
