"""The mask of packed sequences: block-diagonal, by the segment each token belongs to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from golden.arrays import Positions
from golden.errors import ShapeError
from golden.masks import Mask
from golden.tiles import BoolArray, Cells, Coverage, Indices


@dataclass(frozen=True, slots=True, eq=False)
class SameSegment(Mask):
    """M6: a query sees only keys of its own segment; segment -1 is padding and sees nothing.

    Segments 0 0 1 1 1 of queries (down) and keys (across)::

        1 1 0 0 0
        1 1 0 0 0
        0 0 1 1 1
        0 0 1 1 1
        0 0 1 1 1

    The window and the causal rule go by position and come from other masks. `q_len` and `kv_len`
    are independent; a row whose segment has no key yields zeros.

    Attributes:
        q_segments: `(batch, q_len)`, int64.
        kv_segments: `(batch, kv_len)`, int64.
    """

    q_segments: Positions
    kv_segments: Positions

    def visible(self, q_positions: Positions, kv_positions: Positions) -> BoolArray:
        self._check(q_positions.shape, kv_positions.shape)
        query, key = self.q_segments[:, None, :, None], self.kv_segments[:, None, None, :]
        together: BoolArray = (query == key) & (query >= 0)
        return together

    def coverage(self, queries: Cells, keys: Cells) -> Coverage:
        self._check(*((len(cells.lowest), cells.length) for cells in (queries, keys)))
        q_low, q_high = _ranges(self.q_segments, queries)
        k_low, k_high = _ranges(self.kv_segments, keys)
        q_low, q_high = q_low[:, None, :, None], q_high[:, None, :, None]
        k_low, k_high = k_low[:, None, None, :], k_high[:, None, None, :]
        return Coverage(
            some=(q_low <= k_high) & (k_low <= q_high),
            every=(q_low == k_high) & (k_low == q_high) & (q_low >= 0),
        )

    def block(self, batch: Indices, heads: Indices, queries: Indices, keys: Indices) -> Mask:
        return SameSegment(self.q_segments[batch][:, queries], self.kv_segments[batch][:, keys])

    def _check(self, queries: tuple[int, ...], keys: tuple[int, ...]) -> None:
        got = self.q_segments.shape, self.kv_segments.shape
        if got != (queries, keys):
            raise ShapeError(
                f"segments must have the positions' shapes {queries} and {keys}, got {got[0]} and "
                f"{got[1]}"
            )


def _ranges(segments: Positions, cells: Cells) -> tuple[Positions, Positions]:
    starts = cells.edges[:-1]
    return (
        np.minimum.reduceat(segments, starts, axis=1),
        np.maximum.reduceat(segments, starts, axis=1),
    )
