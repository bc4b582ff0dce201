"""Long cases: sampled rows give what all rows give, and find what they should."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
import variants
from torch import Tensor

from conformance import runner, sampled_rows
from conformance.cases import Case, Workload
from conformance.error_model import FEW_RUNS
from conformance.expected import reference
from conformance.inputs import draw_core
from conformance.precision import profile_named
from conformance.runner import judge_case, predicted
from conformance.subjects import CoreCall, Subject
from conformance.variants import dense, streamed
from golden import AttentionConfig

CASE = Case(
    config=AttentionConfig(
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        learned_sinks_size=1,
        softcap=30.0,
    ),
    workload=Workload(phase="cte", lengths=(640, 500)),
    dtype="bfloat16",
    scope="core",
)
FLASH = variants.CORES["flash, tile 64"].function


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_sampled_rows_predict_what_all_rows_predict() -> None:
    inputs, claims = draw_core(CASE), profile_named("flash", "bfloat16")
    expected = reference(CASE, inputs)
    with mock.patch.object(runner, "predict_core", return_value=None):  # sizes, no covariances
        long_way = predicted(CASE, inputs, expected, claims, runs=FEW_RUNS)["output"]
    with mock.patch.object(sampled_rows, "LONG", 1):
        short_way = predicted(CASE, inputs, expected, claims, runs=FEW_RUNS)["output"]
    assert long_way.sampled is None
    assert short_way.sampled is not None
    rows = expected.rows["output"]
    ratio = np.square(long_way.row_sigma[rows]) / np.square(short_way.row_sigma[rows]).clip(1e-300)
    assert ratio.mean() == pytest.approx(1, abs=sampled_rows.AGREEMENT)
    tests = {test.name: test for test in short_way.score_tests}
    assert tests.keys() == {test.name for test in long_way.score_tests}
    for test in long_way.score_tests:
        assert tests[test.name].norm == pytest.approx(test.norm, rel=0.1)
        # each spread is known to its degrees of freedom, here a dozen at the least
        assert 1 / 2 < tests[test.name].spread / test.spread < 2


def scaled(call: CoreCall) -> Tensor:
    return FLASH(replace(call, softmax_scale=call.softmax_scale * 1.0003))


def last_key_lost(call: CoreCall) -> Tensor:
    """Forget the last key of a single row, which no Monte Carlo run evaluates."""
    mask = call.mask.clone()
    mask[0, 0, 100, 100] = False
    return FLASH(replace(call, mask=mask))


def test_long_case_passes_correct_kernels_and_fails_wrong_ones() -> None:
    kernels = {
        **{f"tile {tile}": streamed.flash(tile) for tile in (32, 128, 512)},
        "float64 inside": dense.float64_inside,
        "scale * 1.0003": scaled,
        "one key lost in one row": last_key_lost,
    }
    with mock.patch.object(sampled_rows, "LONG", 1):
        found = {
            name: judge_case(CASE, Subject(name=name, function=kernel, profile="flash"))
            for name, kernel in kernels.items()
        }
    wrong = {"scale * 1.0003", "one key lost in one row"}
    for name, record in found.items():
        assert record.verdict == ("DEVIATES" if name in wrong else "CONFORMS"), (
            f"{name}: {record.reason}"
        )
    lost = {s.name: s for s in found["one key lost in one row"].statistics}
    assert lost["row spread"].where[2] == 100


def test_short_way_is_for_long_cases_of_coarse_outputs_alone() -> None:
    inputs, claims = draw_core(CASE), profile_named("flash", "bfloat16")
    assert not sampled_rows.is_long(CASE, inputs, claims)
    with mock.patch.object(sampled_rows, "LONG", 1):
        assert sampled_rows.is_long(CASE, inputs, claims)
        assert not sampled_rows.is_long(replace(CASE, regime="integers"), inputs, claims)
        assert not sampled_rows.is_long(CASE, inputs, profile_named("flash", "float32"))


def test_disagreement_takes_the_long_way() -> None:
    inputs, claims = draw_core(CASE), profile_named("flash", "bfloat16")
    expected = reference(CASE, inputs)
    with (
        mock.patch.object(sampled_rows, "LONG", 1),
        mock.patch.object(sampled_rows, "AGREEMENT", 0.0),
    ):
        assert (
            runner.predicted(CASE, inputs, expected, claims, runs=FEW_RUNS)["output"].sampled
            is None
        )
