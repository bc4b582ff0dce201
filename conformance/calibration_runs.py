"""Runs all correct kernels on one calibration case and keeps what the judge measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from conformance.calibration_cases import calibration_case, runs_compiled
from conformance.defects import CONTROLS, problem_of
from conformance.variants import HALF, VARIANTS
from conformance.variants.judged import JudgedCase, prepare
from golden import Array


@dataclass(frozen=True, slots=True)
class Run:
    """One correct kernel on one case.

    Attributes:
        index: of the case.
        case_id: the case.
        dtype: of its tensors.
        regime: how its inputs are drawn.
        phase: `cte` or `tkg`.
        kernel: name of the kernel.
        profile: what it claims.
        matches: whether it rounds and sums just as the profile says.
        conforms: the verdict.
        reason: of a false alarm.
        statistics: name, value and limit of every figure of the judge.
    """

    index: int
    case_id: str
    dtype: str
    regime: str
    phase: str
    kernel: str
    profile: str
    matches: bool
    conforms: bool
    reason: str
    statistics: tuple[tuple[str, float, float], ...]


def runs_of(index: int) -> list[Run]:
    """Run every correct kernel that supports the case of an index."""
    torch.set_num_threads(1)
    judged = prepare(calibration_case(index))
    found = []
    for name, variant in VARIANTS.items():
        subject = variant.subject
        if subject.unsupported(judged.case) is None and (not variant.slow or runs_compiled(index)):
            output = judged.output_of(subject)
            matches = judged.case.dtype in variant.matches
            found.append(_run(index, judged, name, subject.profile, matches, output))
    problem = problem_of(judged.case, judged.inputs)
    for control in CONTROLS:
        if control.applies(judged.case):
            name = f"NumPy flash, {control.id}"
            matches = judged.case.dtype in HALF
            found.append(_run(index, judged, name, "flash", matches, control.run(problem)))
    return found


def _run(
    index: int, judged: JudgedCase, name: str, profile: str, matches: bool, output: Array
) -> Run:
    judgement = judged.judge(output, profile)
    case = judged.case
    return Run(
        index=index,
        case_id=case.id,
        dtype=case.dtype,
        regime=case.regime,
        phase=case.workload.phase,
        kernel=name,
        profile=profile,
        matches=matches,
        conforms=judgement.conforms,
        reason=judgement.reason,
        statistics=tuple((s.name, s.value, s.limit) for s in judgement.statistics),
    )


def append_runs(path: Path, runs: Iterable[Run]) -> None:
    """Append runs to a JSON Lines file."""
    with path.open("a", encoding="utf-8") as lines:
        lines.writelines(json.dumps(asdict(run)) + "\n" for run in runs)


def read_runs(path: Path) -> list[Run]:
    """Read the runs of a file, none if there is no file; a line cut short is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            fields = json.loads(line)
        except json.JSONDecodeError:
            continue
        fields["statistics"] = tuple(map(tuple, fields["statistics"]))
        found.append(Run(**fields))
    return found
