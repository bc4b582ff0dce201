"""Meshes and orders of tokens, number by number."""

from __future__ import annotations

import re
from itertools import chain

import numpy as np
import pytest

from golden import ConfigError, ShapeError
from golden.sharding import (
    EIGHT_BY_EIGHT,
    Mesh,
    reordered_pieces,
    stage_mesh,
    strided_order,
    unstrided_order,
)

TRN2 = [
    [0, 1, 2, 3, 12, 13, 14, 15],
    [4, 5, 6, 7, 8, 9, 10, 11],
    [16, 17, 18, 19, 28, 29, 30, 31],
    [20, 21, 22, 23, 24, 25, 26, 27],
    [32, 33, 34, 35, 44, 45, 46, 47],
    [36, 37, 38, 39, 40, 41, 42, 43],
    [48, 49, 50, 51, 60, 61, 62, 63],
    [52, 53, 54, 55, 56, 57, 58, 59],
]
TRN2_ORDERING = [
    *(0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 15, 4, 5, 6, 7),
    *(16, 17, 18, 19, 24, 25, 26, 27, 28, 29, 30, 31, 20, 21, 22, 23),
    *(32, 33, 34, 35, 40, 41, 42, 43, 44, 45, 46, 47, 36, 37, 38, 39),
    *(48, 49, 50, 51, 56, 57, 58, 59, 60, 61, 62, 63, 52, 53, 54, 55),
]


@pytest.mark.parametrize(
    ("world", "degree", "rows", "columns"),
    [
        (1, 1, [[0]], [[0]]),
        (4, 1, [[0, 1, 2, 3]], [[0], [1], [2], [3]]),
        (4, 4, [[0], [1], [2], [3]], [[0, 1, 2, 3]]),
        (8, 4, [[0, 1], [2, 3], [4, 5], [6, 7]], [[0, 2, 4, 6], [1, 3, 5, 7]]),
        (6, 2, [[0, 1, 2], [3, 4, 5]], [[0, 3], [1, 4], [2, 5]]),
    ],
)
def test_d1_d2_rows_and_columns(
    world: int, degree: int, rows: list[list[int]], columns: list[list[int]]
) -> None:
    mesh = stage_mesh(world, degree)
    assert list(map(list, mesh.rows)) == rows
    assert list(map(list, mesh.columns)) == columns
    assert mesh.inverted == tuple(range(world))


def test_d4_eight_rows_of_eight_follow_the_wiring_of_trn2() -> None:
    mesh = stage_mesh(64, 8)
    assert list(map(list, mesh.rows)) == TRN2
    assert list(mesh.inverted) == TRN2_ORDERING


def test_d4_with_a_switch_eight_rows_of_eight_are_contiguous() -> None:
    mesh = stage_mesh(64, 8, eight_by_eight="switch")
    assert mesh.inverted == tuple(range(64))


def test_d4_the_earlier_order_behind_a_switch() -> None:
    mesh = stage_mesh(64, 8, eight_by_eight="pds")
    assert mesh.rows[0] == (0, 8, 18, 26, 32, 40, 50, 58)
    assert mesh.columns[0] == tuple(range(8))
    assert mesh.inverted[:4] == (0, 8, 16, 24)


@pytest.mark.parametrize("wiring", EIGHT_BY_EIGHT)
@pytest.mark.parametrize(("world", "degree"), [(64, 4), (64, 16), (128, 8), (32, 8), (512, 64)])
def test_d4_other_meshes_are_contiguous_whatever_the_wiring(
    wiring: str, world: int, degree: int
) -> None:
    assert stage_mesh(world, degree, eight_by_eight=wiring).inverted == tuple(range(world))


@pytest.mark.parametrize("wiring", EIGHT_BY_EIGHT)
def test_d3_inverting_the_flattened_mesh_gives_each_ranks_place(wiring: str) -> None:
    mesh = stage_mesh(64, 8, eight_by_eight=wiring)
    flat = list(chain.from_iterable(mesh.rows))
    assert [flat[place] for place in mesh.inverted] == list(range(64))
    for rank in range(64):
        assert mesh.rows[mesh.row_of(rank)][mesh.column_of(rank)] == rank


@pytest.mark.parametrize("wiring", EIGHT_BY_EIGHT)
def test_d3_a_reordered_input_lies_in_order_within_each_row(wiring: str) -> None:
    mesh = stage_mesh(64, 8, eight_by_eight=wiring)
    pieces = np.split(reordered_pieces(np.arange(128), mesh.inverted, 0), 64)
    for row, ranks in enumerate(mesh.rows):
        gathered = np.concatenate([pieces[rank] for rank in ranks])
        assert gathered.tolist() == list(range(row * 16, row * 16 + 16))


@pytest.mark.parametrize(
    ("length", "stride", "order"),
    [
        (8, 2, [0, 2, 4, 6, 1, 3, 5, 7]),
        (6, 2, [0, 2, 4, 1, 3, 5]),
        (6, 3, [0, 3, 1, 4, 2, 5]),
        (6, 1, [0, 1, 2, 3, 4, 5]),
        (6, 6, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_d16_strided_order_and_its_inverse(length: int, stride: int, order: list[int]) -> None:
    assert strided_order(length, stride).tolist() == order
    assert np.array(order)[unstrided_order(length, stride)].tolist() == list(range(length))


@pytest.mark.parametrize(
    ("length", "order", "want"),
    [
        (4, [1, 0], [2, 3, 0, 1]),
        (6, [0, 1, 2], [0, 1, 2, 3, 4, 5]),
        (6, [2, 1, 0], [4, 5, 2, 3, 0, 1]),
    ],
)
def test_d17_pieces_change_places(length: int, order: list[int], want: list[int]) -> None:
    assert reordered_pieces(np.arange(length), order, 0).tolist() == want
    rows = np.stack([np.arange(length), np.arange(length) + 10])
    assert reordered_pieces(rows, order, 1).tolist() == [want, [n + 10 for n in want]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: stage_mesh(6, 4), "world_size must be a multiple of the degree, got 6 and 4"),
        (lambda: stage_mesh(0, 1), "world_size must be positive, got 0"),
        (lambda: stage_mesh(4, 0), "degree must be positive, got 0"),
        (
            lambda: stage_mesh(64, 8, eight_by_eight="ring"),  # type: ignore[arg-type]
            "eight_by_eight must be one of trn2, switch, pds, got 'ring'",
        ),
        (lambda: Mesh(((0, 1), (2,))), "rows must be equally long and hold a rank, got"),
        (lambda: Mesh(()), "rows must be equally long and hold a rank, got ()"),
        (lambda: Mesh(((0, 2), (1, 1))), "rows must hold every rank from 0 to 3 once, got"),
    ],
)
def test_meshes_that_cannot_be_are_refused(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    "make",
    [
        lambda: strided_order(7, 2),
        lambda: unstrided_order(7, 2),
        lambda: reordered_pieces(np.arange(7), [1, 0], 0),
    ],
)
def test_lengths_that_do_not_divide_are_refused(make: object) -> None:
    with pytest.raises(ShapeError, match="the length must be a multiple of 2, got 7"):
        make()  # type: ignore[operator]
