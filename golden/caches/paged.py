"""The paged (block) cache: sequences own blocks of a shared pool, by block table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.arrays import Positions, as_positions
from golden.caches.held import Held, before_first, cache_rows, checked_write, scattered
from golden.config import AttentionConfig
from golden.errors import ConfigError, ShapeError
from golden.stages import Array

Tables = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class PagedCache:
    """Keys and values in blocks; position `p` of row `b` sits in slot `slot_mapping` gives.

    K6: slot = `table[p // block_size] * block_size + p % block_size`.
    K7: a table entry of -1 is no block: reading finds nothing there, writing is an error.
    K8: a slot counts for a row only if it holds the position its place in the table says, so a
        block that another sequence left behind shows nothing of that sequence.
    K9: two rows may list the same block (a shared prefix); a row must not write into it while
        the other reads, which the cache cannot check.

    Attributes:
        k: `(num_blocks, num_key_value_heads, block_size, head_dim)`, float64.
        v: like `k`.
        held: `(num_blocks, block_size)`, int64; the position each slot holds, -1 if empty.
        block_tables: `(rows, blocks_per_row)`, int64; -1 for none.

    Source: Kwon et al. (2023), PagedAttention, arXiv 2309.06180; neuronx-distributed-inference's
    block cache stores blocks as `(num_blocks, block_size, heads, head_dim)` or as here.
    """

    k: Array
    v: Array
    held: Positions
    block_tables: Tables

    @property
    def block_size(self) -> int:
        """Slots of a block."""
        return int(self.k.shape[2])

    @property
    def rows(self) -> int:
        """Cache rows: sequences it can hold."""
        return int(self.block_tables.shape[0])

    def with_tables(self, block_tables: Any) -> PagedCache:
        """Return the same pool under other tables: rows joined, left or got another block.

        Raises:
            ShapeError: tables are not integers `(rows, blocks_per_row)`.
            ConfigError: a table names a block outside the pool.
        """
        return replace(self, block_tables=checked_tables(block_tables, self.k.shape[0]))

    def prior(self, positions: Positions, *, seq_ids: Any = None) -> Held:
        """Gather each row's blocks in order, as `golden.caches.held.Cache` says."""
        tables = self._tables(seq_ids, positions.shape[0])
        batch, blocks = tables.shape
        used = np.maximum(tables, 0)
        heads, head_dim = self.k.shape[1], self.k.shape[3]
        shape = (batch, heads, blocks * self.block_size, head_dim)
        k = self.k[used].swapaxes(1, 2).reshape(shape)
        v = self.v[used].swapaxes(1, 2).reshape(shape)
        place = np.arange(blocks * self.block_size)
        found = self.held[used].reshape(batch, -1) == place
        found &= np.repeat(tables >= 0, self.block_size, axis=1)
        return before_first(Held(k, v, np.where(found, place, -1)), positions)

    def write(self, k: Any, v: Any, positions: Any, *, seq_ids: Any = None) -> PagedCache:
        """Return a cache that also holds these keys and values.

        Raises:
            ShapeError: arrays do not fit the cache.
            ConfigError: a position has no block, or two tokens share a slot.
        """
        batch = np.shape(k)[0]
        rows = cache_rows(seq_ids, batch, self.rows)
        geometry = (self.k.shape[1], self.k.shape[3])
        k, v, positions = checked_write(geometry, k, v, positions, rows)
        tables = self._tables(seq_ids, batch)
        return self.write_slots(k, v, slot_mapping(tables, positions, self.block_size), positions)

    def write_slots(self, k: Array, v: Array, slots: Positions, positions: Positions) -> PagedCache:
        """Return a cache with entries written at slots of the pool.

        Args:
            k: `(batch, num_key_value_heads, length, head_dim)`, BHSD.
            v: like `k`.
            slots: `(batch, length)`, int64, block times block_size plus offset; -1 writes nothing.
            positions: `(batch, length)`, int64, what the slots then hold.

        Raises:
            ConfigError: a slot lies outside the pool, or two tokens share one.
        """
        pool = self.k.shape[0] * self.block_size
        if slots.size and int(slots.max()) >= pool:
            raise ConfigError(f"slots must be below the pool's {pool}, got {int(slots.max())}")
        flat = scattered(
            Held(
                self.k.swapaxes(0, 1).reshape(1, self.k.shape[1], pool, -1),
                self.v.swapaxes(0, 1).reshape(1, self.v.shape[1], pool, -1),
                self.held.reshape(1, pool),
            ),
            k,
            v,
            np.where(slots >= 0, positions, -1),
            slots,
            np.zeros(slots.shape[0], dtype=np.int64),
        )
        heads, blocks = self.k.shape[1], self.k.shape[0]
        shape = (heads, blocks, self.block_size, -1)
        return replace(
            self,
            k=flat.k[0].reshape(shape).swapaxes(0, 1),
            v=flat.v[0].reshape(shape).swapaxes(0, 1),
            held=flat.positions.reshape(blocks, self.block_size),
        )

    def _tables(self, seq_ids: Any, batch: int) -> Tables:
        rows = cache_rows(seq_ids, batch, self.rows)
        return np.where(rows[:, None] >= 0, self.block_tables[np.maximum(rows, 0)], -1)


def slot_mapping(block_tables: Any, positions: Any, block_size: int) -> Positions:
    """Return the slot of each token (K6), -1 for a position of -1.

    Args:
        block_tables: `(batch, blocks_per_row)`, int; -1 for none.
        positions: `(batch, length)`, int.
        block_size: slots of a block.

    Returns:
        `(batch, length)`, int64.

    Raises:
        ConfigError: a position lies beyond its table, or in an entry of -1.

    Source: neuronx-distributed-inference, `generate_tokengen_slot_mapping`.
    """
    tables = np.asarray(block_tables)
    positions = as_positions("positions", positions, (tables.shape[0], np.shape(positions)[-1]))
    place = np.maximum(positions, 0) // block_size
    inside = place < tables.shape[1]
    block = np.take_along_axis(tables, np.minimum(place, tables.shape[1] - 1), axis=1)
    homeless = (positions >= 0) & ~(inside & (block >= 0))
    if bool(homeless.any()):
        row, column = (int(i) for i in np.argwhere(homeless)[0])
        raise ConfigError(
            f"row {row} has no block for position {int(positions[row, column])}; its table is "
            f"{tables[row].tolist()} with a block_size of {block_size}"
        )
    slots = block * block_size + positions % block_size
    return np.where(positions >= 0, slots, -1).astype(np.int64)


def checked_tables(block_tables: Any, num_blocks: int) -> Tables:
    """Return block tables as int64 after checking them against the pool.

    Raises:
        ShapeError: not integers `(rows, blocks_per_row)` with at least one block per row.
        ConfigError: a table names a block outside the pool.
    """
    tables = np.asarray(block_tables)
    if tables.ndim != 2 or tables.dtype.kind not in "iu" or tables.shape[1] == 0:
        raise ShapeError(
            "block_tables must be integers of shape (rows, blocks_per_row), got "
            f"{tables.dtype} {tables.shape}"
        )
    if tables.size and not -1 <= int(tables.min()) <= int(tables.max()) < num_blocks:
        raise ConfigError(
            f"block_tables must name blocks 0 to {num_blocks - 1} or -1, got {tables.tolist()}"
        )
    return tables.astype(np.int64)


def paged_cache(
    config: AttentionConfig, *, num_blocks: int, block_size: int, block_tables: Any
) -> PagedCache:
    """Return an empty pool under these block tables.

    Raises:
        ShapeError: tables are not integers `(rows, blocks_per_row)`.
        ConfigError: a size is not positive, or a table names a block outside the pool.
    """
    if num_blocks < 1 or block_size < 1:
        raise ConfigError(
            f"num_blocks and block_size must be positive, got {num_blocks} and {block_size}"
        )
    shape = (num_blocks, config.num_key_value_heads, block_size, config.head_dim)
    held = np.full((num_blocks, block_size), -1, dtype=np.int64)
    tables = checked_tables(block_tables, num_blocks)
    return PagedCache(np.zeros(shape), np.zeros(shape), held, tables)
