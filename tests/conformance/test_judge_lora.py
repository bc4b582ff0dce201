"""A wrong factor on what adapters add is found, named and sized; the right one is not flagged."""

from __future__ import annotations

import pytest

from conformance.case_ids import parse
from conformance.error_model import FEW_RUNS
from conformance.expected import reference
from conformance.judge import judge_outputs
from conformance.precision import profile_named
from conformance.runner import inputs_of, predicted
from golden import Accumulation, Array

CASE = "h128-hq4-hkv2-d32-lora2_4/cte-bf16-b2-q40-gaussian-seed0"


def test_a_wrong_lora_scale_is_found_and_sized() -> None:
    case = parse(CASE)
    inputs = inputs_of(case)
    expected = reference(case, inputs)
    scales = predicted(case, inputs, expected, profile_named("native", case.dtype), runs=FEW_RUNS)
    grown = 1.2

    def scaled(stage: str, value: Array, accumulation: Accumulation | None = None, /) -> Array:
        return value * grown if stage.endswith("_lora") else value

    wrong = judge_outputs(
        expected.evaluate(observe=scaled), expected.outputs, expected.rows, scales
    )
    found = [s for s in wrong.statistics if s.name == "score: LoRA scale" and s.ratio > 1]
    assert found
    for statistic in found:
        estimate = float(statistic.derivation.split("off by ")[1].split("%")[0])
        assert estimate == pytest.approx(20.0, rel=0.2)  # of a factor that also enters scores
    right = judge_outputs(expected.outputs, expected.outputs, expected.rows, scales)
    assert right.conforms
    assert any(name.startswith("LoRA scale") for name in right.power)
