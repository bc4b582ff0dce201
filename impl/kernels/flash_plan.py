"""Which keys a tile of queries needs, decided from numbers that are known before anything runs.

Positions are static here: query `r` is at `q_offset + r * q_stride`, key `j` at `j - prior_len`.
What data decides (padding, the positions of cached keys, where a chunk begins) only narrows the
mask of a tile, so a tile that these numbers prove empty is never computed, and one that they prove
full needs no mask of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SCORES_PER_TILE = 1 << 22
"""Elements of the scores that are alive at once, which is what bounds the memory."""

Q_TILE, KV_TILE = 512, 512
"""Longest tile, in queries and keys. More queries share a pass over the keys; fewer keys leave
fewer scores above the diagonal to be computed and masked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TilePlan:
    """Static geometry of one call.

    Attributes:
        q_len: queries.
        kv_len: keys, cached ones included; they come first.
        prior_len: cached keys.
        q_offset: position of the first query.
        q_stride: positions from one query to the next.
        causal: a query sees no later key.
        sliding_window: keys a query sees, its own included; None is unbounded.
        attention_chunk_size: positions meet only within a chunk; None is one chunk.
        prior_moves: positions of cached keys are data, so they may be anywhere.
        chunk_moves: the position at which chunks begin is data.
        q_tile: queries of a tile.
    """

    q_len: int
    kv_len: int
    prior_len: int
    q_offset: int
    q_stride: int
    causal: bool
    sliding_window: int | None
    attention_chunk_size: int | None
    prior_moves: bool
    chunk_moves: bool
    q_tile: int

    def q_tiles(self) -> Iterator[tuple[int, int]]:
        """Yield the first query and the end of each tile."""
        for start in range(0, self.q_len, self.q_tile):
            yield start, min(start + self.q_tile, self.q_len)

    def kv_tiles(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Yield the tiles of keys that some query of `start` to `end` may see.

        Yields:
            First key, end, and whether static positions hide some of these keys from some query.
        """
        first, last = self._position(start), self._position(end - 1)
        low, high = self._needed(first, last)
        if self.prior_moves:
            yield from self._cut(0, self.prior_len, first, last)
            low = max(low, self.prior_len)
        yield from self._cut(low, high, first, last)

    def _cut(self, low: int, high: int, first: int, last: int) -> Iterator[tuple[int, int, bool]]:
        for start in range(low, high, KV_TILE):
            end = min(start + KV_TILE, high)
            yield start, end, self._partial(start, end, first, last)

    def _position(self, query: int) -> int:
        return self.q_offset + query * self.q_stride

    def _needed(self, first: int, last: int) -> tuple[int, int]:
        """First key and end that queries at positions `first` to `last` may see."""
        if not self.causal:
            return 0, self.kv_len
        low = -self.prior_len
        if self.sliding_window is not None:
            low = max(low, first - self.sliding_window + 1)
        if self.attention_chunk_size is not None:
            size = self.attention_chunk_size
            # wherever chunks begin, no two positions of one are further apart than its size
            low = max(low, first - size + 1 if self.chunk_moves else first // size * size)
        low += self.prior_len
        return low, max(low, min(last + 1 + self.prior_len, self.kv_len))

    def _partial(self, start: int, end: int, first: int, last: int) -> bool:
        if start < self.prior_len and self.prior_moves:
            return True
        if not self.causal:
            return False
        oldest, newest = start - self.prior_len, end - 1 - self.prior_len
        if newest > first:
            return True
        if self.sliding_window is not None and last - oldest >= self.sliding_window:
            return True
        size = self.attention_chunk_size
        if size is None:
            return False
        return self.chunk_moves or oldest // size != last // size

    def mask(
        self,
        queries: tuple[int, int],
        keys: tuple[int, int],
        prior_positions: Tensor | None,
        chunk_origin: Tensor | None,
        device: torch.device,
    ) -> Tensor:
        """Mask of one tile by position.

        Args:
            queries: first query and end.
            keys: first key and end, all cached or none of them if `prior_moves`.
            prior_positions: `(batch, prior_len)`, integer, if `prior_moves`.
            chunk_origin: `(batch,)`, integer, if `chunk_moves`: what to add to a position before
                it is divided by the size of a chunk.
            device: where to make it.

        Returns:
            `(batch or 1, queries, keys)`, bool, True = attend.
        """
        rows = torch.arange(*queries, device=device) * self.q_stride + self.q_offset
        q = rows[None, :, None]
        if self.prior_moves and keys[0] < self.prior_len:
            assert prior_positions is not None
            k = prior_positions[:, None, keys[0] : keys[1]]
        else:
            k = torch.arange(*keys, device=device)[None, None, :] - self.prior_len
        allowed = k <= q
        if self.sliding_window is not None:
            allowed = allowed & (q - k < self.sliding_window)
        size = self.attention_chunk_size
        if size is not None:
            if chunk_origin is not None:
                q, k = q + chunk_origin[:, None, None], k + chunk_origin[:, None, None]
            same = torch.div(q, size, rounding_mode="floor") == torch.div(
                k, size, rounding_mode="floor"
            )
            allowed = allowed & same
        return allowed
