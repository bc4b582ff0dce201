"""Numbers are short and never say the opposite of what they mean."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports.formatting import count, cut, duration, exact, flatten, number, ratio, setting


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1.00"),
        (0.84, "0.840"),
        (-2.4567, "-2.46"),
        (123.4, "123"),
        (12345.6, "12346"),
        (0.00123, "0.00123"),
        (3.2e-5, "3.20e-05"),
        (1.5e9, "1.50e+09"),
        (math.nan, "NaN"),
        (-math.inf, "-∞"),
    ],
)
def test_number_has_three_significant_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00×"),
        (0.84, "0.84×"),
        (1.0, "1.00×"),
        (0.9999, "<1.00×"),
        (1.0001, ">1.00×"),
        (1e-7, "<0.01×"),
        (9.999, "10.00×"),
        (87.04, "87.0×"),
        (1234.5, "1234×"),
        (math.inf, "∞×"),
    ],
)
def test_ratio_is_short(value: float, text: str) -> None:
    assert ratio(value) == text


@settings(deadline=None)
@given(st.floats(min_value=0, max_value=1e6))
def test_ratio_never_crosses_the_limit_by_rounding(value: float) -> None:
    text = ratio(value).rstrip("×")
    shown = float(text.strip("<>"))
    if value > 1:
        assert shown > 1 or text == ">1.00"
    else:
        assert shown < 1 or value == 1 or text == "<1.00"


def test_exact_tells_neighbours_apart() -> None:
    assert exact(0.43359375) == "0.43359375"
    assert exact(0.43359375) != exact(0.435546875)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0004, "<1 ms"),
        (0.0123, "12.3 ms"),
        (2.72, "2.7 s"),
        (59.96, "1 min 00 s"),
        (754.2, "12 min 34 s"),
        (7260, "2 h 01 min"),
        (math.nan, "NaN"),
    ],
)
def test_duration_uses_the_unit_a_person_would(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_settings_are_flat_and_written_in_their_order() -> None:
    nested = {"b": None, "a": {"theta": 10000.0, "on": True}, "list": [1, 2], "empty": {}}
    assert list(flatten(nested)) == [
        ("b", "None"),
        ("a.theta", "10000.0"),
        ("a.on", "True"),
        ("list", "[1, 2]"),
        ("empty", "{}"),
    ]


def test_long_settings_are_cut_and_say_so() -> None:
    assert setting("x" * 2000) == "x" * 2000
    assert cut("a" * 50 + "b" * 50, 20) == "a" * 10 + " [80 characters left out] " + "b" * 10


def test_count_agrees_with_its_noun() -> None:
    assert [count(0, "case"), count(1, "case"), count(2000, "case")] == [
        "0 cases",
        "1 case",
        "2,000 cases",
    ]
