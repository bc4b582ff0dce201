"""Which keys a query may attend to, as small values that compose with `&` and `|`.

True always means *attend*. Masks speak of explicit positions, never of array indices, so they
need no convention for `q_len != kv_len`: decode, a prefix and a cache whose slots are out of
order all use the same mask. A slot whose position is -1 is empty and no mask makes it visible;
`golden.attend` sees to that. A row that may attend to nothing yields zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from golden.arrays import Positions
from golden.checks import require_count
from golden.config import AttentionConfig
from golden.errors import ShapeError
from golden.tiles import UNKNOWN, BoolArray, Cells, Coverage, Indices


class Mask:
    """A rule that says which keys a query may attend to."""

    def visible(self, q_positions: Positions, kv_positions: Positions) -> BoolArray:
        """Apply the rule to positions.

        Args:
            q_positions: `(batch, q_len)`, int64.
            kv_positions: `(batch, kv_len)`, int64.

        Returns:
            Bool, broadcastable to `(batch, num_attention_heads, q_len, kv_len)`, True = attend.
        """
        raise NotImplementedError(f"{type(self).__name__} must define visible()")

    def coverage(self, queries: Cells, keys: Cells) -> Coverage:
        """Say which tiles are surely empty and which are surely full, from ranges of positions.

        A mask that does not override this is right and slow: every tile is looked at.
        """
        return UNKNOWN

    def block(self, batch: Indices, heads: Indices, queries: Indices, keys: Indices) -> Mask:
        """Return the mask of a part of the batch rows, query heads, queries and keys.

        A rule about positions is its own part; a mask that goes by index must override this.
        """
        return self

    def corners(self, last_position: int) -> dict[int, str]:
        """Return query positions where the rule begins to act or changes, and what happens there.

        Args:
            last_position: largest position of the sequence; corners beyond it need not be left out.
        """
        return {}

    def __and__(self, other: Mask) -> Mask:
        return _Both(self, other)

    def __or__(self, other: Mask) -> Mask:
        return _Either(self, other)


@dataclass(frozen=True, slots=True)
class _Both(Mask):
    left: Mask
    right: Mask

    def visible(self, q_positions: Positions, kv_positions: Positions) -> BoolArray:
        return self.left.visible(q_positions, kv_positions) & self.right.visible(
            q_positions, kv_positions
        )

    def coverage(self, queries: Cells, keys: Cells) -> Coverage:
        return self.left.coverage(queries, keys) & self.right.coverage(queries, keys)

    def block(self, batch: Indices, heads: Indices, queries: Indices, keys: Indices) -> Mask:
        part = batch, heads, queries, keys
        return _Both(self.left.block(*part), self.right.block(*part))

    def corners(self, last_position: int) -> dict[int, str]:
        return self.right.corners(last_position) | self.left.corners(last_position)


@dataclass(frozen=True, slots=True)
class _Either(Mask):
    left: Mask
    right: Mask

    def visible(self, q_positions: Positions, kv_positions: Positions) -> BoolArray:
        return self.left.visible(q_positions, kv_positions) | self.right.visible(
            q_positions, kv_positions
        )

    def coverage(self, queries: Cells, keys: Cells) -> Coverage:
        return self.left.coverage(queries, keys) | self.right.coverage(queries, keys)

    def block(self, batch: Indices, heads: Indices, queries: Indices, keys: Indices) -> Mask:
        part = batch, heads, queries, keys
        return _Either(self.left.block(*part), self.right.block(*part))

    def corners(self, last_position: int) -> dict[int, str]:
        return self.right.corners(last_position) | self.left.corners(last_position)


def _pairs(q_positions: Positions, kv_positions: Positions) -> tuple[Positions, Positions]:
    return q_positions[:, None, :, None], kv_positions[:, None, None, :]


@dataclass(frozen=True, slots=True)
class Everything(Mask):
    """M1: every key is visible, as in an encoder or cross attention."""

    def visible(self, q_positions: Positions, kv_positions: Positions) -> BoolArray:
        return np.ones((1, 1, 1, 1), dtype=np.bool_)

    def coverage(self, queries: Cells, keys: Cells) -> Coverage:
        return Coverage(UNKNOWN.some, UNKNOWN.some)


@dataclass(frozen=True, slots=True)
class Causal(Mask):
    """M2: a query at position `i` sees keys at positions `j <= i`, its own included.

    Positions 0..4 of queries (down) and keys (across)::

        1 0 0 0 0
        1 1 0 0 0
        1 1 1 0 0
        1 1 1 1 0
        1 1 1 1 1
    """

    def visible(self, q_positions: Positions, kv_positions: Positions) -> BoolArray:
        query, key = _pairs(q_positions, kv_positions)
        return key <= query

    def coverage(self, queries: Cells, keys: Cells) -> Coverage:
        first_query, first_key = _pairs(queries.lowest, keys.lowest)
        last_query, last_key = _pairs(queries.highest, keys.highest)
        return Coverage(some=first_key <= last_query, every=last_key <= first_query)


@dataclass(frozen=True, slots=True)
class SlidingWindow(Mask):
    """M3: keys at most `window - 1` positions before the query; the query's own key counts.

    With `Causal()` the row sees `window` keys. `Causal() & SlidingWindow(2)`::

        1 0 0 0 0
        1 1 0 0 0
        0 1 1 0 0
        0 0 1 1 0
        0 0 0 1 1

    Attributes:
        window: keys in reach, the query's own included; at least 1.
    """

    window: int

    def __post_init__(self) -> None:
        require_count("window", self.window, "; the query's own key counts")

    def visible(self, q_positions: Positions, kv_positions: Positions) -> BoolArray:
        query, key = _pairs(q_positions, kv_positions)
        return query - key < self.window

    def coverage(self, queries: Cells, keys: Cells) -> Coverage:
        first_query, first_key = _pairs(queries.lowest, keys.lowest)
        last_query, last_key = _pairs(queries.highest, keys.highest)
        return Coverage(
            some=first_query - last_key < self.window, every=last_query - first_key < self.window
        )

    def corners(self, last_position: int) -> dict[int, str]:
        return {
            self.window - 1: "window: the last to see position 0",
            self.window: "window: the first not to see position 0",
        }


@dataclass(frozen=True, slots=True)
class Chunked(Mask):
    """M4: positions `i` and `j` meet only if `i // size == j // size`.

    `Causal() & Chunked(2)`::

        1 0 0 0 0
        1 1 0 0 0
        0 0 1 0 0
        0 0 1 1 0
        0 0 0 0 1

    Attributes:
        size: positions per chunk; at least 1.
    """

    size: int

    def __post_init__(self) -> None:
        require_count("size", self.size)

    def visible(self, q_positions: Positions, kv_positions: Positions) -> BoolArray:
        query, key = _pairs(q_positions, kv_positions)
        together: BoolArray = query // self.size == key // self.size
        return together

    def coverage(self, queries: Cells, keys: Cells) -> Coverage:
        first_query, first_key = _pairs(queries.lowest // self.size, keys.lowest // self.size)
        last_query, last_key = _pairs(queries.highest // self.size, keys.highest // self.size)
        return Coverage(
            some=(first_query <= last_key) & (first_key <= last_query),
            every=(first_query == last_key) & (first_key == last_query),
        )

    def corners(self, last_position: int) -> dict[int, str]:
        starts = {self.size, last_position // self.size * self.size}
        before = {start - 1: "chunk: its last" for start in starts}
        return before | dict.fromkeys(starts, "chunk: its first")


@dataclass(frozen=True, slots=True, eq=False)
class Explicit(Mask):
    """M5: an array says it: padding, a prefix, a tree of draft tokens, packed documents.

    Attributes:
        allowed: bool, `(kv_len,)`, `(q_len, kv_len)`, `(batch, q_len, kv_len)` or
            `(batch, num_attention_heads, q_len, kv_len)`; axes of length 1 broadcast.
    """

    allowed: BoolArray

    def __post_init__(self) -> None:
        if not isinstance(self.allowed, (np.ndarray, np.generic)):
            raise ShapeError(f"allowed must be a bool array, got {type(self.allowed).__name__}")
        if self.allowed.dtype != np.bool_ or not 1 <= self.allowed.ndim <= 4:
            raise ShapeError(
                "allowed must be a bool array of 1 to 4 axes (True = attend), got "
                f"{self.allowed.dtype} of shape {self.allowed.shape}"
            )

    def visible(self, q_positions: Positions, kv_positions: Positions) -> BoolArray:
        return self._fitted(q_positions.shape[0], q_positions.shape[1], kv_positions.shape[1])

    def coverage(self, queries: Cells, keys: Cells) -> Coverage:
        some = every = self._fitted(queries.lowest.shape[0], queries.length, keys.length)
        for axis, cells in ((3, keys), (2, queries)):
            if some.shape[axis] > 1:
                starts = cells.edges[:-1]
                some = np.logical_or.reduceat(some, starts, axis=axis)
                every = np.logical_and.reduceat(every, starts, axis=axis)
        return Coverage(some, every)

    def block(self, batch: Indices, heads: Indices, queries: Indices, keys: Indices) -> Mask:
        part = self._four_axes()
        for axis, chosen in enumerate((batch, heads, queries, keys)):
            if part.shape[axis] > 1:
                part = part[(slice(None),) * axis + (chosen,)]
        return Explicit(part)

    def _four_axes(self) -> BoolArray:
        allowed = self.allowed[:, None] if self.allowed.ndim == 3 else self.allowed
        return allowed.reshape((1,) * (4 - allowed.ndim) + allowed.shape)

    def _fitted(self, batch: int, q_len: int, kv_len: int) -> BoolArray:
        target, full = (batch, q_len, kv_len), self._four_axes()
        if any(
            full.shape[axis] not in (1, want) for axis, want in zip((0, 2, 3), target, strict=True)
        ):
            raise ShapeError(
                f"allowed must broadcast to (batch, heads, q_len, kv_len) with batch, q_len, "
                f"kv_len = {target}, got shape {self.allowed.shape}"
            )
        return full


def layer_mask(config: AttentionConfig) -> Mask:
    """Return the mask of a decoder layer: causal, and its window or chunk if it has one."""
    mask: Mask = Causal()
    if config.sliding_window is not None:
        mask = mask & SlidingWindow(config.sliding_window)
    if config.attention_chunk_size is not None:
        mask = mask & Chunked(config.attention_chunk_size)
    return mask
