from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import identical, normal, sampled

from golden import (
    AttentionConfig,
    ConfigError,
    ContiguousCache,
    ShapeError,
    empty_cache,
    filled_cache,
)

CONFIG = AttentionConfig(hidden_size=8, num_attention_heads=4, num_key_value_heads=2, head_dim=3)


def filled(lengths: list[int], max_length: int = 6) -> ContiguousCache:
    shape = (len(lengths), 2, max_length, 3)
    return filled_cache(CONFIG, normal(1, *shape), normal(2, *shape), lengths)


def test_an_empty_cache_holds_no_position() -> None:
    cache = empty_cache(CONFIG, batch=2, max_length=5)
    assert cache.k.shape == cache.v.shape == (2, 2, 5, 3)
    assert cache.k.dtype == cache.v.dtype == np.float64
    assert cache.positions.dtype == np.int64
    assert (cache.positions == -1).all()


def test_a_filled_cache_holds_the_first_positions_of_each_row() -> None:
    cache = filled([0, 4, 6])
    assert cache.positions.tolist() == [
        [-1, -1, -1, -1, -1, -1],
        [0, 1, 2, 3, -1, -1],
        [0, 1, 2, 3, 4, 5],
    ]


@sampled
@given(data=st.data())
def test_position_p_lives_in_slot_p_and_minus_1_writes_nothing(data: st.DataObject) -> None:
    batch, max_length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7))
    length = data.draw(st.integers(0, max_length))
    before = filled([data.draw(st.integers(0, max_length)) for _ in range(batch)], max_length)
    rows = [
        data.draw(st.permutations(range(max_length)).map(lambda order: order[:length]))
        for _ in range(batch)
    ]
    positions = np.array(rows, dtype=np.int64).reshape(batch, length)
    positions[np.random.default_rng(length).random(positions.shape) < 0.3] = -1
    k, v = normal(3, batch, 2, length, 3), normal(4, batch, 2, length, 3)
    after = before.write(k, v, positions)
    for b in range(batch):
        written = {int(p): column for column, p in enumerate(positions[b]) if p >= 0}
        for slot in range(max_length):
            column = written.get(slot)
            if column is None:
                assert identical(after.k[b, :, slot], before.k[b, :, slot])
                assert identical(after.v[b, :, slot], before.v[b, :, slot])
                assert after.positions[b, slot] == before.positions[b, slot]
            else:
                assert identical(after.k[b, :, slot], k[b, :, column])
                assert identical(after.v[b, :, slot], v[b, :, column])
                assert after.positions[b, slot] == slot


def test_writing_leaves_the_cache_before_as_it_was() -> None:
    before = filled([2, 3])
    k, v, positions = before.k.copy(), before.v.copy(), before.positions.copy()
    before.write(np.ones((2, 2, 1, 3)), np.ones((2, 2, 1, 3)), [[2], [3]])
    assert identical(before.k, k)
    assert identical(before.v, v)
    assert (before.positions == positions).all()


def test_a_later_write_replaces_the_key_of_its_position() -> None:
    zeros, ones = np.zeros((1, 2, 1, 3)), np.ones((1, 2, 1, 3))
    cache = empty_cache(CONFIG, batch=1, max_length=4).write(zeros, zeros, [3])
    cache = cache.write(ones, 2.0 * ones, [3])
    assert (cache.k[0, :, 3] == 1.0).all()
    assert (cache.v[0, :, 3] == 2.0).all()
    assert cache.positions.tolist() == [[-1, -1, -1, 3]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: empty_cache(CONFIG, batch=0, max_length=4),
            ConfigError,
            "batch and max_length must be positive, got 0 and 4",
        ),
        (
            lambda: empty_cache(CONFIG, batch=2, max_length=0),
            ConfigError,
            "batch and max_length must be positive, got 2 and 0",
        ),
        (
            lambda: filled([3, 7]),
            ConfigError,
            "lengths must lie between 0 and max_length 6, got [3, 7]",
        ),
        (
            lambda: filled([-1, 2]),
            ConfigError,
            "lengths must lie between 0 and max_length 6, got [-1, 2]",
        ),
        (
            lambda: filled_cache(CONFIG, np.ones((2, 2, 6, 3)), np.ones((2, 2, 6, 3)), [1]),
            ShapeError,
            "lengths must be integers of shape (2,), got int64 (1,)",
        ),
        (
            lambda: filled_cache(CONFIG, np.ones((1, 2, 6, 3)), np.ones((1, 2, 6, 3)), [1.0]),
            ShapeError,
            "lengths must be integers of shape (1,), got float64 (1,)",
        ),
        (
            lambda: filled_cache(CONFIG, np.ones((1, 4, 6, 3)), np.ones((1, 4, 6, 3)), [1]),
            ShapeError,
            "k must have shape (any, 2, any, 3), BHSD, got (1, 4, 6, 3)",
        ),
        (
            lambda: filled_cache(CONFIG, np.ones((1, 2, 6, 3)), np.ones((1, 2, 5, 3)), [1]),
            ShapeError,
            "v must have shape (1, 2, 6, 3), BHSD, got (1, 2, 5, 3)",
        ),
    ],
    ids=[
        "no-batch",
        "no-slots",
        "too-long",
        "negative",
        "lengths-shape",
        "lengths-floats",
        "k-heads",
        "v-shape",
    ],
)
def test_a_cache_that_cannot_be_is_refused(
    call: Callable[[], Any], error: type[ValueError], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("k", "v", "positions", "error", "message"),
    [
        (
            (1, 2, 1, 3),
            (1, 2, 1, 3),
            [[6]],
            ConfigError,
            "positions must be below the cache's max_length of 6, got 6; make the cache longer",
        ),
        ((2, 2, 1, 3), (2, 2, 1, 3), [[0]], ShapeError, "k must have shape (1, 2, any, 3), BHSD"),
        ((1, 2, 1, 4), (1, 2, 1, 4), [[0]], ShapeError, "k must have shape (1, 2, any, 3), BHSD"),
        ((1, 2, 1, 3), (1, 2, 2, 3), [[0]], ShapeError, "v must have shape (1, 2, 1, 3), BHSD"),
        ((1, 2, 1, 3), (1, 2, 1, 3), [[0, 1]], ShapeError, "positions must have shape (1, 1)"),
        ((1, 2, 1, 3), (1, 2, 1, 3), [[0.0]], ShapeError, "positions must hold integers"),
        ((1, 2, 1, 3), (1, 2, 1, 3), [[-2]], ShapeError, "positions must lie between -1"),
    ],
    ids=["beyond", "batch", "width", "v", "length", "floats", "below"],
)
def test_what_does_not_fit_the_cache_is_not_written(
    k: tuple[int, ...],
    v: tuple[int, ...],
    positions: Any,
    error: type[ValueError],
    message: str,
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        filled([3]).write(np.ones(k), np.ones(v), positions)
