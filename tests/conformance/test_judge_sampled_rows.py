"""Long cases: sampled rows give what all rows give, and find what they should."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
import variants
from sampled_ways import assert_sampled_rows_agree, disagreement
from torch import Tensor

import golden
from conformance import pieces, runner, sampled_rows
from conformance.cases import Case, Workload
from conformance.closed_form import closed_form, is_long
from conformance.error_model import FEW_RUNS
from conformance.expected import reference
from conformance.inputs import draw_core
from conformance.pieces import core_pieces, in_pieces
from conformance.precision import profile_named
from conformance.rounding_runs import nearest_runs
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
ALONE = replace(profile_named("sdpa", "bfloat16"), stores={"exp": "float64"}, exp_ulps=2.0**30)
"""Nothing but exp errs, by up to 2**-22 of it, and nothing is rounded."""
FLASH = variants.CORES["flash, tile 64"].function


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_sampled_rows_predict_what_all_rows_predict() -> None:
    inputs, claims = draw_core(CASE), profile_named("flash", "bfloat16")
    expected = reference(CASE, inputs)
    with mock.patch.object(runner, "predict_core", return_value=None):  # sizes, no covariances
        long_way = predicted(CASE, inputs, expected, claims, runs=FEW_RUNS)["output"]
    with mock.patch("conformance.closed_form.LONG", 1):
        short_way = predicted(CASE, inputs, expected, claims, runs=FEW_RUNS)["output"]
    assert long_way.sampled is None
    assert short_way.sampled is not None
    exact, rows = expected.outputs["output"], expected.rows["output"]
    assert_sampled_rows_agree(long_way, short_way, exact, rows)
    for sign in (1, -1):  # off by as much as the module takes the form to be wrong
        factor = 1 + sign * sampled_rows.AGREEMENT
        off = replace(short_way, row_sigma=short_way.row_sigma * np.sqrt(factor))
        found, limit = disagreement(long_way, off, rows)
        assert found > limit
    tests = {test.name: test for test in short_way.score_tests}
    for test in long_way.score_tests:
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
    with mock.patch("conformance.closed_form.LONG", 1):
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


def test_short_way_is_for_long_cases_without_repeats_or_claimed_orders() -> None:
    inputs, claims = draw_core(CASE), profile_named("flash", "bfloat16")
    assert not is_long(CASE, inputs, claims)
    with mock.patch("conformance.closed_form.LONG", 1):
        assert is_long(CASE, inputs, claims)
        assert not is_long(replace(CASE, regime="integers"), inputs, claims)
        assert is_long(CASE, inputs, profile_named("flash", "float32"))
        assert not is_long(CASE, inputs, profile_named("in-sequence", "float32"))


@pytest.mark.parametrize(("dtype", "profile"), [("bfloat16", "eager"), ("float32", "flash")])
def test_outputs_that_come_with_the_closed_form_are_goldens(dtype: str, profile: str) -> None:
    inputs, claims = draw_core(CASE), profile_named(profile, dtype)
    with (
        mock.patch("conformance.closed_form.LONG", 1),
        mock.patch.object(pieces, "WHOLE", 1),
        mock.patch.object(pieces, "SCORES", 1 << 16),
    ):
        alone, along = reference(CASE, inputs), reference(CASE, inputs, None, claims)
        assert alone.form is None
        assert along.form is not None
        np.testing.assert_array_equal(along.outputs["output"], alone.outputs["output"])
        apart = sampled_rows.predict_sampled(CASE, inputs, alone, claims, seed=1)
        found = sampled_rows.predict_sampled(CASE, inputs, along, claims, seed=1)
    assert apart is not None
    assert found is not None
    np.testing.assert_array_equal(found["output"].sigma, apart["output"].sigma)


def test_disagreement_takes_the_long_way() -> None:
    inputs, claims = draw_core(CASE), profile_named("flash", "bfloat16")
    expected = reference(CASE, inputs)
    with (
        mock.patch("conformance.closed_form.LONG", 1),
        mock.patch.object(sampled_rows, "AGREEMENT", 0.0),
    ):
        assert (
            runner.predicted(CASE, inputs, expected, claims, runs=FEW_RUNS)["output"].sampled
            is None
        )


@pytest.mark.parametrize("window", [None, 100])
def test_pieces_give_what_all_queries_and_keys_at_once_give(window: int | None) -> None:
    case = replace(CASE, config=replace(CASE.config, sliding_window=window))
    inputs, claims = draw_core(case), profile_named("native", "bfloat16")
    evaluate, mask = reference(case, inputs).evaluate, golden.layer_mask(case.config)
    assert len(core_pieces(inputs, mask)) == 1
    with (
        mock.patch.object(pieces, "WHOLE", 1),
        mock.patch.object(pieces, "SCORES", 1 << 17),
    ):
        cut, some = (core_pieces(inputs, mask, s) for s in (slice(None), slice(8, None, 16)))
    queries = [q for piece in cut for q in range(640)[piece.queries]]
    assert queries == list(range(640))
    assert [q for piece in some for q in range(640)[piece.queries]] == queries[8::16]
    assert len(cut) > 10
    assert min(len(range(640)[piece.queries]) for piece in (*cut, *some)) >= pieces.LEAST
    assert cut[5].keys.stop < 640
    # an approximation of exp is one function, whatever is cut; roundings of sums aside
    exact = evaluate()["output"]
    joined = in_pieces(evaluate, cut)
    np.testing.assert_allclose(joined()["output"], exact, rtol=0, atol=1e-13)
    for observer, again in zip(nearest_runs(claims, 3), nearest_runs(claims, 3), strict=True):
        observer, again = (replace(x, profile=ALONE) for x in (observer, again))
        moved = evaluate(observe=observer)["output"] - exact
        assert observer.rng is None or np.abs(moved).max() > 1e-9
        found = joined(observe=again)["output"] - exact
        np.testing.assert_allclose(found, moved, rtol=0, atol=1e-13)
    whole = closed_form(evaluate, inputs, case.config, claims)
    parts = closed_form(evaluate, inputs, case.config, claims, cut)
    for name, one, other in zip(whole._fields, whole, parts, strict=True):
        # Sums of at most 640 terms of one sign in two orders, and differences of such sums whose
        # larger parts are as large as the largest element; derivatives are summed in float32.
        unit = 2.0**-24 if name in ("scale", "softcap") else 2.0**-53
        bound = 4 * 640 * unit * np.abs(one).max()
        np.testing.assert_allclose(other, one, rtol=0, atol=bound, err_msg=name)
