"""The key/value cache of token generation (decode): contiguous, one slot per position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from golden.arrays import Positions, as_float64, as_positions
from golden.caches.held import Held, before_first, cache_rows, checked_write, rows_of
from golden.config import AttentionConfig
from golden.errors import ConfigError, ShapeError
from golden.stages import Array


@dataclass(frozen=True, slots=True, eq=False)
class ContiguousCache:
    """Keys after RoPE and norm, and values, by slot; position `p` lives in slot `p`.

    Attributes:
        k: `(batch, num_key_value_heads, max_length, head_dim)`, BHSD, float64.
        v: like `k`.
        positions: `(batch, max_length)`, int64; the position held by each slot, -1 if empty.
    """

    k: Array
    v: Array
    positions: Positions

    @property
    def rows(self) -> int:
        """Cache rows: sequences it can hold."""
        return int(self.k.shape[0])

    def prior(self, positions: Positions, *, seq_ids: Any = None) -> Held:
        """Return what tokens at these positions may find, as `golden.caches.held.Cache` says."""
        rows = cache_rows(seq_ids, positions.shape[0], self.rows)
        return before_first(rows_of(Held(self.k, self.v, self.positions), rows), positions)

    def write(self, k: Any, v: Any, positions: Any, *, seq_ids: Any = None) -> ContiguousCache:
        """Return a cache that also holds these keys and values.

        Args:
            k: `(batch, num_key_value_heads, length, head_dim)`, BHSD.
            v: like `k`.
            positions: `(batch, length)`, int; -1 writes nothing.
            seq_ids: `(batch,)`, int, the cache row of each batch row; an id outside the cache
                writes nothing. None takes rows in order.

        Raises:
            ShapeError: arrays do not fit the cache.
            ConfigError: a position is beyond the last slot or stands twice in a row, or two batch
                rows share a cache row.
        """
        batch, heads, max_length, head_dim = self.k.shape
        if seq_ids is not None:
            cache_row = cache_rows(seq_ids, np.shape(k)[0], batch)
            k, v, positions = checked_write((heads, head_dim), k, v, positions, cache_row)
        else:
            cache_row = np.arange(batch)
            k = as_float64("k", k, (batch, heads, None, head_dim), "BHSD")
            v = as_float64("v", v, k.shape, "BHSD")
            positions = as_positions("positions", positions, (batch, k.shape[2]))
        if positions.size and int(positions.max()) >= max_length:
            raise ConfigError(
                f"positions must be below the cache's max_length of {max_length}, got "
                f"{int(positions.max())}; make the cache longer"
            )
        for row in positions:
            given = row[row >= 0]
            if np.unique(given).size != given.size:
                raise ConfigError(f"positions must differ within a row, got {row.tolist()}")
        rows, columns = np.nonzero(positions >= 0)
        slots, written = positions[rows, columns], cache_row[rows]
        new_k, new_v, held = self.k.copy(), self.v.copy(), self.positions.copy()
        new_k[written, :, slots] = k[rows, :, columns]
        new_v[written, :, slots] = v[rows, :, columns]
        held[written, slots] = slots
        return ContiguousCache(new_k, new_v, held)


def empty_cache(config: AttentionConfig, *, batch: int, max_length: int) -> ContiguousCache:
    """Return a cache with `max_length` empty slots per row.

    Raises:
        ConfigError: `batch` or `max_length` is not positive.
    """
    if batch < 1 or max_length < 1:
        raise ConfigError(f"batch and max_length must be positive, got {batch} and {max_length}")
    shape = (batch, config.num_key_value_heads, max_length, config.head_dim)
    return ContiguousCache(
        np.zeros(shape), np.zeros(shape), np.full((batch, max_length), -1, dtype=np.int64)
    )


def filled_cache(config: AttentionConfig, k: Any, v: Any, lengths: Any) -> ContiguousCache:
    """Return a cache whose row `b` holds positions `0 .. lengths[b] - 1`.

    Args:
        config: the layer.
        k: `(batch, num_key_value_heads, max_length, head_dim)`, BHSD; slots at and beyond the
            row's length may hold anything.
        v: like `k`.
        lengths: `(batch,)`, int, positions already held per row.

    Raises:
        ShapeError: arrays do not fit the layer.
        ConfigError: a length is negative or beyond `max_length`.
    """
    heads, head_dim = config.num_key_value_heads, config.head_dim
    k = as_float64("k", k, (None, heads, None, head_dim), "BHSD")
    v = as_float64("v", v, k.shape, "BHSD")
    held = np.asarray(lengths)
    if held.shape != (k.shape[0],) or held.dtype.kind not in "iu":
        raise ShapeError(
            f"lengths must be integers of shape ({k.shape[0]},), got {held.dtype} {held.shape}"
        )
    if held.size and (int(held.min()) < 0 or int(held.max()) > k.shape[2]):
        raise ConfigError(
            f"lengths must lie between 0 and max_length {k.shape[2]}, got {held.tolist()}"
        )
    slots = np.arange(k.shape[2])
    return ContiguousCache(k, v, np.where(slots < held[:, None], slots, -1).astype(np.int64))
