"""Which part of the weights each rank holds in prefill and in decode, and what it caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from golden.config import AttentionConfig
from golden.errors import ConfigError
from golden.sharding.head_layout import PADDING, HeadLayout, Heads, head_layout
from golden.sharding.mesh import Mesh
from golden.sharding.parallelism import Parallelism

Ordering = tuple[int, ...]
"""A number per rank; modulo the ranks of a row it is the part of the weights the rank holds."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Weights' parts and cached heads by rank.

    D11: after a context-parallel prefill, ranks change places among the parts of the decode
        weights, so that each finds its key/value head among those it computed: the first free
        part whose heads it has. Before a data-parallel decode without context parallelism, it is
        the prefill weights that change places.
    D12: with equal degrees both stages use one set of weights, in the order of the mesh (D3).

    Attributes:
        prefill: ordering of the prefill weights.
        decode: ordering of the decode weights.
        written: per rank, which of its prefill key/value heads goes to each head of its cache;
            `PADDING` where decode holds a head of zeros and prefill none.
    """

    prefill: Ordering
    decode: Ordering
    written: tuple[Heads, ...]


def place_ranks(config: AttentionConfig, parallelism: Parallelism) -> Placement:
    """Place the ranks of both stages.

    Raises:
        ConfigError: some rank's decode heads were computed by no rank that is still free.

    Source: neuronx-distributed-inference, `get_cp8_tp8_rank_ordering`,
    `get_context_parallel_reordered_tp_mapping`, `get_context_parallel_reordered_dp_mapping` and
    `get_kv_head_indices_context_parallel_*`.
    """
    cp, dp = parallelism.cp_degree, parallelism.attention_dp_degree
    before, after = parallelism.prefill_mesh, parallelism.decode_mesh
    prefill_layout = head_layout(config, before.tp_degree, desired=parallelism.strategy)
    decode_layout = head_layout(config, after.tp_degree, desired=parallelism.strategy)
    prefill = decode = before.inverted
    if cp != dp and cp > 1:
        held = [prefill_layout.kv_part(place % before.tp_degree) for place in prefill]
        decode = assigned(after, decode_layout, lambda rank, part: _has(held[rank], part))
    elif cp != dp:
        decode = tuple(range(after.world_size))
        wanted = [decode_layout.kv_part(rank % after.tp_degree) for rank in decode]
        prefill = assigned(before, prefill_layout, lambda rank, part: _has(part, wanted[rank]))
    written = tuple(
        heads_written(
            prefill_layout.kv_part(prefill[rank] % before.tp_degree),
            decode_layout.kv_part(decode[rank] % after.tp_degree),
        )
        for rank in range(before.world_size)
    )
    return Placement(prefill, decode, written)


def assigned(mesh: Mesh, layout: HeadLayout, fits: Callable[[int, Heads], bool]) -> Ordering:
    """Give each rank, row by row, the first free part of the weights that fits it.

    Where none is free, ranks before it change to others of theirs: a part is found for every rank
    whenever there is one (augmenting paths).

    Args:
        mesh: whose ranks get parts.
        layout: of the parts, all of which are given away in every row.
        fits: whether a part with these key/value heads may go to a rank.

    Returns:
        Per rank, its part plus `tp_degree` for every row before its own.

    Raises:
        ConfigError: some rank is left without.
    """
    ordering = [0] * mesh.world_size
    for row, ranks in enumerate(mesh.rows):
        fitting = {
            rank: [p for p in range(mesh.tp_degree) if fits(rank, layout.kv_part(p))]
            for rank in ranks
        }
        holder: dict[int, int] = {}
        for rank in ranks:
            if not _seat(rank, fitting, holder, set()):
                raise ConfigError(
                    "prefill and decode degrees must leave every rank the key/value heads of its "
                    f"cache; rank {rank} finds none free among {list(layout.kv_heads)} over "
                    f"{mesh.tp_degree} ranks"
                )
        for part, rank in holder.items():
            ordering[rank] = row * mesh.tp_degree + part
    return tuple(ordering)


def _seat(
    rank: int, fitting: Mapping[int, list[int]], holder: dict[int, int], tried: set[int]
) -> bool:
    """Give a rank a part, moving others if it must; tell whether it has one."""
    for part in fitting[rank]:
        if part not in holder:
            holder[part] = rank
            return True
    for part in fitting[rank]:
        if part not in tried:
            tried.add(part)
            if _seat(holder[part], fitting, holder, tried):
                holder[part] = rank
                return True
    return False


def _has(held: Heads, needed: Heads) -> bool:
    return set(needed) <= {*held, PADDING}


def heads_written(held: Heads, cached: Heads) -> Heads:
    """Return which of the heads a rank computed goes to each head of its cache.

    Raises:
        ConfigError: a cached head was not computed.
    """
    if held == cached:
        return tuple(range(len(held)))
    missing = sorted(set(cached) - {*held, PADDING})
    if missing:
        raise ConfigError(f"cached key/value heads must be among {list(held)}, got {missing}")
    return tuple(held.index(head) if head in held else PADDING for head in cached)
