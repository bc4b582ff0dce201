"""Cuts attention into pieces of work: which queries go together, and which keys they read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.arrays import Positions
from golden.blockwise_tile import EVERYTHING, TileWork
from golden.errors import ShapeError
from golden.masks import Mask
from golden.stages import Array
from golden.tiles import (
    BoolArray,
    Cells,
    Run,
    cells_of,
    occupied_coverage,
    runs_of,
)

Place = tuple[int, slice, slice]
"""Batch row, KV heads and queries that a piece of work is about."""

Tile = tuple[int, int, tuple[Run, ...]]
"""First query, past the last query, and the keys they read."""

PlannedTile = tuple[int, int, list[list[tuple[Run, ...]]]]
"""The same with the keys by batch row and KV head; by batch row alone if all heads are alike."""

KEY_CELL = 64
"""Keys that are classified together: finer skips more, coarser plans faster."""

CELLS_WIDENED = 64
"""Key cells that are widened together to measure them: 4 MiB of 128 channels."""

PLANNED_AT_ONCE = 2**21
"""Pairs of query cells and key cells that are classified together: bounds the plan's memory."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamedProblem:
    """The checked arguments of a streamed attention; arrays keep the dtypes they came in.

    Attributes:
        q: `(batch, num_attention_heads, q_len, head_dim)`, BHSD.
        k: `(batch, num_key_value_heads, kv_len, head_dim)`, BHSD.
        v: `(batch, num_key_value_heads, kv_len, value_dim)`, BHSD.
        q_positions: `(batch, q_len)`.
        kv_positions: `(batch, kv_len)`.
        mask: which keys a query may see; True = attend.
        scale: factor on the dot products.
        sinks: `(num_attention_heads,)` or None.
        softcap: cap of the scaled scores or None.
        q_tile: queries of a tile.
        kv_tile: keys that a tile reads at one go.
        q_cell: queries that are classified together; divides `q_tile`.
        tiles_per_work: tiles of queries that travel together.
        heads_per_work: KV heads that travel together where the mask treats heads alike; divides
            their number.
    """

    q: NDArray[np.generic]
    k: NDArray[np.generic]
    v: NDArray[np.generic]
    q_positions: Positions
    kv_positions: Positions
    mask: Mask
    scale: float
    sinks: Array | None
    softcap: float | None
    q_tile: int
    kv_tile: int
    q_cell: int
    tiles_per_work: int
    heads_per_work: int

    def changed(self, **fields: Any) -> StreamedProblem:
        """Return the problem with some of its fields replaced."""
        return replace(self, **fields)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return int(self.q.shape[1] // self.k.shape[1])

    @cached_property
    def key_cells(self) -> Cells:
        """The keys in cells."""
        return cells_of(self.kv_positions, min(KEY_CELL, self.kv_tile))

    def works(self) -> Iterator[tuple[Place, TileWork]]:
        """Yield the pieces of work, the last queries first: under a causal mask, the longest.

        Raises:
            ShapeError: the mask does not fit the batch, the heads, the queries or the keys.
        """
        self._check_mask()
        reaches = {b: self._reach(b) for b in range(len(self.k))}
        for rows, tiles in self._planned():
            for b in range(len(self.k)):
                for heads, runs_of_tiles in self._by_heads(b, tiles):
                    yield (b, heads, rows), self._work(b, heads, rows, runs_of_tiles, reaches[b])

    def heads(self, kv_heads: slice) -> slice:
        """Return the query heads that read these KV heads."""
        return slice(kv_heads.start * self.group, kv_heads.stop * self.group)

    def _reach(self, batch: int) -> Array:
        """Return the length of the longest key of each cell, `(num_key_value_heads, cells)`."""
        edges = self.key_cells.edges
        return np.stack([reach_of(k, edges) for k in self.k[batch]])

    def _by_heads(
        self, batch: int, tiles: list[PlannedTile]
    ) -> Iterator[tuple[slice, tuple[Tile, ...]]]:
        """Yield neighbouring KV heads and the tiles they share."""
        alike = all(len(runs[batch]) == 1 for _, _, runs in tiles)
        step = self.heads_per_work if alike else 1
        for first in range(0, self.k.shape[1], step):
            at = 0 if alike else first
            shared = tuple((start, stop, runs[batch][at]) for start, stop, runs in tiles)
            yield slice(first, first + step), shared

    def _check_mask(self) -> None:
        """Let the mask look at one tile of everything, so that it checks its own shape."""
        whole = self.mask.coverage(
            *(
                cells_of(positions, max(1, positions.shape[1]))
                for positions in (self.q_positions, self.kv_positions)
            )
        )
        heads = np.broadcast_shapes(whole.some.shape, whole.every.shape)[1]
        if heads not in (1, self.q.shape[1]):
            raise ShapeError(
                f"mask must speak of 1 or {self.q.shape[1]} heads (num_attention_heads), got "
                f"{heads}"
            )

    def _planned(self) -> Iterator[tuple[slice, list[PlannedTile]]]:
        """Yield the queries of each piece of work and its tiles."""
        q_len = self.q_positions.shape[1]
        cells = cells_of(self.q_positions, self.q_cell)
        step = self.q_tile * self.tiles_per_work
        at_once = PLANNED_AT_ONCE // max(1, len(self.key_cells.edges)) * self.q_cell
        block = max(1, at_once // step) * step
        for start in reversed(range(0, q_len, block)):
            stop = min(start + block, q_len)
            some, every = self._classified(cells, start, stop)
            for first in reversed(range(start, stop, step)):
                last = min(first + step, stop)
                edges = [*range(first, last, self.q_tile), last]
                yield (
                    slice(first, last),
                    [
                        (q0 - first, q1 - first, self._runs(some, every, q0 - start, q1 - start))
                        for q0, q1 in pairwise(edges)
                    ],
                )

    def _classified(self, cells: Cells, start: int, stop: int) -> tuple[BoolArray, BoolArray]:
        """Return `(batch, 1 or num_key_value_heads, q_cells, kv_cells)`: not empty, and full."""
        queries = cells.part(start // self.q_cell, -(-stop // self.q_cell))
        mask = self.mask.block(EVERYTHING, EVERYTHING, slice(start, stop), EVERYTHING)
        coverage = mask.coverage(queries, self.key_cells)
        coverage = coverage & occupied_coverage(queries, self.key_cells)
        some, every = np.broadcast_arrays(coverage.some, coverage.every)
        if some.shape[1] > 1:
            by_group = (some.shape[0], self.k.shape[1], self.group, *some.shape[2:])
            some = np.logical_or.reduce(some.reshape(by_group), axis=2)
            every = np.logical_and.reduce(every.reshape(by_group), axis=2)
        return some, every

    def _runs(
        self, some: BoolArray, every: BoolArray, first: int, last: int
    ) -> list[list[tuple[Run, ...]]]:
        """Return the runs of a tile by batch row and KV head; of one head if all are alike."""
        cells = slice(first // self.q_cell, -(-last // self.q_cell))
        q_edges = np.minimum(np.arange(cells.start, cells.stop + 1) * self.q_cell, last) - first
        kv_edges = self.key_cells.edges
        return [
            [
                runs_of(some[b, h, cells], every[b, h, cells], q_edges, kv_edges, self.kv_tile)
                for h in range(some.shape[1])
            ]
            for b in range(some.shape[0])
        ]

    def _work(
        self, batch: int, kv_heads: slice, rows: slice, tiles: tuple[Tile, ...], reach: Array
    ) -> TileWork:
        read = [run for _, _, runs in tiles for run in runs]
        keys = slice(
            min((run.start for run in read), default=0), max((run.stop for run in read), default=0)
        )
        cells = slice(
            min((run.first_cell for run in read), default=0),
            max((run.last_cell for run in read), default=0),
        )
        heads, row = self.heads(kv_heads), slice(batch, batch + 1)
        by_group = (-1, self.group, rows.stop - rows.start, self.q.shape[3])
        return TileWork(
            q=self.q[batch, heads, rows].reshape(by_group),
            k=self.k[batch, kv_heads, keys],
            v=self.v[batch, kv_heads, keys],
            q_positions=self.q_positions[row, rows],
            kv_positions=self.kv_positions[row, keys],
            mask=self.mask.block(row, heads, rows, keys),
            tiles=tiles,
            first_key=keys.start,
            first_cell=cells.start,
            reach=reach[kv_heads, cells].max(axis=0),
            sinks=None if self.sinks is None else self.sinks[heads].reshape(-1, self.group),
            scale=self.scale,
            softcap=self.softcap,
        )


def reach_of(k: NDArray[np.generic], edges: Positions) -> Array:
    """Return the Euclidean length of the longest key of each cell, `(cells,)`.

    It is NaN or infinite if a key is not finite or its square overflows.

    Args:
        k: `(keys, head_dim)`, any real dtype.
        edges: `(cells + 1,)`, where each cell starts.
    """
    count = len(edges) - 1
    reach = np.empty(count)
    for first in range(0, count, CELLS_WIDENED):
        cells = slice(first, min(first + CELLS_WIDENED, count))
        keys = k[edges[first] : edges[cells.stop]].astype(np.float64, copy=False)
        with np.errstate(all="ignore"):
            squares = np.einsum("ij,ij->i", keys, keys)
            reach[cells] = np.sqrt(np.maximum.reduceat(squares, edges[cells] - edges[first]))
    return reach
