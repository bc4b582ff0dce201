"""The cache of chunked attention: the current chunk and no other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from golden.arrays import Positions
from golden.caches.held import (
    Held,
    before_first,
    cache_rows,
    checked_write,
    empty_held,
    first_positions,
    rows_of,
    scattered,
)
from golden.config import AttentionConfig
from golden.errors import ConfigError


@dataclass(frozen=True, slots=True, eq=False)
class ChunkCache:
    """The keys of the current chunk, token `t` in slot `t % slots`.

    K4: after a call only the chunk of its row's last token is held; other slots are empty, so
        the first token of a new chunk finds nothing.
    K5: `slots = chunk_size` keeps one chunk whole. Drafts that crossed into a new chunk and were
        rejected have lost the old one, which is an error when they step back.

    With chunks of 4, slots after a prompt whose last position is 6: `4 5 6 -`.

    Attributes:
        held: keys, values and positions by slot.
        chunk_size: positions per chunk.

    Source: neuronx-distributed-inference, chunked attention's cache update.
    """

    held: Held
    chunk_size: int

    @property
    def positions(self) -> Positions:
        """The position each slot holds, `(batch, slots)`; -1 if empty."""
        return self.held.positions

    @property
    def rows(self) -> int:
        """Cache rows: sequences it can hold."""
        return int(self.held.positions.shape[0])

    def prior(self, positions: Positions, *, seq_ids: Any = None) -> Held:
        """Return what is left of the chunk (C1, C2).

        Raises:
            ConfigError: rejected drafts reached into a later chunk.
        """
        rows = cache_rows(seq_ids, positions.shape[0], self.rows)
        held = rows_of(self.held, rows)
        first = first_positions(positions)[:, None]
        later = held.positions // self.chunk_size > first // self.chunk_size
        crossed = later & (first % self.chunk_size > 0) & (positions >= 0).any(1, keepdims=True)
        if bool(crossed.any()):
            raise ConfigError(
                "rejected drafts crossed into a new chunk, whose first token emptied the cache of "
                f"chunk_size {self.chunk_size}; speculate no further than the chunk's end"
            )
        return before_first(held, positions)

    def write(self, k: Any, v: Any, positions: Any, *, seq_ids: Any = None) -> ChunkCache:
        """Return a cache that holds these keys and values of the newest chunk (K4).

        Raises:
            ShapeError: arrays do not fit the cache.
            ConfigError: two tokens of a row share a position.
        """
        rows = cache_rows(seq_ids, np.shape(k)[0], self.rows)
        k, v, positions = checked_write(self.held.geometry, k, v, positions, rows)
        chunk = positions.max(axis=1, initial=-1, keepdims=True) // self.chunk_size
        kept = np.where(positions // self.chunk_size == chunk, positions, -1)
        held = scattered(self.held, k, v, kept, kept % self.chunk_size, rows)
        current = np.full((held.positions.shape[0], 1), -1, dtype=np.int64)
        current[rows[rows >= 0]] = chunk[rows >= 0]
        stale = (current >= 0) & (held.positions // self.chunk_size != current)
        empty = stale[:, None, :, None]
        return ChunkCache(
            Held(
                np.where(empty, 0.0, held.k),
                np.where(empty, 0.0, held.v),
                np.where(stale, -1, held.positions),
            ),
            self.chunk_size,
        )


def chunk_cache(config: AttentionConfig, *, batch: int) -> ChunkCache:
    """Return an empty chunk cache for a layer with attention chunks.

    Raises:
        ConfigError: the layer has no chunks, or `batch` is not positive.
    """
    if config.attention_chunk_size is None:
        raise ConfigError("a chunk cache needs a layer with attention_chunk_size, got one without")
    if batch < 1:
        raise ConfigError(f"batch must be positive, got {batch}")
    size = config.attention_chunk_size
    return ChunkCache(empty_held(config, batch=batch, slots=size), size)
