"""Packed sequences on ranks: chunked prefill, whatever the mesh cuts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from golden.arrays import as_float64
from golden.caches.held import Cache, Held
from golden.errors import ShapeError
from golden.packing import Packing, check_row, side_by_side
from golden.sharding.context_attention import Segments
from golden.sharding.encoding import cached_heads, encode_tokens
from golden.sharding.layer import ShardedLayer, ShardedResult
from golden.sharding.observers import RankObserver, unobserved_ranks
from golden.sharding.prefill import check_caches
from golden.sharding.prior import data_parallel_rows, gathered_prior
from golden.sharding.rank_heads import local_rows
from golden.sharding.rules import check_prefill


def encode_packed_sharded(
    layer: ShardedLayer,
    hidden_states: Any,
    *,
    query_lens: Sequence[int],
    key_lens: Sequence[int],
    caches: Sequence[Cache],
    seq_ids: Any = None,
    observe: RankObserver = unobserved_ranks,
) -> ShardedResult[Any]:
    """Run packed sequences through the layer on every rank: chunked prefill.

    D28: the ranks' outputs are those of `golden.packed_forward`. A packed step is a prefill, also
        where sequences bring one token each: the row is cut over ranks by its tokens, wherever
        sequences end, and each rank's queries find the keys of their own sequence among all of the
        row and of the caches (D27). Sequences are what data-parallel ranks divide: each is cached
        by the ranks that own its id (D20).

    Args:
        layer: cut by `shard`.
        hidden_states: `(1, q_len, hidden_size)`, whole and in order; tokens behind the last
            sequence's are padding.
        query_lens: new tokens of each sequence.
        key_lens: tokens of each sequence, cached ones included.
        caches: by rank, what earlier tokens left; not changed.
        seq_ids: `(sequences,)`, int, the cache row of each sequence over all data-parallel ranks;
            an id outside of all makes the sequence padding. None takes rows in order.
        observe: gives each rank an observer.

    Raises:
        ShapeError: an array does not fit.
        ConfigError: the row cannot be cut, lengths do not fit each other, a cache has no slot for
            a token, or RoPE is scaled by the length of the row.

    Source: Agrawal et al. (2023), SARATHI, arXiv 2308.16369. neuronx-distributed-inference packs
    sequences under tensor parallelism alone.
    """
    hidden = as_float64(
        "hidden_states",
        hidden_states,
        (None, None, layer.config.input_size),
        "(batch, q_len, hidden)",
    )
    packing = Packing(tuple(query_lens), tuple(key_lens))
    check_row(layer.config, packing, hidden.shape[:2])
    check_prefill(layer.config, layer.parallelism, batch=None, q_len=hidden.shape[1])
    check_caches(layer, caches)
    sequences, rows = len(packing.key_lens), caches[0].rows * len(layer.decode.mesh.rows)
    if seq_ids is None and sequences != rows:
        raise ShapeError(f"the caches must have a row per sequence, {sequences}, got {rows}")
    owned = data_parallel_rows(layer, caches, seq_ids, sequences) >= 0
    seats = np.where(owned[:, None], packing.rows, -1)
    positions, segments = packing.in_row(seats, hidden.shape[1])
    observers = [observe(rank) for rank in range(len(caches))]
    found = gathered_prior(layer, caches, seats, seq_ids, observers)
    prior, of_slots = _in_row(found)
    encoded = encode_tokens(
        layer, hidden, positions, observers, prior=prior, segments=Segments(segments, of_slots)
    )
    written = tuple(
        cache.write(
            packing.by_sequence(cached_heads(encoded.keys[r].k, layer.written[r])),
            packing.by_sequence(cached_heads(encoded.keys[r].v, layer.written[r])),
            packing.rows,
            seq_ids=local_rows(seq_ids, sequences, layer.decode.mesh.row_of(r), cache.rows),
        )
        for r, cache in enumerate(caches)
    )
    return ShardedResult(encoded.outputs, encoded.tokens, written, encoded.residuals)


def _in_row(found: Sequence[Held] | None) -> tuple[list[Held] | None, Any]:
    if found is None:
        return None, np.zeros((1, 0), dtype=np.int64)
    flat = [side_by_side(held) for held in found]
    return [held for held, _ in flat], flat[0][1]
