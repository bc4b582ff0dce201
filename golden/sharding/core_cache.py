"""The cache of one core in flash decoding."""

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
class CoreCache:
    """What one core of a key/value group holds: token `t` if `t % cores == core`.

    D21: it is one core of `golden.ShardedCache` (K11), for a rank that sees no other.

    Attributes:
        held: keys, values and positions; token `t` in slot `t // cores`.
        core: which of the group.
        cores: how many there are.
    """

    held: Held
    core: int
    cores: int

    @property
    def rows(self) -> int:
        """Cache rows: sequences it can hold."""
        return int(self.held.positions.shape[0])

    def prior(self, positions: Positions, *, seq_ids: Any = None) -> Held:
        """Return what tokens at these positions find on this core."""
        rows = cache_rows(seq_ids, positions.shape[0], self.rows)
        return before_first(rows_of(self.held, rows), positions)

    def own(self, positions: Positions) -> Positions:
        """Return positions with those of other cores' tokens set to -1."""
        return np.where(positions % self.cores == self.core, positions, -1)

    def write(self, k: Any, v: Any, positions: Any, *, seq_ids: Any = None) -> CoreCache:
        """Return a cache that also holds this core's tokens among these.

        Raises:
            ShapeError: arrays do not fit the cache.
            ConfigError: a position is beyond the last slot, or two tokens share a position.
        """
        rows = cache_rows(seq_ids, np.shape(k)[0], self.rows)
        k, v, positions = checked_write(self.held.geometry, k, v, positions, rows)
        room = self.cores * self.held.positions.shape[1]
        if positions.size and int(positions.max()) >= room:
            raise ConfigError(
                f"positions must be below {room}, {self.cores} cores of "
                f"{self.held.positions.shape[1]} slots, got {int(positions.max())}"
            )
        own = self.own(positions)
        held = scattered(self.held, k, v, own, positions // self.cores, rows)
        return CoreCache(held, self.core, self.cores)


def core_cache(
    config: AttentionConfig, *, batch: int, max_length: int, core: int, cores: int
) -> CoreCache:
    """Return an empty cache of `ceil(max_length / cores)` slots.

    Raises:
        ConfigError: a number is not positive, or `core` is none of them.
    """
    if batch < 1 or max_length < 1 or not 0 <= core < cores:
        raise ConfigError(
            f"batch and max_length must be positive and core below cores, got {batch}, "
            f"{max_length}, core {core} of {cores}"
        )
    return CoreCache(empty_held(config, batch=batch, slots=-(-max_length // cores)), core, cores)
