"""Which part of the weights each rank holds, and which head it writes: number by number.

Source of the numbers of 16 ranks and more: unit tests of neuronx-distributed-inference
(`test_utils.py` of its attention module), run by their authors.
"""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from golden import AttentionConfig, ConfigError
from golden.sharding import (
    CONVERT_TO_MHA,
    PADDING,
    Parallelism,
    Placement,
    head_layout,
    heads_written,
    place_ranks,
)
from golden.sharding.rules import check_layer
from tests.golden.sharding.test_meshes import TRN2_ORDERING


def placed(
    world: int, cp: int, dp: int, kv_heads: int, *, heads: int | None = None, **options: object
) -> Placement:
    """Place ranks; with a multiple of both for query heads, no head is padded."""
    config = AttentionConfig(
        hidden_size=4,
        num_attention_heads=heads or kv_heads * world,
        num_key_value_heads=kv_heads,
        head_dim=2,
    )
    parallelism = Parallelism(
        tp_degree=world,
        cp_degree=cp,
        attention_dp_degree=dp,
        **options,  # type: ignore[arg-type]
    )
    return place_ranks(config, parallelism)


def strides(*, inner: int, outer: int) -> list[int]:
    """Return `0, inner, 2 inner, ...` and then the same plus 1, plus 2, ... up to `inner`."""
    return [a * inner + b for b in range(inner) for a in range(outer)]


TP_AFTER_8X8 = [
    *(0, 8, 16, 24, 1, 9, 17, 25, 32, 40, 48, 56, 33, 41, 49, 57),
    *(2, 10, 18, 26, 3, 11, 19, 27, 34, 42, 50, 58, 35, 43, 51, 59),
    *(4, 12, 20, 28, 5, 13, 21, 29, 36, 44, 52, 60, 37, 45, 53, 61),
    *(6, 14, 22, 30, 7, 15, 23, 31, 38, 46, 54, 62, 39, 47, 55, 63),
]


@pytest.mark.parametrize(
    ("world", "cp", "kv_heads", "ordering"),
    [
        (8, 2, 8, [0, 2, 4, 6, 1, 3, 5, 7]),
        (4, 2, 4, [0, 2, 1, 3]),
        (8, 4, 2, [0, 4, 1, 5, 2, 6, 3, 7]),
        (8, 4, 8, [0, 4, 1, 5, 2, 6, 3, 7]),
        (8, 8, 8, list(range(8))),
        (16, 2, 8, strides(inner=2, outer=8)),
        (32, 4, 8, strides(inner=4, outer=8)),
        (64, 16, 8, strides(inner=16, outer=4)),
        (64, 8, 8, TP_AFTER_8X8),
    ],
)
def test_d11_decode_parts_after_a_context_parallel_prefill(
    world: int, cp: int, kv_heads: int, ordering: list[int]
) -> None:
    assert list(placed(world, cp, 1, kv_heads).decode) == ordering


def offset(first: list[int], world: int) -> list[int]:
    """Repeat an ordering for every row, each with its own parts."""
    return [start + n for start in range(0, world, len(first)) for n in first]


EIGHT_BY_EIGHT_DECODE = [
    *(0, 2, 4, 6, 8, 10, 12, 14, 9, 11, 13, 15, 1, 3, 5, 7),
    *(16, 18, 20, 22, 24, 26, 28, 30, 25, 27, 29, 31, 17, 19, 21, 23),
    *(32, 34, 36, 38, 40, 42, 44, 46, 41, 43, 45, 47, 33, 35, 37, 39),
    *(48, 50, 52, 54, 56, 58, 60, 62, 57, 59, 61, 63, 49, 51, 53, 55),
]


@pytest.mark.parametrize(
    ("world", "cp", "dp", "kv_heads", "wiring", "ordering"),
    [
        (8, 4, 2, 4, "trn2", [0, 2, 1, 3, 4, 6, 5, 7]),
        (16, 8, 2, 4, "trn2", offset([0, 4, 1, 5, 2, 6, 3, 7], 16)),
        (64, 16, 4, 8, "trn2", offset(strides(inner=4, outer=4), 64)),
        (64, 16, 8, 8, "trn2", EIGHT_BY_EIGHT_DECODE),
        (64, 16, 8, 8, "switch", offset([0, 2, 4, 6, 1, 3, 5, 7], 64)),
        (64, 8, 4, 8, "switch", offset(strides(inner=2, outer=8), 64)),
        (
            64,
            8,
            4,
            8,
            "trn2",
            offset([0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15], 64),
        ),
    ],
)
def test_d11_decode_parts_of_data_parallel_rows(
    world: int, cp: int, dp: int, kv_heads: int, wiring: str, ordering: list[int]
) -> None:
    assert list(placed(world, cp, dp, kv_heads, eight_by_eight=wiring).decode) == ordering


@pytest.mark.parametrize(
    ("world", "cp", "dp", "kv_heads", "written"),
    [
        (4, 2, 1, 4, [0, 0, 1, 1]),
        (8, 4, 1, 8, [0, 0, 1, 1, 2, 2, 3, 3]),
        (16, 4, 1, 16, [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4),
        (32, 4, 1, 8, [0] * 32),
        (32, 4, 1, 16, [0] * 16 + [1] * 16),
        (32, 4, 1, 4, [0] * 32),
        (64, 16, 1, 8, [0] * 32 + [1] * 32),
        (64, 16, 4, 8, ([0] * 8 + [1] * 8) * 4),
        (64, 16, 4, 16, ([0] * 4 + [1] * 4 + [2] * 4 + [3] * 4) * 4),
    ],
)
def test_d11_the_head_each_rank_writes(
    world: int, cp: int, dp: int, kv_heads: int, written: list[int]
) -> None:
    assert [head for (head,) in placed(world, cp, dp, kv_heads).written] == written


def test_d11_before_a_data_parallel_decode_the_prefill_weights_change_places() -> None:
    placement = placed(8, 1, 2, 4)
    assert list(placement.prefill) == [0, 2, 4, 6, 1, 3, 5, 7]
    assert list(placement.decode) == list(range(8))
    assert placement.written == ((0,),) * 8


def test_d11_the_eight_by_eight_decode_after_a_tensor_parallel_prefill() -> None:
    placement = placed(64, 1, 8, 8)
    assert list(placement.prefill) == [rank % 8 * 8 + rank // 8 for rank in range(64)]


@pytest.mark.parametrize(("world", "degree"), [(2, 2), (8, 4), (64, 8), (16, 4)])
def test_d12_with_equal_degrees_the_weights_are_one_set(world: int, degree: int) -> None:
    placement = placed(world, degree, degree, 4)
    assert placement.prefill == placement.decode
    assert list(placement.decode) == (TRN2_ORDERING if world == 64 else list(range(world)))
    assert len(set(placement.written)) == 1


DEGREES = [
    (world, cp, dp)
    for world in (2, 4, 8, 16, 32, 64, 128)
    for cp, dp in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8, 16))
    if world % cp == 0 and world % dp == 0 and (1 in (cp, dp) or cp % dp == 0)
]


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 8, 10, 16])
@pytest.mark.parametrize("strategy", [None, CONVERT_TO_MHA])
def test_d10_every_decode_head_was_computed_on_the_rank_by_prefill(
    kv_heads: int, strategy: str | None
) -> None:
    placed_any = 0
    for world, cp, dp in DEGREES:
        config = AttentionConfig(
            hidden_size=4,
            num_attention_heads=2 * kv_heads,
            num_key_value_heads=kv_heads,
            head_dim=2,
        )
        parallelism = Parallelism(
            tp_degree=world,
            cp_degree=cp,
            attention_dp_degree=dp,
            strategy=strategy,  # type: ignore[arg-type]
        )
        try:
            check_layer(config, parallelism)
            placement = place_ranks(config, parallelism)
        except ConfigError:
            continue
        placed_any += 1
        check_placement(config, parallelism, placement)
    assert placed_any > 20


def check_placement(
    config: AttentionConfig, parallelism: Parallelism, placement: Placement
) -> None:
    """Each row holds all parts once, and each cached head is the one that decode reads."""
    layouts = []
    for mesh, ordering in (
        (parallelism.prefill_mesh, placement.prefill),
        (parallelism.decode_mesh, placement.decode),
    ):
        for row in mesh.rows:
            assert sorted(ordering[rank] % mesh.tp_degree for rank in row) == [
                *range(mesh.tp_degree)
            ]
        layouts.append((head_layout(config, mesh.tp_degree, desired=parallelism.strategy), mesh))
    (before, prefill_mesh), (after, decode_mesh) = layouts
    for rank, heads in enumerate(placement.written):
        held = before.kv_part(placement.prefill[rank] % prefill_mesh.tp_degree)
        read = after.kv_part(placement.decode[rank] % decode_mesh.tp_degree)
        assert tuple(held[h] if h != PADDING else PADDING for h in heads) == read


def test_d11_ranks_give_way_where_the_first_free_part_would_leave_one_without() -> None:
    placement = placed(6, 3, 1, 3, heads=6)
    prefill_heads = ({0, 1}, {1, 2})  # of even and of odd ranks
    decode_heads = [part // 2 for part in placement.decode]
    assert sorted(placement.decode) == list(range(6))
    assert all(head in prefill_heads[rank % 2] for rank, head in enumerate(decode_heads))


def test_padding_that_prefill_does_not_have_is_written_as_zeros() -> None:
    assert heads_written((0, 1), (1, PADDING)) == (1, PADDING)
    assert heads_written((0, PADDING), (PADDING, 0)) == (1, 0)


def test_a_head_that_was_not_computed_cannot_be_written() -> None:
    with pytest.raises(ConfigError, match=re.escape("must be among [0, 1], got [2]")):
        heads_written((0, 1), (2,))


def test_degrees_that_leave_a_rank_without_its_head_are_refused() -> None:
    with pytest.raises(ConfigError, match="prefill and decode degrees must leave every rank"):
        placed(4, 1, 2, 3, heads=6)


def test_every_rank_of_512_finds_its_head() -> None:
    placement = placed(512, 64, 8, 8)
    assert np.unique(placement.decode).size == 512
