"""What a prefill finds in the caches of all ranks: earlier pieces of a prompt, a cached prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from golden.arrays import Positions
from golden.caches.held import Cache, Held, Rows
from golden.sharding.flash_decoding import core_groups
from golden.sharding.head_layout import PADDING
from golden.sharding.layer import ShardedLayer
from golden.sharding.rank_heads import local_rows
from golden.stages import Observer


def data_parallel_rows(layer: ShardedLayer, caches: Sequence[Cache], ids: Any, batch: int) -> Rows:
    """Return which data-parallel rank owns each sequence (D20), -1 where none does.

    Raises:
        ShapeError: `ids` is not `(batch,)` integers.
    """
    owners = np.full(batch, -1, dtype=np.int64)
    for row, ranks in enumerate(layer.decode.mesh.rows):
        local = local_rows(ids, batch, row, caches[ranks[0]].rows)
        owners[local >= 0] = row
    return owners


def gathered_prior(
    layer: ShardedLayer,
    caches: Sequence[Cache],
    positions: Positions,
    seq_ids: Any,
    observers: Sequence[Observer],
) -> list[Held] | None:
    """Gather the cached keys that each rank's prefill reads: of its prefill heads, of every row.

    D27: a rank's cache holds its decode heads, for its rows of the batch, and under flash decoding
        its tokens. Prefill reads other heads where the stages shard unlike, every row, and all
        tokens: each from a rank that holds it. The ranks of a data-parallel row hold every head
        between them, so none is missing; where prefill has a head of zeros, so are its cached
        keys. Copies of a head are alike, so it does not matter whose is read.

    Args:
        layer: the layer.
        caches: by rank.
        positions: `(batch, q_len)`, of the call; -1 for padding.
        seq_ids: `(batch,)`, int, the cache row of each batch row over all data-parallel ranks, or
            None.
        observers: by rank; see `k_prior` and `v_prior`.

    Returns:
        By rank, keys and values `(batch, prefill heads of the rank, slots, head_dim)` with their
        positions; None if no rank holds a key before the call's first tokens.

    Raises:
        ShapeError: `seq_ids` does not fit.
    """
    batch = positions.shape[0]
    found = [
        cache.prior(
            positions,
            seq_ids=local_rows(seq_ids, batch, layer.decode.mesh.row_of(rank), cache.rows),
        )
        for rank, cache in enumerate(caches)
    ]
    if all((held.positions < 0).all() for held in found):
        return None
    if layer.parallelism.cores_per_group > 1:
        for group in core_groups(layer):
            joined = Held(
                np.concatenate([found[rank].k for rank in group], axis=2),
                np.concatenate([found[rank].v for rank in group], axis=2),
                np.concatenate([found[rank].positions for rank in group], axis=1),
            )
            for rank in group:
                found[rank] = joined
    owners = np.maximum(data_parallel_rows(layer, caches, seq_ids, batch), 0)
    return [_of_rank(layer, found, owners, rank, see) for rank, see in enumerate(observers)]


def _of_rank(
    layer: ShardedLayer, found: Sequence[Held], owners: Rows, rank: int, observe: Observer
) -> Held:
    """Put together what one rank reads, row by row of the batch and head by head."""
    stage = layer.prefill
    heads = stage.layout.kv_part(stage.part(rank))
    batch, _, slots, width = found[rank].k.shape
    k = np.zeros((batch, len(heads), slots, width))
    v, positions = np.zeros_like(k), np.full((batch, slots), -1, dtype=np.int64)
    for row, sequences in _sequences_by_row(owners):
        positions[sequences] = found[layer.decode.mesh.rows[row][0]].positions[sequences]
        for slot, head in enumerate(heads):
            if head != PADDING:
                source, place = _holder(layer, rank, row, head)
                k[sequences, slot] = found[source].k[sequences, place]
                v[sequences, slot] = found[source].v[sequences, place]
    return Held(observe("k_prior", k), observe("v_prior", v), positions)


def _sequences_by_row(owners: Rows) -> list[tuple[int, Rows]]:
    return [(int(row), np.flatnonzero(owners == row)) for row in np.unique(owners)]


def _holder(layer: ShardedLayer, rank: int, row: int, head: int) -> tuple[int, int]:
    """Return a rank of a data-parallel row that caches a head, and which of its heads that is.

    The rank itself if it can be, else one of its columns, else any.
    """
    decode, before = layer.decode, layer.prefill.mesh
    column = before.columns[before.column_of(rank)]
    for source in (rank, *column, *decode.mesh.rows[row]):
        cached = decode.layout.kv_part(decode.part(source))
        if decode.mesh.row_of(source) == row and head in cached:
            return source, cached.index(head)
    raise AssertionError(f"data-parallel row {row} lacks key/value head {head}")
