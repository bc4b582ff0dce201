"""The cache of flash decoding: one sequence's slots spread over the cores of a KV group."""

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
    rows_of,
    scattered,
)
from golden.config import AttentionConfig
from golden.errors import ConfigError


@dataclass(frozen=True, slots=True, eq=False)
class ShardedCache:
    """Keys and values by core; token `t` lives on core `t % cores` in slot `t // cores`.

    K11: with 3 cores, tokens 0 to 6 lie as `0 3 6 | 1 4 - | 2 5 -`.
    K12: cores attend to their own slots; `golden.merge_attended` joins the results through
        their logsumexp, the sink counted on one core.

    Attributes:
        cores: per core what it holds, each `(batch, heads, slots, head_dim)`.

    Source: neuronx-distributed-inference, flash decoding (`num_cores_per_group`).
    """

    cores: tuple[Held, ...]

    @property
    def rows(self) -> int:
        """Cache rows: sequences it can hold."""
        return int(self.cores[0].positions.shape[0])

    def prior(self, positions: Positions, *, seq_ids: Any = None) -> Held:
        """Return every core's slots side by side, core 0 first."""
        shards = self.shards(positions, seq_ids=seq_ids)
        return Held(
            np.concatenate([shard.k for shard in shards], axis=2),
            np.concatenate([shard.v for shard in shards], axis=2),
            np.concatenate([shard.positions for shard in shards], axis=1),
        )

    def shards(self, positions: Positions, *, seq_ids: Any = None) -> tuple[Held, ...]:
        """Return what tokens at these positions may find on each core."""
        rows = cache_rows(seq_ids, positions.shape[0], self.rows)
        return tuple(before_first(rows_of(core, rows), positions) for core in self.cores)

    def write(self, k: Any, v: Any, positions: Any, *, seq_ids: Any = None) -> ShardedCache:
        """Return a cache that also holds these keys and values.

        Raises:
            ShapeError: arrays do not fit the cache.
            ConfigError: a position is beyond the last slot, or two tokens share a position.
        """
        first = self.cores[0]
        rows = cache_rows(seq_ids, np.shape(k)[0], self.rows)
        k, v, positions = checked_write(first.geometry, k, v, positions, rows)
        count, room = len(self.cores), len(self.cores) * first.positions.shape[1]
        if positions.size and int(positions.max()) >= room:
            raise ConfigError(
                f"positions must be below {room}, {count} cores of {first.positions.shape[1]} "
                f"slots, got {int(positions.max())}"
            )
        owner, slots = positions % count, positions // count
        return ShardedCache(
            tuple(
                scattered(held, k, v, np.where(owner == core, positions, -1), slots, rows)
                for core, held in enumerate(self.cores)
            )
        )


def sharded_cache(
    config: AttentionConfig, *, batch: int, max_length: int, cores: int
) -> ShardedCache:
    """Return an empty cache of `ceil(max_length / cores)` slots on each core.

    Raises:
        ConfigError: a number is not positive.
    """
    if batch < 1 or max_length < 1 or cores < 1:
        raise ConfigError(
            f"batch, max_length and cores must be positive, got {batch}, {max_length} and {cores}"
        )
    slots = -(-max_length // cores)
    empty = empty_held(config, batch=batch, slots=slots)
    return ShardedCache((empty,) * cores)
