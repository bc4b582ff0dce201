"""The comparison that the oracles rest on rejects what it has to."""

from __future__ import annotations

import numpy as np
import pytest
from float64_agreement import assert_agrees, roundoff


def test_message_names_the_worst_index_both_values_and_the_bound() -> None:
    expected = np.array([[1.0, 2.0], [4.0, 3.0]])
    observed = expected + np.array([[0.0, 1e-3], [0.0, -2e-3]])
    with pytest.raises(AssertionError) as caught:
        assert_agrees("output", observed, expected, limit=1e-4)
    message = str(caught.value)
    assert message.startswith("output[1, 1]: got 2.998, expected 3.0, error 2.0e-03")
    assert message.endswith("exceeds bound 4.0e-04; 2 of 4 elements")


def test_error_is_relative_to_the_largest_expected_magnitude() -> None:
    assert assert_agrees("output", [8.0, 0.5], [8.0, 0.0], limit=0.0625) == 0.0625


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nothing_that_is_not_finite_agrees(value: float) -> None:
    with pytest.raises(AssertionError, match="exceeds bound"):
        assert_agrees("output", [value, 1.0], [1.0, 1.0], limit=1.0)
    with pytest.raises(AssertionError, match="must be finite"):
        assert_agrees("output", [value, 1.0], [value, 1.0], limit=1.0)


def test_zeros_are_met_exactly_or_not_at_all() -> None:
    assert assert_agrees("output", [0.0, 0.0], [0.0, 0.0], limit=0.0) == 0.0
    with pytest.raises(AssertionError, match="exceeds bound"):
        assert_agrees("output", [0.0, 1e-300], [0.0, 0.0], limit=1.0)


def test_shapes_never_broadcast() -> None:
    with pytest.raises(AssertionError, match="got shape"):
        assert_agrees("output", np.zeros((1, 3)), np.zeros(3), limit=1.0)


def test_roundoff_counts_both_evaluations_and_grows_with_the_scores() -> None:
    assert roundoff(terms=10) == 20 * 2.0**-53
    assert roundoff(terms=10, score=3.0) == 80 * 2.0**-53
