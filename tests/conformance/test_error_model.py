"""The error model: what it predicts, exact rows among it; how often its limits are passed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from conformance.error_model import FEW_RUNS, MANY_RUNS, ErrorScale, _scale, predict_scale
from conformance.judge import FALSE_ALARM_RATE, judge_outputs
from conformance.precision import profile_named
from conformance.rounding_runs import EXCESS, Dither, Nearest
from conformance.spread_limits import tail_limit
from golden import FORMATS, Array, Observer, unobserved


def test_dither_injects_the_stated_multiple_of_the_error_of_rounding_to_nearest() -> None:
    claims = profile_named("eager", "bfloat16")
    x = 1 + np.random.default_rng(0).random(400_000)
    nearest = np.square(Nearest(claims)("q_rope", x) - x).mean()
    dithered = np.square(Dither(claims, np.random.default_rng(1))("q_rope", x) - x).mean()
    # 1 + 4 a**2 with a = 1/2 - 1/16; both means of 400,000 squares are known to about 0.2 %
    assert abs(EXCESS**2 - (1 + 4 * (1 / 2 - 1 / 16) ** 2)) <= 2.0**-50  # a root and a square
    assert dithered / nearest == pytest.approx(EXCESS**2, rel=0.01)


def test_dither_never_sends_a_value_to_a_neighbour_nearly_a_gap_away() -> None:
    claims = profile_named("eager", "bfloat16")
    gap = 2.0**-7
    x = np.full(100_000, 1 + gap * 0.9 / 16)  # nearer to 1 than the margin of a sixteenth
    np.testing.assert_array_equal(Dither(claims, np.random.default_rng(1))("q_rope", x), 1.0)


def test_stage_that_the_profile_does_not_store_is_left_alone() -> None:
    claims = profile_named("flash", "bfloat16")
    x = np.array([1 / 3])
    assert "weights" not in claims.stores
    assert Dither(claims, np.random.default_rng(0))("weights", x) is x
    assert Nearest(claims)("weights", x) is x


def test_values_of_the_format_are_never_disturbed() -> None:
    claims = profile_named("eager", "bfloat16")
    x = FORMATS["bfloat16"].nearest(np.random.default_rng(0).standard_normal(1000))
    np.testing.assert_array_equal(Dither(claims, np.random.default_rng(1))("attn", x), x)


def predicted(value: Array, *, stage: str = "attn", runs_of: int = 0) -> ErrorScale:
    def evaluate(observe: Observer = unobserved) -> dict[str, Array]:
        return {"output": observe(stage, value)}

    rows = {"output": np.ones(value.shape[:-1], dtype=np.bool_)}
    claims = profile_named("eager", "bfloat16")
    return predict_scale(evaluate, evaluate(), rows, claims, seed=runs_of, runs=FEW_RUNS)["output"]


def test_predicted_spread_of_a_stored_value_is_that_of_rounding_to_nearest() -> None:
    value = 1 + np.random.default_rng(0).random((64, 512))
    scale = predicted(value)
    gap = 2.0**-7
    # 1/12 of a squared gap on average; 8 runs x 32,768 elements know their mean square to 0.2 %
    assert np.square(scale.row_sigma).mean() == pytest.approx(gap**2 / 12, rel=0.01)


def test_exact_rows_have_no_spread_and_others_do() -> None:
    value = np.stack([np.full(16, 0.5), np.full(16, 1 / 3), np.zeros(16)])
    assert (predicted(value).row_sigma > 0).tolist() == [False, True, False]


def test_prediction_depends_on_its_seed_alone() -> None:
    value = np.random.default_rng(0).standard_normal((3, 8))
    first, again, other = (predicted(value, runs_of=seed).sigma for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


DRAWS = 4000


def largest_of(rng: np.random.Generator, count: int, shape: tuple[int, ...]) -> Array:
    """Draw the largest square of `count` standard normal values, exactly, by its inverse."""
    from scipy.special import ndtri

    quantile = rng.random(shape) ** (1 / count)
    return np.square(ndtri((1 + quantile) / 2))


@pytest.mark.parametrize("runs", [8, 32])
@pytest.mark.parametrize("count", [100, 10_000, 1_000_000])
def test_limit_is_passed_no_more_often_than_alpha_by_gaussian_maxima(count: int, runs: int) -> None:
    alpha = 1e-2
    rng = np.random.default_rng([runs, count])
    seen = largest_of(rng, count, (DRAWS, runs + 1))
    limits = np.array([tail_limit(row, 0.0, count, alpha) for row in seen])
    passed = np.count_nonzero(largest_of(rng, count, (DRAWS,)) > limits)
    # a binomial count of 4,000 at 1e-2 stays within 4 deviations of 40
    assert passed <= alpha * DRAWS + 4 * math.sqrt(alpha * DRAWS)


def test_limit_grows_as_alpha_shrinks_and_never_falls_below_what_was_seen() -> None:
    squares = np.array([2.0, 3.0, 2.5])
    limits = [tail_limit(squares, 1.0, 100, alpha) for alpha in (1e-1, 1e-3, 1e-6)]
    assert limits == sorted(limits)
    assert limits[0] > squares.max()
    assert tail_limit(np.array([0.5, 0.7, 0.2]), 1.0, 100, 1e-3) == 1.0


def errors(rng: np.random.Generator, runs: int, directions: Array) -> Array:
    """Errors that one number per row decides, as where one score dominates a row's error."""
    rows = len(directions)
    return rng.standard_normal((runs, rows, 1)) * directions


def false_alarms(*, shared: bool, cases: int, runs: int) -> int:
    """Count alarms on errors drawn from the very model that the limits were drawn from."""
    rng = np.random.default_rng(0)
    shape = (1552, 32)
    rows, exact = {"output": np.ones(shape[0], dtype=np.bool_)}, {"output": np.zeros(shape)}
    directions = rng.standard_normal(shape)
    found = 0
    for _ in range(cases):
        count = runs + 2  # one stands for the run to nearest, one for the subject
        drawn = errors(rng, count, directions) if shared else rng.standard_normal((count, *shape))
        scales = {"output": _scale(drawn[:-1], exact["output"], rows["output"])}
        found += not judge_outputs({"output": drawn[-1]}, exact, rows, scales).conforms
    return found


@pytest.mark.parametrize("runs", [8, 32])
def test_mean_square_of_a_new_draw_is_1_though_few_runs_know_a_variance(runs: int) -> None:
    rng = np.random.default_rng(runs)
    directions = rng.standard_normal((4000, 32))
    drawn = errors(rng, runs + 2, directions)  # one degree of freedom a row
    rows = np.ones(4000, dtype=np.bool_)
    scale = _scale(drawn[:-1], np.zeros((4000, 32)), rows)
    found = scale.standardised(drawn[-1], rows)[1].mean()
    # over its own estimate a square has the mean K / (K - 2), 1.33 of 8 runs. Against one run less
    # it is (K - 1) / (K - 3), cut off a little; so 1 to 5 %, and 4,000 rows know it to 4 %
    assert found == pytest.approx(1.0, abs=0.15)
    assert np.mean(scale.row_squares[:runs]) == pytest.approx(1.0)


def test_independent_errors_of_the_model_raise_no_alarm() -> None:
    assert false_alarms(shared=False, cases=40, runs=FEW_RUNS) == 0
    assert FALSE_ALARM_RATE * 40 < 1e-4


def test_errors_shared_along_rows_raise_no_alarm() -> None:
    # a row's scale then rests on one number a run: why a finding takes MANY_RUNS
    assert false_alarms(shared=True, cases=40, runs=MANY_RUNS) == 0


def test_rows_below_goldens_own_roundoff_do_not_tighten_the_spread() -> None:
    rng = np.random.default_rng(0)
    shape = (1552, 32)
    share = 0.006  # of rows whose error is far below golden's own roundoff
    quiet = rng.random(shape[0]) < share
    rows = {"output": np.ones(shape[0], dtype=np.bool_)}
    exact = {"output": np.ones(shape)}
    found = 0
    for _ in range(60):
        drawn = rng.standard_normal((10, *shape)) * 1e-4
        drawn[:, quiet] *= 1e-16
        scales = {"output": _scale(drawn[:9], exact["output"], rows["output"])}
        observed = {"output": exact["output"] + drawn[9]}
        found += not judge_outputs(observed, exact, rows, scales).conforms
    assert found == 0
