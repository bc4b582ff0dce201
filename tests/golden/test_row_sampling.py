from __future__ import annotations

import itertools
import math
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import assert_within, attend_bound, identical, problem, seen
from streamed_cases import Case, streamed_cases

import golden.row_sampling
from golden import (
    Causal,
    Chunked,
    ConfigError,
    Everything,
    Explicit,
    Mask,
    ShapeError,
    SlidingWindow,
)
from golden.blockwise import streamed_problem
from golden.row_plan import RowPlan, plan_rows, rows_needed
from golden.row_sampling import attend_rows


def check_rows(case: Case, rows: Any) -> None:
    a, p = case.arguments, case.p
    got = attend_rows(p.q, p.k, p.v, rows=rows, **a, **case.tiles)
    want = case.dense()
    visible = seen(a["mask"], a["q_positions"], a["kv_positions"], p.shape)
    bound = attend_bound(
        p.q, p.k, p.v, visible, scale=p.scale, softcap=a["softcap"], sinks=a["sinks"]
    )
    assert_within(got.output, want.output[:, :, rows], bound.output[:, :, rows])
    assert_within(got.logsumexp, want.logsumexp[:, :, rows], bound.logsumexp[:, :, rows])


@settings(deadline=None, max_examples=300, derandomize=True)
@given(data=st.data(), case=streamed_cases())
def test_r1_rows_are_those_of_attend_in_any_order(data: st.DataObject, case: Case) -> None:
    check_rows(case, data.draw(st.lists(st.integers(0, case.p.shape[2] - 1), max_size=8)))


def far_apart() -> Case:
    p = problem(1, batch=1, q_len=300, kv_len=300)
    mask = Causal() & Explicit(np.random.default_rng(0).random((300, 300)) < 0.5)
    positions = np.arange(300)
    arguments = {"q_positions": positions, "kv_positions": positions, "mask": mask}
    return Case(p, arguments | {"softcap": None, "sinks": None})


def test_r1_rows_far_apart_share_a_tile() -> None:
    check_rows(far_apart(), [0, 1, 63, 64, 128, 200, 299])


def test_the_comparison_sees_the_mask_of_neighbouring_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def neighbours(*args: Any, **changes: Any) -> Any:
        return streamed_problem(
            *args,
            **(
                changes
                | {
                    "mask": far_apart()
                    .arguments["mask"]
                    .block(slice(None), slice(None), slice(0, 7), slice(None))
                }
            ),
        )

    monkeypatch.setattr(golden.row_sampling, "streamed_problem", neighbours)
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_rows(far_apart(), [0, 1, 63, 64, 128, 200, 299])


def test_r2_bfloat16_rows_equal_those_of_widened_inputs_bit_for_bit() -> None:
    case = far_apart()
    narrow = [x.astype(ml_dtypes.bfloat16) for x in (case.p.q, case.p.k, case.p.v)]
    rows = [0, 5, 299]
    arguments = {n: x for n, x in case.arguments.items() if x is not None}
    got = attend_rows(*narrow, rows=rows, **arguments)
    want = attend_rows(*(x.astype(np.float64) for x in narrow), rows=rows, **arguments)
    assert identical(got.output, want.output)
    assert identical(got.logsumexp, want.logsumexp)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([300], "rows must be at least 0 and below q_len = 300, got 300 to 300"),
        ([-1], "rows must be at least 0 and below q_len = 300, got -1 to -1"),
        ([0.5], "rows must be a list of query indices, (n,), got float64 of shape (1,)"),
        ([[1]], "rows must be a list of query indices, (n,), got int64 of shape (1, 1)"),
    ],
)
def test_rows_that_are_not_queries_are_refused(rows: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=re.escape(message)):
        check_rows(far_apart(), rows)


# The plan


def plan(q_len: int = 4096, mask: Mask | None = None, count: int = 64) -> RowPlan:
    return plan_rows(np.arange(q_len), Causal() if mask is None else mask, count=count, seed=3)


def test_the_plan_has_as_many_distinct_sorted_rows_as_asked_for() -> None:
    rows = plan().rows
    assert len(rows) == 64
    assert (np.diff(rows) > 0).all()
    assert rows[0] == 0
    assert rows[-1] == 4095


@pytest.mark.parametrize(
    ("mask", "corners"),
    [
        (Causal(), {0, 4095, 127, 128, 511, 512, 3967, 3968, 3583, 3584}),
        (Causal() & SlidingWindow(1000), {999, 1000}),
        (Causal() & Chunked(300), {299, 300, 3899, 3900}),
        (Chunked(300) | SlidingWindow(77), {299, 300, 76, 77}),
    ],
    ids=str,
)
def test_the_plan_has_the_corners_of_tiles_windows_and_chunks(
    mask: Mask, corners: set[int]
) -> None:
    chosen = plan(mask=mask)
    assert corners <= chosen.corners.keys()
    assert corners <= set(chosen.rows.tolist())


def test_the_plan_has_both_sides_of_padding_borders_of_any_batch_row() -> None:
    positions = np.tile(np.arange(1000), (2, 1))
    positions[0, 700:] = -1
    positions[1] = np.where(np.arange(1000) < 30, -1, np.arange(1000) - 30)
    chosen = plan_rows(positions, Causal(), count=40, seed=0)
    assert {29, 30, 699, 700} <= chosen.corners.keys()


def test_window_corners_are_found_by_position_not_by_index() -> None:
    chosen = plan_rows(np.arange(4096) + 500, Causal() & SlidingWindow(600), count=64, seed=0)
    assert {99, 100} <= chosen.corners.keys()


def test_half_of_the_plan_is_random_and_follows_its_seed() -> None:
    one, two = plan(q_len=1 << 14), plan_rows(np.arange(1 << 14), Causal(), count=64, seed=4)
    assert one.random >= 32
    assert (one.rows == plan(q_len=1 << 14).rows).all()
    assert (one.rows != two.rows).any()


def test_a_short_sequence_is_checked_whole() -> None:
    chosen = plan(q_len=20)
    assert chosen.rows.tolist() == list(range(20))
    assert chosen.escape_probability(0.05) == 0.0
    assert chosen.smallest_fraction() == 0.05


def test_escape_probability_is_a_count_over_all_drawings() -> None:
    """Of 9 rows with 2 corners, 3 are drawn at random from 7; the defect touches 2 others."""
    chosen = RowPlan(np.arange(5), 9, {0: "first row", 8: "last row"}, 3)
    drawings = list(itertools.combinations(range(7), 3))
    missed = sum(1 for drawing in drawings if not {0, 1} & set(drawing))
    assert math.isclose(chosen.escape_probability(2 / 9), missed / len(drawings), rel_tol=1e-14)


def test_escape_probability_is_what_drawing_shows() -> None:
    missed, trials = 0, 2000
    touched = np.arange(1000, 1080)
    for seed in range(trials):
        rows = plan_rows(np.arange(2000), Everything(), count=40, seed=seed, tile_edges=()).rows
        missed += not np.isin(touched, rows).any()
    expected = RowPlan(np.arange(40), 2000, {0: "", 1999: ""}, 38).escape_probability(0.04)
    assert abs(missed / trials - expected) < 5 * math.sqrt(expected * (1 - expected) / trials)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(count=st.integers(2, 400), q_len=st.integers(2, 5000), exponent=st.integers(1, 9))
def test_the_smallest_fraction_is_the_smallest(count: int, q_len: int, exponent: int) -> None:
    probability = 10.0**-exponent
    chosen = plan(q_len=q_len, count=count)
    fraction = chosen.smallest_fraction(probability)
    assert chosen.escape_probability(fraction) <= probability
    fewer = round(fraction * q_len) - 1
    if fewer:
        assert chosen.escape_probability(fewer / q_len) > probability


def test_rows_needed_are_just_enough() -> None:
    needed = rows_needed(1e-3, 1e-6, 1 << 20)
    assert 13_000 < needed < math.log(1e6) / 1e-3
    enough = RowPlan(np.arange(needed), 1 << 20, {}, needed)
    assert enough.escape_probability(1e-3) <= 1e-6
    assert RowPlan(np.arange(needed), 1 << 20, {}, needed - 1).escape_probability(1e-3) > 1e-6


def test_the_summary_says_what_the_plan_misses() -> None:
    assert plan(q_len=1 << 20, count=256).summary() == (
        "256 of 1048576 rows: 128 corners and 128 random; a defect touching 10.2 % of rows or "
        "more escapes with probability below 1e-06, one touching 0.1 % with probability 0.88"
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan(count=1), "count must be at least 2, the first and the last row, got 1"),
        (lambda: plan(q_len=0), "q_positions must hold at least one query, got none"),
        (lambda: plan().escape_probability(0.0), "fraction must be above 0 and at most 1, got 0.0"),
        (lambda: plan().smallest_fraction(1.0), "probability must be between 0 and 1, got 1.0"),
        (lambda: rows_needed(2.0, 0.1, 8), "fraction must be above 0 and at most 1"),
        (
            lambda: plan_rows(np.arange(9), Causal(), count=4, seed=0, tile_edges=(0,)),
            "tile_edges must be at least 1, got (0,)",
        ),
    ],
)
def test_the_plan_refuses_what_it_cannot_do(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        call()
