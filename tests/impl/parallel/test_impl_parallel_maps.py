"""Meshes, rank orders, heads per rank and cuts of a sequence, number by number.

The numbers are those that neuronx-distributed-inference's own functions returned when run.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch

from impl import GQA, ConfigError, InferenceConfig, NeuronConfig, ShapeError
from impl.parallel import RankMaps, TokenOrder, head_layout, rank_maps, stage_mesh, strided
from impl.parallel.head_layout import PADDING, slots_of
from impl.parallel.weights import shard_heads


def maps(world: int, cp: int, dp: int, kv: int, group: int = 1) -> RankMaps:
    return rank_maps(world, kv * group, kv, cp_degree=cp, dp_degree=dp)


@pytest.mark.parametrize(
    ("world", "cp", "dp", "kv", "expected"),
    [
        (8, 2, 1, 8, [0, 2, 4, 6, 1, 3, 5, 7]),
        (4, 2, 1, 4, [0, 2, 1, 3]),
        (8, 4, 1, 2, [0, 4, 1, 5, 2, 6, 3, 7]),
        (8, 4, 1, 8, [0, 4, 1, 5, 2, 6, 3, 7]),
        (8, 8, 1, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (64, 16, 1, 8, [0, 16, 32, 48, 1, 17]),
        (8, 4, 2, 4, [0, 2, 1, 3, 4, 6, 5, 7]),
        (16, 8, 2, 4, [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9]),
        (64, 16, 8, 8, [0, 2, 4, 6, 8, 10, 12, 14, 9, 11, 13, 15, 1, 3, 5, 7]),
    ],
)
def test_decode_takes_its_shards_in_the_documented_order(
    world: int, cp: int, dp: int, kv: int, expected: list[int]
) -> None:
    for group in (1, 2):
        ordering = maps(world, cp, dp, kv, group).decode.ordering
        assert list(ordering[: len(expected)]) == expected


@pytest.mark.parametrize(
    ("world", "cp", "kv", "expected"),
    [(4, 2, 4, [0, 0, 1, 1]), (8, 4, 8, [0, 0, 1, 1, 2, 2, 3, 3])],
)
def test_each_rank_writes_the_documented_kv_head(
    world: int, cp: int, kv: int, expected: list[int]
) -> None:
    both = maps(world, cp, 1, kv)
    written = [
        slots_of(both.decode.key_value(rank), both.prefill.key_value(rank)) for rank in range(world)
    ]
    assert written == [(slot,) for slot in expected]


@pytest.mark.parametrize("kv", [8, 16])
def test_ranks_of_an_eight_by_eight_mesh_cache_the_heads_they_read(kv: int) -> None:
    both = maps(64, 8, 1, kv)
    plain = [both.prefill.layout.shard(rank % 8).key_value for rank in range(64)]
    held = [both.prefill.key_value(rank) for rank in range(64)]
    assert held != plain  # looked up by number of rank, 16 heads would not be found
    for rank in range(64):
        (head,) = both.decode.key_value(rank)
        (slot,) = slots_of((head,), held[rank])
        assert slot is not None
        assert held[rank][slot] == head


def test_context_parallel_rows_are_runs_of_ranks() -> None:
    mesh = stage_mesh(8, 4)
    assert mesh.rows == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert mesh.columns == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert [mesh.coordinates(rank)[0] for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_eight_by_eight_ranks_follow_the_wiring_of_trn2() -> None:
    def ranks(*runs: tuple[int, int]) -> tuple[int, ...]:
        return tuple(r for first, last in runs for r in range(first, last + 1))

    assert stage_mesh(64, 8).rows == (
        ranks((0, 3), (12, 15)),
        ranks((4, 11)),
        ranks((16, 19), (28, 31)),
        ranks((20, 27)),
        ranks((32, 35), (44, 47)),
        ranks((36, 43)),
        ranks((48, 51), (60, 63)),
        ranks((52, 59)),
    )
    order = [0, 1, 2, 3, *range(8, 16), 4, 5, 6, 7, 16]
    assert list(maps(64, 8, 8, 8).prefill.ordering[:17]) == order
    assert list(stage_mesh(64, 8).positions[:17]) == order


def test_switch_cc_and_other_sizes_keep_plain_rows() -> None:
    assert stage_mesh(64, 8, switch_cc=True).rows[0] == tuple(range(8))
    plain = rank_maps(64, 8, 8, cp_degree=8, dp_degree=8, switch_cc=True)
    assert plain.prefill.ordering == tuple(range(64))
    assert stage_mesh(64, 16).rows[1] == (4, 5, 6, 7)
    assert stage_mesh(32, 8).rows[0] == (0, 1, 2, 3)


def accepted() -> Iterator[tuple[int, int, int, int, int]]:
    """World size, CP, DP, KV heads and group that the configuration lets through."""
    degrees = (1, 2, 4, 8, 16)
    for world, cp, dp, kv, group in product(
        (1, 2, 4, 8, 16, 64), degrees, degrees, (1, 2, 3, 4, 8), (1, 3, 4)
    ):
        try:
            run = NeuronConfig(
                tp_degree=world,
                cp_degree=cp,
                attention_dp_degree=dp,
                batch_size=16,
                is_continuous_batching=True,
            )
            InferenceConfig(
                neuron_config=run,
                hidden_size=8,
                num_attention_heads=kv * group,
                num_key_value_heads=kv,
            )
        except ConfigError:
            continue
        yield world, cp, dp, kv, group


def test_every_accepted_mesh_has_every_shard_and_writes_what_its_decode_reads() -> None:
    seen, uneven = 0, []
    for world, cp, dp, kv, group in accepted():
        try:
            both = maps(world, cp, dp, kv, group)
        except ConfigError:
            uneven.append(kv)
            continue
        for stage in (both.prefill, both.decode):
            for row in stage.mesh.rows:
                assert sorted(map(stage.shard, row)) == list(range(stage.mesh.tp_degree))
        for rank in range(world):
            held, wanted = both.prefill.key_value(rank), both.decode.key_value(rank)
            found = slots_of(wanted, held)
            assert [PADDING if s is None else held[s] for s in found] == list(wanted)
        seen += 1
    assert seen > 500
    assert set(uneven) == {3}, "copies of a power of two come out even"


def test_copies_that_do_not_come_out_even_are_refused() -> None:
    with pytest.raises(ConfigError, match="only KV heads that it has in prefill"):
        maps(4, 1, 2, 3)


@pytest.mark.parametrize(
    ("sizes", "query", "key_value"),
    [
        ((4, 6, 2), "01|2-|34|5-", "0|0|1|1"),
        ((3, 8, 2), "012|345|67-", "000|011|11-"),
        ((4, 6, 3), "01|23|45|--", "00|11|22|--"),
        ((8, 7, 1), "0|1|2|3|4|5|6|-", "0|0|0|0|0|0|0|0"),
        ((2, 8, 4), "0123|4567", "01|23"),
        ((4, 6, 6), "01|23|45|--", "01|23|45|--"),
        ((8, 4, 4), "0|-|1|-|2|-|3|-", "0|0|1|1|2|2|3|3"),
    ],
)
def test_heads_lie_on_ranks_as_documented(sizes: Any, query: str, key_value: str) -> None:
    layout = head_layout(*sizes)
    shards = [layout.shard(index) for index in range(sizes[0])]

    def text(slots: tuple[int, ...]) -> str:
        return "".join("-" if head == PADDING else str(head) for head in slots)

    assert "|".join(text(shard.query) for shard in shards) == query
    assert "|".join(text(shard.key_value) for shard in shards) == key_value


@pytest.mark.parametrize("desired", [None, GQA.CONVERT_TO_MHA])
def test_every_query_slot_finds_its_kv_head_on_its_own_rank(desired: GQA | None) -> None:
    for tp, kv, group in product((1, 2, 3, 4, 6, 8, 32), (1, 2, 3, 4, 8), (1, 2, 7, 8)):
        layout = head_layout(tp, kv * group, kv, desired)
        present = []
        for index in range(tp):
            shard = layout.shard(index)
            ratio = len(shard.query) // len(shard.key_value)
            assert ratio * len(shard.key_value) == len(shard.query)
            for slot, head in enumerate(shard.query):
                if head != PADDING:
                    assert shard.key_value[slot // ratio] == head // group
                    present.append(head)
        assert sorted(present) == list(range(kv * group))


def test_shards_are_heads_in_order_with_zeros_for_padding() -> None:
    weight = torch.arange(1.0, 7.0)[:, None].expand(6, 2)
    assert shard_heads(weight, (2, PADDING, 0), 2)[:, 0].tolist() == [5, 6, 0, 0, 1, 2]
    assert shard_heads(weight.T, (1,), 2, dim=1)[0].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("order", "length", "ranks"),
    [
        (TokenOrder(2), 8, ["0123", "4567"]),
        (TokenOrder(2, chunk=4), 8, ["0145", "2367"]),
        (TokenOrder(2, chunk=4), 6, ["014", "235"]),
        (TokenOrder(2, chunk=8), 6, ["012", "345"]),
        (TokenOrder(4, chunk=4), 8, ["04", "15", "26", "37"]),
        (TokenOrder(1, chunk=4), 6, ["012345"]),
    ],
)
def test_a_cut_sequence_joins_again(order: TokenOrder, length: int, ranks: list[str]) -> None:
    tokens = torch.arange(length).expand(3, 2, length)
    pieces = [order.split(tokens, 2, rank) for rank in range(order.ranks)]
    assert ["".join(map(str, piece[0, 0].tolist())) for piece in pieces] == ranks
    assert torch.equal(order.join(torch.cat(pieces, 2), 2), tokens)


@pytest.mark.parametrize(
    "order",
    [TokenOrder(4), TokenOrder(4, strided=True), TokenOrder(4, chunk=8), TokenOrder(1, chunk=8)],
)
def test_runs_name_the_tokens_of_a_rank(order: TokenOrder) -> None:
    given = torch.arange(20)
    given = strided(given, 0, 4) if order.strided else given
    for rank in range(order.ranks):
        named = [
            run.offset + run.stride * i for run in order.runs(20, rank) for i in range(run.length)
        ]
        assert order.split(given, 0, rank).tolist() == named


def test_strided_order_and_its_inverse() -> None:
    order = TokenOrder(2, strided=True)
    given = strided(torch.arange(8), 0, 2)
    assert given.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert order.natural(given, 0).tolist() == list(range(8))


@pytest.mark.parametrize(
    ("order", "length"),
    [(TokenOrder(2), 7), (TokenOrder(2, chunk=4), 7), (TokenOrder(4, chunk=6), 12)],
)
def test_lengths_that_do_not_split_are_refused(order: TokenOrder, length: int) -> None:
    with pytest.raises(ShapeError, match="split evenly over"):
        order.split(torch.arange(length), 0, 0)
