"""Which rank's cache a prefill reads each KV head from, where earlier tokens are cached.

A rank caches what it reads in decode: some KV heads, for its rows of the batch. A prefill over
cached tokens reads the heads of its own shard for every row. On 4 ranks with 4 KV heads and
`cp = 2`, where ranks 0 and 2 prefill heads 0 and 1 and decode one of them each:

    prefill heads   01 | 23 | 01 | 23        cached   0 | 2 | 1 | 3

so ranks 0 and 2 gather each other's cache. The ranks that exchange are the fewest that suffice
everywhere: none, those of a column of prefill, those of a column of decode, or all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from impl.parallel.head_layout import PADDING
from impl.parallel.rank_maps import RankMaps

Exchange = Literal["none", "prefill", "decode", "all"]
"""Among whom cached keys are gathered."""


class Source(NamedTuple):
    """Where a cached head is found.

    Attributes:
        member: place of its rank in the group that exchanges.
        slot: which KV head of that rank's cache it is.
    """

    member: int
    slot: int


@dataclass(frozen=True, slots=True)
class PriorPlan:
    """What one rank reads.

    Attributes:
        exchange: among whom.
        sources: per data-parallel group and slot of this rank's prefill KV heads; None where the
            slot is padding.
        own: the rank reads its own cache as it is.
    """

    exchange: Exchange
    sources: tuple[tuple[Source | None, ...], ...]
    own: bool


def prior_plan(maps: RankMaps, rank: int) -> PriorPlan:
    """Say what a rank reads of which rank's cache.

    Args:
        maps: both stages.
        rank: whose prefill it is.
    """
    for exchange, partition in _partitions(maps):
        found = {member: _sources(maps, member, group) for group in partition for member in group}
        mine = found[rank]
        if mine is not None and all(sources is not None for sources in found.values()):
            alike = maps.prefill.key_value(rank) == maps.decode.key_value(rank)
            return PriorPlan(exchange, mine, own=exchange == "none" and alike)
    raise AssertionError("the ranks of a data-parallel group hold every KV head between them")


def _partitions(maps: RankMaps) -> Iterator[tuple[Exchange, Sequence[Sequence[int]]]]:
    world = range(maps.prefill.mesh.world_size)
    yield "none", [(rank,) for rank in world]
    yield "prefill", maps.prefill.mesh.columns
    yield "decode", maps.decode.mesh.columns
    yield "all", [world]


def _sources(
    maps: RankMaps, rank: int, group: Sequence[int]
) -> tuple[tuple[Source | None, ...], ...] | None:
    """Sources of a rank's prefill heads within a group; None if one is not there."""
    wanted = maps.prefill.key_value(rank)
    by_row: list[tuple[Source | None, ...]] = []
    for row in range(maps.decode.mesh.groups):
        cached = {
            head: Source(member, slot)
            for member, holder in reversed(list(enumerate(group)))
            if maps.decode.mesh.coordinates(holder)[0] == row
            for slot, head in enumerate(maps.decode.key_value(holder))
        }
        if any(head not in cached for head in wanted if head != PADDING):
            return None
        by_row.append(tuple(None if head == PADDING else cached[head] for head in wanted))
    return tuple(by_row)
