"""What a mask says of many queries and keys at once, so that whole tiles can be skipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from golden.arrays import Positions

BoolArray: TypeAlias = NDArray[np.bool_]
Indices: TypeAlias = "slice | NDArray[np.int64]"

FAR = 2**62
"""Lowest position of a cell without any: beyond every position, and no difference overflows."""


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """Neighbouring indices in cells, and the range of the positions that each cell holds.

    Attributes:
        edges: `(cells + 1,)`, int64; cell `c` holds the indices `edges[c]` to `edges[c + 1] - 1`.
        lowest: `(batch, cells)`, int64, over occupied slots; `FAR` where none is.
        highest: `(batch, cells)`, int64, over occupied slots; -1 where none is.
        solid: `(batch, cells)`, bool; True where every slot is occupied.
    """

    edges: Positions
    lowest: Positions
    highest: Positions
    solid: BoolArray

    @property
    def length(self) -> int:
        """Number of indices in all cells together."""
        return int(self.edges[-1])

    @property
    def occupied(self) -> BoolArray:
        """`(batch, cells)`: True where some slot is occupied."""
        return self.highest >= 0

    def part(self, first: int, last: int) -> Cells:
        """Return the cells from `first` to `last - 1`; indices count from the first of them."""
        return Cells(
            self.edges[first : last + 1] - self.edges[first],
            self.lowest[:, first:last],
            self.highest[:, first:last],
            self.solid[:, first:last],
        )


def cells_of(positions: Positions, size: int) -> Cells:
    """Cut positions into cells of `size` slots, the last one shorter if need be.

    Args:
        positions: `(batch, length)`, int64, -1 for an empty slot.
        size: slots of a cell, at least 1.
    """
    length = positions.shape[1]
    starts = np.arange(0, length, size)
    edges = np.append(starts, length)
    occupied = positions >= 0
    return Cells(
        edges,
        np.minimum.reduceat(np.where(occupied, positions, FAR), starts, axis=1),
        np.maximum.reduceat(positions, starts, axis=1),
        np.logical_and.reduceat(occupied, starts, axis=1),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Coverage:
    """Bounds of a mask over tiles, one cell of queries by one of keys; they compose like masks.

    A tile is empty where `some` is False, full where `every` is True, partial otherwise. Bounds
    may be loose, never wrong: a tile called partial may turn out empty or full.

    Attributes:
        some: `(batch, num_attention_heads, q_cells, kv_cells)` or broadcastable to it, bool;
            False promises that no query of the tile sees a key of it.
        every: likewise; True promises that every query of the tile sees every key of it, as long
            as all slots of the tile are occupied.
    """

    some: BoolArray
    every: BoolArray

    def __and__(self, other: Coverage) -> Coverage:
        return Coverage(self.some & other.some, self.every & other.every)

    def __or__(self, other: Coverage) -> Coverage:
        return Coverage(self.some | other.some, self.every | other.every)


UNKNOWN = Coverage(np.ones((1, 1, 1, 1), dtype=np.bool_), np.zeros((1, 1, 1, 1), dtype=np.bool_))
"""Coverage of a mask that says nothing about tiles: all are partial."""


def occupied_coverage(queries: Cells, keys: Cells) -> Coverage:
    """Return the coverage of the rule that padded queries and empty slots take no part."""
    return Coverage(
        queries.occupied[:, None, :, None] & keys.occupied[:, None, None, :],
        queries.solid[:, None, :, None] & keys.solid[:, None, None, :],
    )


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring key cells that neighbouring queries of a tile read at one go.

    Attributes:
        first_query: the first query, counted from the tile's first.
        last_query: one past the last query.
        first_cell: the first key cell.
        last_cell: one past the last key cell.
        start: the first key.
        stop: one past the last key.
        partial: key ranges `(start, stop)` in it where some query does not see some key.
    """

    first_query: int
    last_query: int
    first_cell: int
    last_cell: int
    start: int
    stop: int
    partial: tuple[tuple[int, int], ...]


def runs_of(
    some: BoolArray, every: BoolArray, q_edges: Positions, kv_edges: Positions, longest: int
) -> tuple[Run, ...]:
    """Join the key cells that a tile of queries sees into runs.

    A key cell is read by the queries from the first cell that sees it to the last; neighbouring
    key cells that the same queries read are joined, and cut evenly into runs of at most `longest`
    keys (a single cell may hold more).

    Args:
        some: `(q_cells, kv_cells)` of one tile of queries, False = empty.
        every: `(q_cells, kv_cells)`, True = full.
        q_edges: `(q_cells + 1,)`, where each query cell starts, counted from the tile's first.
        kv_edges: `(kv_cells + 1,)`, where each key cell starts.
        longest: keys of a run.
    """
    first_row = some.argmax(axis=0)
    last_row = len(some) - some[::-1].argmax(axis=0)
    seen = np.logical_or.reduce(some, axis=0)
    changes = (np.diff(seen) | (np.diff(first_row) != 0) | (np.diff(last_row) != 0)).nonzero()[0]
    runs: list[Run] = []
    for first, last in zip([0, *(changes + 1)], [*(changes + 1), len(seen)], strict=True):
        if not (last > first and seen[first]):
            continue
        rows = slice(int(first_row[first]), int(last_row[first]))
        full = np.logical_and.reduce(every[rows], axis=0)
        pieces = -(-int(kv_edges[last] - kv_edges[first]) // longest)
        for cells in np.array_split(np.arange(first, last), min(pieces, last - first)):
            start, stop = int(cells[0]), int(cells[-1]) + 1
            runs.append(
                Run(
                    int(q_edges[rows.start]),
                    int(q_edges[rows.stop]),
                    start,
                    stop,
                    int(kv_edges[start]),
                    int(kv_edges[stop]),
                    _partial(full, kv_edges, start, stop),
                )
            )
    return tuple(runs)


def _partial(
    full: BoolArray, edges: Positions, first: int, last: int
) -> tuple[tuple[int, int], ...]:
    ranges: list[tuple[int, int]] = []
    for cell in (first + np.flatnonzero(~full[first:last])).tolist():
        start, stop = int(edges[cell]), int(edges[cell + 1])
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((start, stop))
    return tuple(ranges)
