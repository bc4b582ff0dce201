"""Collectives, and the dtype of a reduction."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from golden import FORMATS, Array
from golden.sharding import (
    Parallelism,
    RankCapture,
    all_gather,
    all_reduce,
    all_to_all,
    encode_sharded,
    over_groups,
    reduce_scatter,
    shard,
    stage_mesh,
)
from tests.golden.layers import LAYERS, assert_within, identical, integer_weights, normal


def values(ranks: int, *shape: int) -> list[Array]:
    return [normal(rank, *shape) for rank in range(ranks)]


def test_all_gather_joins_in_the_order_of_the_group() -> None:
    got = over_groups(
        ((1, 0), (2, 3)),
        [np.full((1, 2), float(rank)) for rank in range(4)],
        lambda v: all_gather(v, axis=1),
    )
    assert [value.tolist() for value in got] == [
        [[1, 1, 0, 0]],
        [[1, 1, 0, 0]],
        [[2, 2, 3, 3]],
        [[2, 2, 3, 3]],
    ]


def test_reduce_scatter_and_all_gather_make_an_all_reduce() -> None:
    given = values(4, 2, 8, 3)
    pieces = reduce_scatter(given, 1)
    for whole, gathered in zip(all_reduce(given), all_gather(pieces, axis=1), strict=True):
        assert identical(np.ascontiguousarray(gathered), whole)


def test_all_to_all_is_its_own_inverse_across_the_axes() -> None:
    given = values(3, 6, 3)
    there = all_to_all(given, split=0, join=1)
    assert [value.shape for value in there] == [(2, 9)] * 3
    assert identical(np.ascontiguousarray(there[1][:, 3:6]), given[1][2:4])
    for back, value in zip(all_to_all(there, split=1, join=0), given, strict=True):
        assert identical(back, value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_d9_a_reduction_dtype_rounds_every_value_and_partial_sum(dtype: str, ranks: int) -> None:
    form, given = FORMATS[dtype], values(ranks, 5, 7)
    got = all_reduce(given, form)[0]
    assert identical(got, form.nearest(got))
    # each value is rounded once and carried through at most `ranks - 1` rounded sums
    magnitude = np.sum(np.abs(given), axis=0)
    u = form.unit_roundoff
    assert_within(got, np.sum(given, axis=0), ((1 + u) ** ranks - 1) * magnitude + 2.0**-50)
    assert not identical(got, form.nearest(np.sum(given, axis=0))) or ranks == 2


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_d9_the_reduction_dtype_changes_the_output_sum_and_nothing_before(
    sequence_parallel: bool,
) -> None:
    config = LAYERS["gqa-bias-rms"]
    weights = replace(integer_weights(config), o_proj=normal(5, 8, 16))
    states = normal(0, 2, 8, 8)
    captures = {}
    for dtype in (None, "float32"):
        parallelism = Parallelism(
            tp_degree=4, cp_degree=2, sequence_parallel=sequence_parallel, reduce_dtype=dtype
        )
        captures[dtype] = capture = RankCapture()
        encode_sharded(
            shard(config, weights, parallelism), states, position_ids=np.arange(8), observe=capture
        )
    exact, rounded = captures[None].values, captures["float32"].values
    changed = {
        stage for rank, stage in exact if not identical(exact[rank, stage], rounded[rank, stage])
    }
    assert changed == {"o_reduced", "o_proj", "returned"}
    form = FORMATS["float32"]
    for rank, (a, b) in enumerate([(0, 1), (0, 1), (2, 3), (2, 3)]):
        shares = [exact[member, "o_product"] for member in (a, b)]
        want = form.nearest(form.nearest(shares[0]) + form.nearest(shares[1]))
        if sequence_parallel:
            want = np.split(want, 2, axis=1)[rank % 2]
        assert identical(rounded[rank, "o_reduced"], np.ascontiguousarray(want))


def test_groups_are_those_of_the_mesh() -> None:
    mesh = stage_mesh(8, 4)
    ones = [np.array([float(rank)]) for rank in range(8)]
    assert [v.item() for v in over_groups(mesh.rows, ones, all_reduce)] == [
        1,
        1,
        5,
        5,
        9,
        9,
        13,
        13,
    ]
    assert [v.item() for v in over_groups(mesh.columns, ones, all_reduce)] == [12, 16] * 4
