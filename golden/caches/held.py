"""What every cache offers: keys, values and the position each holds, and how to write more."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from golden.arrays import Positions, as_float64, as_positions
from golden.config import AttentionConfig
from golden.errors import ConfigError, ShapeError
from golden.stages import Array

Rows = NDArray[np.int64]
"""Which cache row each batch row reads and writes, `(batch,)`; -1 for none."""

C = TypeVar("C", bound="Cache")


class Held(NamedTuple):
    """Keys and values with their positions, as `attend()` takes them.

    Attributes:
        k: `(batch, num_key_value_heads, slots, head_dim)`, BHSD, float64.
        v: like `k`.
        positions: `(batch, slots)`, int64; the position each slot holds, -1 if empty.
    """

    k: Array
    v: Array
    positions: Positions

    @property
    def geometry(self) -> tuple[int, int]:
        """`(num_key_value_heads, head_dim)`."""
        return int(self.k.shape[1]), int(self.k.shape[3])

    def and_active(self, k: Array, v: Array, positions: Positions) -> Held:
        """Return these keys followed by a step's own."""
        return Held(
            np.concatenate([self.k, k], axis=2),
            np.concatenate([self.v, v], axis=2),
            np.concatenate([self.positions, positions], axis=1),
        )


def empty_held(config: AttentionConfig, *, batch: int, slots: int) -> Held:
    """Return `slots` empty slots per row for a layer's keys and values."""
    shape = (batch, config.num_key_value_heads, slots, config.head_dim)
    return Held(np.zeros(shape), np.zeros(shape), np.full((batch, slots), -1, dtype=np.int64))


class Cache(Protocol):
    """Keys and values of earlier tokens, wherever they are stored.

    C1: a call's tokens read what was held before the call (`prior`) and each other, then are
        written; so a cache may be as short as the mask reaches.
    C2: a token at position `p` reads only positions before its row's first; later ones are left
        from drafts that were rejected, and never seen again.
    C3: position -1 writes nothing, and neither does a sequence id outside the cache.
    """

    @property
    def rows(self) -> int:
        """Cache rows: sequences it can hold."""
        ...

    def prior(self, positions: Positions, *, seq_ids: Any = None) -> Held:
        """Return what tokens at these positions may find, before they are written.

        Args:
            positions: `(batch, length)`, int; -1 for padding.
            seq_ids: `(batch,)`, int, the cache row of each batch row; an id outside the cache is
                an idle row, which finds nothing. None takes rows in order.
        """
        ...

    def write(self: C, k: Any, v: Any, positions: Any, *, seq_ids: Any = None) -> C:
        """Return a cache that also holds these keys and values.

        Args:
            k: `(batch, num_key_value_heads, length, head_dim)`, BHSD.
            v: like `k`.
            positions: `(batch, length)`, int; -1 writes nothing.
            seq_ids: as in `prior`.
        """
        ...


def cache_rows(seq_ids: Any, batch: int, rows: int) -> Rows:
    """Return the cache row of each batch row, -1 where its sequence id has none.

    Raises:
        ShapeError: `seq_ids` is not `(batch,)` integers, or is missing with another batch.
        ConfigError: two batch rows share a cache row.
    """
    if seq_ids is None:
        if batch != rows:
            raise ShapeError(
                f"the batch must have the cache's {rows} rows, got {batch}; give seq_ids"
            )
        return np.arange(rows)
    ids = np.asarray(seq_ids)
    if ids.shape != (batch,) or ids.dtype.kind not in "iu":
        raise ShapeError(
            f"seq_ids must be integers of shape ({batch},), got {ids.dtype} {ids.shape}"
        )
    ids = np.where((ids >= 0) & (ids < rows), ids, -1).astype(np.int64)
    used = ids[ids >= 0]
    if len(set(used.tolist())) != used.size:
        raise ConfigError(f"seq_ids must name each cache row once, got {ids.tolist()}")
    return ids


def checked_write(
    shape: tuple[int, int], k: Any, v: Any, positions: Any, rows: Rows
) -> tuple[Array, Array, Positions]:
    """Return a write's arrays, checked, with the positions of idle rows set to -1.

    Args:
        shape: `(num_key_value_heads, head_dim)` of the cache.
        k: keys, BHSD.
        v: values, BHSD.
        positions: `(batch, length)`, int.
        rows: of `cache_rows`.

    Raises:
        ShapeError: arrays do not fit the cache.
    """
    heads, head_dim = shape
    k = as_float64("k", k, (rows.size, heads, None, head_dim), "BHSD")
    v = as_float64("v", v, k.shape, "BHSD")
    positions = as_positions("positions", positions, (rows.size, k.shape[2]))
    return k, v, np.where(rows[:, None] >= 0, positions, -1)


def seated(cache: Cache, positions: Positions, seq_ids: Any) -> Positions:
    """Return positions with those of rows that have no place in the cache set to -1."""
    rows = cache_rows(seq_ids, positions.shape[0], cache.rows)
    return np.where(rows[:, None] >= 0, positions, -1)


def before_first(held: Held, positions: Positions) -> Held:
    """Empty the slots at and beyond each row's first position (C2); an idle row's all."""
    return held._replace(
        positions=np.where(held.positions < first_positions(positions)[:, None], held.positions, -1)
    )


def first_positions(positions: Positions) -> Positions:
    """Return each row's smallest position, `(batch,)`; 0 for a row of padding alone."""
    beyond = np.iinfo(np.int64).max
    first = np.where(positions >= 0, positions, beyond).min(axis=1, initial=beyond)
    return np.where(first == beyond, 0, first)


def rows_of(held: Held, rows: Rows) -> Held:
    """Return the rows of a cache that a batch reads; idle rows hold nothing."""
    used = np.maximum(rows, 0)
    positions = np.where(rows[:, None] >= 0, held.positions[used], -1)
    return Held(held.k[used], held.v[used], positions)


def scattered(
    held: Held, k: Array, v: Array, positions: Positions, slots: Positions, rows: Rows
) -> Held:
    """Return `held` with entries written at `(rows[b], slots[b, t])` where a position is not -1.

    Raises:
        ConfigError: two tokens of a row share a slot.
    """
    batch, columns = np.nonzero(positions >= 0)
    to_row, to_slot = rows[batch], slots[batch, columns]
    if len(set(zip(to_row.tolist(), to_slot.tolist(), strict=True))) != to_slot.size:
        raise ConfigError("two tokens of one call share a slot; write them in separate calls")
    new_k, new_v, new_positions = held.k.copy(), held.v.copy(), held.positions.copy()
    new_k[to_row, :, to_slot] = k[batch, :, columns]
    new_v[to_row, :, to_slot] = v[batch, :, columns]
    new_positions[to_row, to_slot] = positions[batch, columns]
    return Held(new_k, new_v, new_positions)
