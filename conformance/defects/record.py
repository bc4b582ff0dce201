"""What a known bug is: a rewrite of a correct kernel, where it comes from, and where it shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from conformance.cases import Case
from conformance.defects.kernel import Kernel
from conformance.defects.problem import Problem, Values


def always(case: Case) -> bool:
    """Hold for every case."""
    return True


@dataclass(frozen=True, kw_only=True, slots=True)
class Defect:
    """A bug that attention code has had.

    Attributes:
        id: short name.
        title: what the kernel does wrong, one sentence.
        source: public thread or commit that reported it, or one of its class.
        run: the wrong kernel.
        applies: whether a case has what the bug needs; on other cases it computes the truth.
        rounding: whether the bug is one of rounding, so that in float64 it computes the truth.
    """

    id: str
    title: str
    source: str
    run: Callable[[Problem], Values]
    applies: Callable[[Case], bool] = always
    rounding: bool = False


def changed(change: Callable[[Problem], Problem]) -> Callable[[Problem], Values]:
    """Return a correct kernel that is given the wrong problem."""

    def run(problem: Problem) -> Values:
        return Kernel()(change(problem))

    return run
