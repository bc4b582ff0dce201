"""Which known defects a case would not reject: it is vacuous for them.

Every defect of the catalogue that applies to a case runs on its inputs and is judged, in the
`flash` profile that all of them keep to but for the bug itself. One that computes what the correct
kernel does, such as a window of one more where no row outgrows it, is missed as well.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from conformance.cases import Case
from conformance.defects import DEFECTS, Defect, Kernel, problem_of
from conformance.errors import UsageError
from conformance.judge import FALSE_ALARM_RATE
from conformance.variants.judged import prepare

PROFILE = "flash"
"""What the defects' kernels claim."""
SAME = "computes the same bits as the correct kernel here"


def judged_defects(case: Case, *, alpha: float = FALSE_ALARM_RATE) -> Iterator[tuple[Defect, str]]:
    """Yield every defect that applies to a case, with why it would pass, empty if it would not.

    Args:
        case: of scope `core`, as the catalogue's kernels are, and forward.
        alpha: chance that a correct subject fails the case, by which its limits are drawn.

    Raises:
        UsageError: the case is another.
    """
    if not _runs_on(case):
        raise UsageError(
            "case must be of scope 'core' and not backward to run known defects on it, got "
            f"{case.id}; its id starts with core-"
        )
    one = prepare(case)
    problem = problem_of(case, one.inputs)
    right = one.used(Kernel()(problem))
    for defect in DEFECTS:
        if not defect.applies(case):
            continue
        output = defect.run(problem)
        used = one.used(output)
        if np.array_equal(used, right):
            yield defect, SAME
        elif not np.isfinite(used).all():
            yield defect, ""
        else:
            judgement = one.judge(output, PROFILE, alpha=alpha)
            worst = max(statistic.ratio for statistic in judgement.statistics)
            yield defect, f"within every limit, at most {worst:.2f}" if judgement.conforms else ""


def undetected(case: Case, *, alpha: float = FALSE_ALARM_RATE) -> dict[str, str]:
    """Return the defects that a case is vacuous for, by id, with why; none where none can run."""
    if not _runs_on(case):
        return {}
    return {defect.id: why for defect, why in judged_defects(case, alpha=alpha) if why}


def _runs_on(case: Case) -> bool:
    return case.scope == "core" and not case.workload.backward
