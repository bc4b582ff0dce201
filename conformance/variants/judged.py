"""One case of the attention core set up once, so that many kernels can be judged on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from conformance.calls import call_of
from conformance.cases import Case
from conformance.error_model import ErrorScale
from conformance.expected import Reference, reference
from conformance.inputs import CoreInputs, draw_core
from conformance.judge import FALSE_ALARM_RATE, Judgement, judge_outputs
from conformance.looks import look
from conformance.precision import profile_named
from conformance.runner import predicted
from conformance.subjects.base import CoreCall, Subject
from golden import Array


@dataclass(slots=True, eq=False)
class JudgedCase:
    """A case with what depends on it alone.

    Attributes:
        case: of scope `core`.
        inputs: its arrays.
        expected: golden's answer.
        scales: predicted errors by profile name and Monte Carlo runs, made as they are asked for.
    """

    case: Case
    inputs: CoreInputs
    expected: Reference
    scales: dict[tuple[str, int], Mapping[str, ErrorScale]] = field(default_factory=dict)

    @property
    def golden(self) -> Array:
        """Exact output, `(batch, num_attention_heads, q_len, head_dim)`, float64."""
        return self.expected.outputs["output"]

    def call(self) -> CoreCall:
        """Return fresh arguments for a kernel in torch."""
        call = call_of(self.case, self.inputs)
        assert isinstance(call, CoreCall)
        return call

    def output_of(self, subject: Subject) -> Array:
        """Run a kernel in torch and return its output in float64."""
        output: torch.Tensor = subject.function(self.call())
        return np.asarray(output.detach().to(torch.float64).numpy())

    def scale(self, profile: str, runs: int) -> Mapping[str, ErrorScale]:
        """Return the predicted errors under a profile, as `conformance.runner` predicts them."""
        key = (profile, runs)
        if key not in self.scales:
            claimed = profile_named(profile, self.case.dtype)
            self.scales[key] = predicted(self.case, self.inputs, self.expected, claimed, runs=runs)
        return self.scales[key]

    def judge(self, output: Array, profile: str, *, alpha: float = FALSE_ALARM_RATE) -> Judgement:
        """Judge an output under a profile, with more runs before finding anything wrong."""
        return look(
            self.expected.outputs,
            lambda runs: self.scale(profile, runs),
            lambda scales: judge_outputs(
                {"output": output},
                self.expected.outputs,
                self.expected.rows,
                scales,
                alpha=alpha,
                group_size=self.case.config.group_size,
            ),
        )[0]

    def used(self, output: Array) -> Array:
        """Return the rows that are no padding, `(rows, head_dim)`."""
        rows: Array = output[self.expected.rows["output"]]
        return rows


def prepare(case: Case) -> JudgedCase:
    """Draw a case's inputs and run golden on them."""
    inputs = draw_core(case)
    return JudgedCase(case, inputs, reference(case, inputs))
