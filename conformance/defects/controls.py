"""Rewrites that look like bugs and are none: no judge may flag them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from conformance.cases import Case
from conformance.defects.kernel import Kernel, Partial, exp
from conformance.defects.problem import Problem, Values
from conformance.defects.record import Defect, changed


class _SigmoidSink(Kernel):
    def finished(self, problem: Problem, whole: Partial) -> Values:
        assert problem.sinks is not None
        output = super().finished(replace(problem, sinks=None), whole)
        with np.errstate(divide="ignore"):
            above = np.log(whole.total) + whole.top - problem.sinks
        # written so that nothing overflows where the sink takes nearly everything
        kept: Values = output * exp(np.minimum(above, 0)) / (1 + exp(-np.abs(above)))
        return kept


def _key_bias(problem: Problem) -> Problem:
    bias = problem.rng().standard_normal((1, problem.k.shape[1], 1, problem.k.shape[3])) / 4
    return replace(problem, k=problem.k + bias.astype(problem.k.dtype))


def _sunk(case: Case) -> bool:
    return case.config.learned_sinks_size is not None


def _shift_cancels(case: Case) -> bool:
    return not _sunk(case) and case.config.softcap is None


CONTROLS = (
    Defect(
        id="plain",
        title="The kernel that the defects are rewrites of.",
        source="control",
        run=Kernel(),
    ),
    Defect(
        id="sigmoid-sink",
        title="The sink as a factor sigmoid(lse - sink), which equals its term in the sum.",
        source="pytorch/torchtitan#2211",
        run=_SigmoidSink(),
        applies=_sunk,
    ),
    Defect(
        id="key-bias",
        title="A bias of the keys without RoPE shifts a row's scores alike and cancels.",
        source="control",
        run=changed(_key_bias),
        applies=_shift_cancels,
    ),
)
"""Equivalent rewrites."""
