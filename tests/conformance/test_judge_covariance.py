"""Errors freed from what a row shares: the algebra, the predicted covariance, and its power."""

from __future__ import annotations

import math
import zlib
from functools import cache

import numpy as np
import pytest
from scipy.stats import chi2

from conformance.cases import DTYPES, Case, Workload
from conformance.core_covariance import CoreCovariance, core_covariance
from conformance.covariance import RowCovariance, row_covariance
from conformance.defects import CONTROLS, DEFECTS, problem_of
from conformance.error_model import FEW_RUNS, draw
from conformance.judge import FALSE_ALARM_RATE, Judgement
from conformance.precision import profile_named
from conformance.spread_limits import pooled_limits
from conformance.variants import HALF
from conformance.variants.judged import JudgedCase, prepare
from golden import Array, AttentionConfig

RNG = np.random.default_rng(7)
SHAPE = (3, 5)
WIDTH, COLUMNS = 12, 4


def some_covariance() -> tuple[RowCovariance, Array]:
    """Random covariances, and the same as matrices."""
    diagonal = 0.1 + RNG.random((*SHAPE, WIDTH))
    columns = RNG.standard_normal((*SHAPE, COLUMNS, WIDTH)) * 2
    dense = columns.swapaxes(-1, -2) @ columns + np.eye(WIDTH) * diagonal[..., None, :]
    return row_covariance(diagonal, columns), dense


def test_weighing_is_by_the_inverse_covariance() -> None:
    rows, dense = some_covariance()
    error = RNG.standard_normal((2, *SHAPE, WIDTH))
    wanted = np.linalg.solve(dense, error[..., None])[..., 0]
    # two ways of elimination in matrices of condition below 1e4: a thousand roundings
    bound = 1e4 * 1000 * 2.0**-53 * np.abs(wanted).max()
    assert np.abs(rows.weighed(error) - wanted).max() <= bound
    precision = np.diagonal(np.linalg.inv(dense), axis1=-2, axis2=-1)
    assert np.abs(rows.precision - precision).max() <= 1e7 * 2.0**-53 * precision.max()


def test_a_slice_of_the_rows_is_weighed_as_within_all() -> None:
    rows, _ = some_covariance()
    error = RNG.standard_normal((*SHAPE, WIDTH))
    part = (slice(None), slice(1, 3))
    wanted = rows.weighed(error)[part]
    # the same elimination over fewer rows, in another order at most: the bound of the test above
    bound = 1e4 * 1000 * 2.0**-53 * np.abs(wanted).max()
    assert np.abs(rows.part(part).weighed(error[part]) - wanted).max() <= bound


def test_errors_of_the_covariance_are_standardised() -> None:
    rows, _ = some_covariance()
    draws = 20_000
    shared = RNG.standard_normal((draws, *SHAPE, 1, COLUMNS)) @ rows.columns
    error = shared[..., 0, :] + RNG.standard_normal((draws, *SHAPE, WIDTH)) * np.sqrt(rows.diagonal)
    z, mean_square = rows.standardised(error)
    # variances of 20,000 Gaussians are known to 1 %, the largest of 180 to 4 %
    assert np.abs(np.square(z).mean(axis=0) - 1).max() <= 0.04
    assert np.abs(mean_square.mean(axis=0) - 1).max() <= 0.02


def test_an_error_of_one_element_shows_beneath_a_larger_one_of_the_whole_row() -> None:
    direction = RNG.standard_normal(64)
    rows = row_covariance(np.full((1, 64), 1e-4), direction[None, None])
    error = direction * 1.5
    alone = error.copy()
    alone[5] += 0.12  # a tenth of what the shared rounding does to the row
    assert np.abs(rows.standardised(error[None])[0]).max() < 2
    assert np.abs(rows.standardised(alone[None])[0]).argmax() == 5
    assert np.abs(rows.standardised(alone[None])[0]).max() > 10


def layer(**features: int | float | None) -> AttentionConfig:
    fields: dict[str, object] = {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        **features,
    }
    return AttentionConfig(**fields)  # type: ignore[arg-type]


PROMPT = Workload(phase="cte", lengths=(150, 40))
DECODE = Workload(phase="tkg", lengths=(500, 90))


def case_of(
    config: AttentionConfig, work: Workload, dtype: str, regime: str, seed: int = 0
) -> Case:
    return Case(config=config, workload=work, dtype=dtype, regime=regime, seed=seed, scope="core")


@cache
def judged(case: Case) -> JudgedCase:
    return prepare(case)


def covariance_of(case: Case, profile: str) -> CoreCovariance | None:
    one = judged(case)
    claims = profile_named(profile, case.dtype)
    return core_covariance(one.expected.evaluate, one.inputs.v, case.config, claims)


@pytest.mark.parametrize("work", [PROMPT, DECODE], ids=["prompt", "decode"])
@pytest.mark.parametrize("regime", ["gaussian", "peaked", "outlier", "large"])
@pytest.mark.parametrize("profile", ["flash", "native"])
@pytest.mark.parametrize("dtype", HALF)
def test_errors_of_the_runs_have_the_predicted_covariance(
    dtype: str, profile: str, regime: str, work: Workload
) -> None:
    case = case_of(layer(learned_sinks_size=1), work, dtype, regime)
    form = covariance_of(case, profile)
    assert form is not None
    one, claims = judged(case), profile_named(profile, dtype)
    errors = draw(
        one.expected.evaluate,
        one.expected.outputs,
        claims,
        seed=zlib.crc32(case.id.encode()),
        runs=FEW_RUNS,
        last={"output": "attn"},
    )["output"].stored[:FEW_RUNS]
    rows = form.noisy & one.expected.rows["output"]
    squares = form.rows.standardised(errors)[1][:, rows]
    # What chance alone moves the mean of the rows by, and on top the place in its binade that a
    # row's foremost weights happen to have: (ulp(x) / x)**2 lies between 1/4 and 1 of its largest,
    # with mean 0.54, so where few weights decide (saturated rows) by up to a quarter, else a tenth.
    chance = 5 * float(squares.mean(axis=0).std()) / math.sqrt(squares.shape[1])
    assert abs(float(squares.mean()) - 1) <= chance + (0.25 if regime == "large" else 0.10)


def test_no_covariance_is_claimed_where_the_closed_form_ends() -> None:
    assert covariance_of(case_of(layer(), PROMPT, "float32", "gaussian"), "flash") is None
    assert covariance_of(case_of(layer(), PROMPT, "bfloat16", "large"), "eager") is None
    assert covariance_of(case_of(layer(), PROMPT, "bfloat16", "gaussian"), "eager") is not None


def test_rows_that_round_nothing_are_exact_and_repeated_weights_are_seen() -> None:
    form = covariance_of(case_of(layer(), PROMPT, "bfloat16", "gaussian"), "flash")
    assert form is not None
    assert not form.noisy[:, :, 0].any()  # one visible key
    assert form.noisy[0, :, 1:].all()
    assert not form.repeats
    repeated = covariance_of(case_of(layer(), PROMPT, "bfloat16", "integers"), "flash")
    assert repeated is not None
    assert repeated.repeats


def test_the_bound_of_a_projection_is_not_below_its_spread_in_the_runs() -> None:
    case = case_of(layer(learned_sinks_size=1), DECODE, "bfloat16", "gaussian")
    for test in judged(case).scale("flash", FEW_RUNS)["output"].score_tests:
        assert math.isfinite(test.bound)  # 8 rows a batch row: few degrees of freedom
        # The bound takes the low end of each binade, 1 to 1.36 times the mean of one; the square
        # of the spread is chi-squared of so many degrees of freedom, here to one in 10**4 a side.
        # A bound of half or of twice its size fails, in three and four of the seven projections.
        low, high = (chi2.ppf(tail, test.freedom) / test.freedom for tail in (1e-4, 1 - 1e-4))
        assert 1 / math.sqrt(high) <= test.bound / test.spread <= 1.36 / math.sqrt(low)


def test_limits_of_means_are_passed_as_seldom_as_they_say() -> None:
    rng = np.random.default_rng(3)
    runs, rows, freedom, alpha = 8, 40, 16, 1e-2
    labels = np.repeat(np.arange(4), 10)
    passed = 0
    trials = 3000
    for _ in range(trials):
        squares = rng.chisquare(freedom, size=(runs + 5, rows)) / freedom
        limits = pooled_limits(squares[:-1], runs, labels, alpha)
        means = np.bincount(labels, weights=squares[-1]) / 10
        passed += bool((means > limits).any())
    # a binomial count of 3,000 at 1e-2 stays within 4 deviations of 30
    assert passed <= alpha * trials + 4 * math.sqrt(alpha * trials)


def test_limits_of_means_find_a_fifth_more_error_in_one_group_of_many_rows() -> None:
    rng = np.random.default_rng(4)
    labels = np.repeat(np.arange(4), 100)
    squares = rng.chisquare(64, size=(13, 400)) / 64
    limits = pooled_limits(squares[:-1], 8, labels, FALSE_ALARM_RATE / 20)
    means = np.bincount(labels, weights=squares[-1]) / 100
    assert (means <= limits).all()
    assert (1.2 * means > limits).all()


SEEDS = range(3)
AT_512 = Workload(phase="cte", lengths=(512,))


@cache
def at_512(regime: str, seed: int) -> JudgedCase:
    config = layer(learned_sinks_size=1, num_attention_heads=2, num_key_value_heads=1)
    return prepare(case_of(config, AT_512, "bfloat16", regime, seed))


def verdict(one: JudgedCase, rewrite: str) -> Judgement:
    found = {defect.id: defect for defect in (*DEFECTS, *CONTROLS)}[rewrite]
    return one.judge(found.run(problem_of(one.case, one.inputs)), "flash")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("regime", ["gaussian", "peaked"])
def test_small_parameter_errors_are_found_in_every_seed_and_equal_rewrites_in_none(
    regime: str, seed: int
) -> None:
    one = at_512(regime, seed)
    wrong_scale = verdict(one, "scale-0.03-percent")
    assert not wrong_scale.conforms
    assert "score: softmax scale" in {s.name for s in wrong_scale.statistics if s.ratio > 1}
    assert not verdict(one, "sink-plus-0.01").conforms
    assert verdict(one, "plain").conforms
    assert verdict(one, "sigmoid-sink").conforms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("regime", ["gaussian", "peaked"])
def test_a_key_bias_without_rope_is_never_flagged(dtype: str, regime: str) -> None:
    one = judged(case_of(layer(), PROMPT, dtype, regime))
    assert verdict(one, "key-bias").conforms
    assert not verdict(one, "last-head-empty").conforms
