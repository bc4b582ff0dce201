"""Few runs for a verdict, many before it condemns, most where it is close: one function for all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
import variants
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from conformance import looks, runner
from conformance.case_ids import parse
from conformance.error_model import MANY_RUNS, ErrorScale, _scale
from conformance.judge import Judgement, judge_outputs
from conformance.looks import ACQUITTABLE, LARGE, MOST_RUNS, look
from conformance.subjects import LayerCall, LayerOutput, load_subject
from golden import Array
from reports.records import Statistic


def taken(
    ratios: Mapping[int, float], *, size: int = 1 << 13, covariance: bool = False
) -> list[int]:
    """Return the runs asked for by a case whose worst figure is this share of its limit."""
    asked: list[int] = []
    scale = mock.Mock(spec=ErrorScale, covariance=object() if covariance else None)

    def predict(runs: int) -> Mapping[str, ErrorScale]:
        asked.append(runs)
        return {"output": scale}

    def judge(scales: Mapping[str, ErrorScale]) -> Judgement:
        found = ratios[asked[-1]]
        limit = 0.0 if math.isinf(found) else 1.0
        value = 1.0 if math.isinf(found) else found
        figure = Statistic(
            output="output", name="spread", value=value, limit=limit, derivation="given"
        )
        return Judgement((figure,), None)

    judgement, _ = look({"output": np.zeros(size)}, predict, judge)
    assert judgement.conforms == (ratios[asked[-1]] <= 1)
    return asked


def test_looks_go_on_while_more_runs_could_acquit() -> None:
    assert taken({8: 0.9}) == [8]
    assert taken({8: 9.0, 32: 0.9}) == [8, 32]
    assert taken({8: 9.0, 32: 1.04, 128: 0.86}) == [8, 32, 128]
    assert taken({8: 9.0, 32: 2.0, 128: 1.5}) == [8, 32, 128]
    assert taken({32: 1.04, 128: 0.86}, size=100) == [32, 128]


def test_clear_failures_cost_no_third_look() -> None:
    assert taken({8: 9.0, 32: 2.2}) == [8, 32]
    assert taken({8: math.inf, 32: math.inf}) == [8, 32]  # an exact row, or a slot touched
    assert taken({8: 1.1}, covariance=True) == [8]
    assert taken({8: 1.1, 32: 1.1}, size=LARGE) == [8, 32]


def test_bound_is_the_quantile_of_a_scale_known_from_many_numbers() -> None:
    assert chi2.cdf(MANY_RUNS / ACQUITTABLE**2, MANY_RUNS) == pytest.approx(1e-6, rel=1e-6)
    squares = np.square(np.random.default_rng(0).standard_normal((400_000, MANY_RUNS)))
    low = np.sqrt(1 / squares.mean(axis=1).min())
    assert 1.5 < low < ACQUITTABLE


ROWS, ALPHA = 400, 1e-2


def judged_by(runs: int, seed: int, planted: float = 0.0) -> Judgement:
    """Judge a draw of rows that one float32 sum near zero decides, by a scale of so many runs.

    Its error given its path is normal, and so is the size of the path: a product of normals.
    """
    rng = np.random.default_rng(seed)
    error: Array = np.zeros((MOST_RUNS + 2, ROWS, 2))
    error[..., 0] = rng.standard_normal((MOST_RUNS + 2, ROWS)) * rng.standard_normal(
        (MOST_RUNS + 2, ROWS)
    )
    error[-1, 0, 0] += planted
    rows, exact = {"output": np.ones(ROWS, dtype=np.bool_)}, {"output": np.zeros((ROWS, 2))}
    drawn = np.concatenate([error[:runs], error[-2:-1]])
    scales = {"output": _scale(drawn, exact["output"], rows["output"])}
    return judge_outputs({"output": error[-1]}, exact, rows, scales, alpha=ALPHA)


def after_all_looks(seed: int, planted: float = 0.0) -> Judgement:
    asked: list[int] = []

    def predict(runs: int) -> Mapping[str, ErrorScale]:
        asked.append(runs)
        return {"output": mock.Mock(spec=ErrorScale, covariance=None)}

    found, _ = look(
        {"output": np.zeros((ROWS, 2))}, predict, lambda _: judged_by(asked[-1], seed, planted)
    )
    return found


@pytest.mark.parametrize("seed", [1, 391, 553])
def test_a_correct_draw_that_32_runs_condemn_conforms(seed: int) -> None:
    # the three of seeds 0 to 699 that 32 runs condemn
    assert not judged_by(MANY_RUNS, seed).conforms
    assert after_all_looks(seed).conforms


def element_limit(seed: int) -> float:
    """Return the limit on an element of deviation 1 by the finest scale."""
    found = judged_by(MOST_RUNS, seed).statistics
    # half of an element's variance is its row's, which the silent element halves
    return math.sqrt(0.75) * next(s.limit for s in found if s.name == "magnitude")


@settings(max_examples=8, deadline=None, derandomize=True, database=None, phases=(Phase.generate,))
@given(seed=st.integers(1000, 10**6))
def test_heavy_tails_conform_and_an_error_near_the_limit_is_still_condemned(seed: int) -> None:
    assert after_all_looks(seed).conforms
    # a product of normals has squares of kurtosis 9, so 128 of them know a variance to
    # sqrt(8 / 128) = 0.25: at 3.7 of that a scale is 1.39 too high; the rest is for the correct
    # error of the same element
    near = 1.65 * element_limit(seed)
    assert not judged_by(MANY_RUNS, seed, near).conforms
    assert not after_all_looks(seed, near).conforms


def test_planted_scale_just_beyond_what_a_case_can_tell_is_condemned_after_a_third_look() -> None:
    torch.set_num_threads(1)
    case = parse("h128-hq4-hkv2-d32/cte-bf16-b1-q31-gaussian-seed0")
    subject = load_subject("impl")
    asked: list[int] = []
    prediction = runner.predicted

    def counted(*args: object, runs: int) -> Mapping[str, ErrorScale]:
        asked.append(runs)
        return prediction(*args, runs=runs)  # type: ignore[arg-type]

    with variants.shared_work(), mock.patch.object(runner, "predicted", counted):
        with mock.patch.object(looks, "fewest_runs", return_value=MOST_RUNS):
            right = runner.judge_case(case, subject)
        assert right.verdict == "CONFORMS"
        off = 1.0 + 1.5 * right.power["softmax scale [%]"] / 100

        def scaled(call: LayerCall) -> LayerOutput:
            config = replace(call.config, softmax_scale=call.config.softmax_scale * off)
            result: LayerOutput = subject.function(replace(call, config=config))
            return result

        record = runner.judge_case(case, replace(subject, function=scaled))
    assert record.verdict == "DEVIATES"
    assert 1 < record.worst_ratio <= ACQUITTABLE
    assert asked[-2:] == [MANY_RUNS, MOST_RUNS]  # a small output
