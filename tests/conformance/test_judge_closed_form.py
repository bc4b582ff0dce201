"""The closed form against the Monte Carlo runs and against differences of golden."""

from __future__ import annotations

import numpy as np
import pytest

from conformance.cases import Case, Workload
from conformance.closed_form import closed_form
from conformance.directions import directions
from conformance.error_model import MANY_RUNS, predict_scale
from conformance.expected import reference
from conformance.inputs import CoreInputs, draw_core
from conformance.precision import profile_named
from conformance.stored_variance import rounding_variance
from golden import FORMATS, AttentionConfig

CONFIGS = {
    "plain": AttentionConfig(
        hidden_size=128, num_attention_heads=4, num_key_value_heads=4, head_dim=32
    ),
    "grouped, windowed, sinks": AttentionConfig(
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=40,
        learned_sinks_size=1,
    ),
    "soft cap": AttentionConfig(
        hidden_size=128, num_attention_heads=4, num_key_value_heads=4, head_dim=32, softcap=5.0
    ),
    "softmax scale a power of two": AttentionConfig(
        hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    ),
}
RUNS = 8


def prepared(name: str, regime: str, dtype: str) -> tuple[Case, CoreInputs]:
    case = Case(
        config=CONFIGS[name],
        workload=Workload(phase="cte", lengths=(160, 97)),
        dtype=dtype,
        regime=regime,
        scope="core",
    )
    return case, draw_core(case)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("regime", ["gaussian", "peaked", "outlier"])
@pytest.mark.parametrize(
    ("profile", "dtype"), [("flash", "bfloat16"), ("native", "float16"), ("eager", "bfloat16")]
)
def test_closed_form_agrees_with_the_monte_carlo_runs(
    name: str, regime: str, profile: str, dtype: str
) -> None:
    case, inputs = prepared(name, regime, dtype)
    expected = reference(case, inputs)
    claims = profile_named(profile, dtype)
    form = closed_form(expected.evaluate, inputs, case.config, claims)
    scale = predict_scale(
        expected.evaluate, expected.outputs, expected.rows, claims, seed=1, runs=MANY_RUNS
    )
    rows = expected.rows["output"]
    predicted = form.variance.mean(axis=-1)[rows]
    drawn = np.square(scale["output"].row_sigma)[rows]
    assert (drawn[predicted > 0] > 0).all()
    # a weight of 1 that float32 leaves at 1 - 2**-24 is rounded away from 1 once in 2**13 draws
    assert np.count_nonzero(drawn[predicted == 0]) <= 2
    ratio = drawn[predicted > 0] / predicted[predicted > 0]
    # Rows err independently. A row's mean square over 8 runs has at least 8 degrees of freedom,
    # so a standard deviation of at most 1/2; the mean of all rows stays within 5 of its own.
    # Second order: a score's error of relative size up to 2**-8 times its size, here below 40,
    # changes a weight by (1 + x)**2; 15 % stand for it where scores are rounded to bfloat16.
    second_order = 0.15 if profile == "eager" else 0.0
    assert abs(ratio.mean() - 1) < 5 * 0.5 / np.sqrt(len(ratio)) + second_order


@pytest.mark.parametrize("name", CONFIGS)
def test_derivatives_agree_with_differences_of_golden(name: str) -> None:
    case, inputs = prepared(name, "gaussian", "bfloat16")
    expected = reference(case, inputs)
    claims = profile_named("flash", "bfloat16")
    form = closed_form(expected.evaluate, inputs, case.config, claims)
    for direction in directions(case, inputs, expected):
        if direction.name == "softmax scale":
            slope, found = 100 * direction.slope, form.scale
        elif direction.name == "softcap":
            assert form.softcap is not None
            slope, found = 100 * direction.slope, form.softcap
        elif direction.name.startswith("sink"):
            slope, found = direction.slope, form.sink[direction.part]
        else:
            continue
        # a forward difference over 2**-20, whose curvature is a few times its slope
        np.testing.assert_allclose(found, slope, atol=2.0**-15 * np.abs(slope).max())


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float8_e4m3fn"])
def test_rounding_variance_averages_to_that_of_nearest_and_is_zero_on_the_format(name: str) -> None:
    form = FORMATS[name]
    rng = np.random.default_rng(0)
    inside = 1 + rng.random(400_000)  # one binade; its mean is known to about 0.1 %
    gap = 2.0 ** (1 - form.precision)
    assert rounding_variance(form, inside).mean() == pytest.approx(gap**2 / 12, rel=5e-3)
    x = rng.standard_normal(1000) * 2.0 ** rng.integers(form.min_exponent - 2, 5, 1000)
    x = np.concatenate([x, form.nearest(x), [0.0]])
    found = rounding_variance(form, x)
    assert (found[form.nearest(x) == x] == 0).all()
    assert rounding_variance(form, np.array([-np.inf, 1 / 3]))[0] == 0
