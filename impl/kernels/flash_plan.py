"""Which keys a tile of queries needs, decided from numbers that are known before anything runs.

Positions are static here: query `r` is at `q_offset + r * q_stride`, key `j` of the step at `j`,
and cached key `i` at `i - prior_len`. What data decides (padding, the positions of cached keys,
where a chunk begins) only narrows the mask of a tile, so a tile that these numbers prove empty is
never computed, and one that they prove full needs no mask of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SCORES_PER_TILE = 1 << 21
"""Elements of the scores that are alive at once, which is what bounds the memory."""

Q_TILE, KV_TILE = 512, 512
"""Longest tile, in queries and keys. More queries share a pass over the keys; fewer keys leave
fewer scores above the diagonal to be computed and masked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """Some queries beside some keys.

    Attributes:
        start: first query.
        end: end of the queries.
        first: first key, counted among the cached keys or among the step's.
        stop: end of the keys.
        of_prior: whether these are cached keys.
        partial: whether positions hide some of the keys from some of the queries.
    """

    start: int
    end: int
    first: int
    stop: int
    of_prior: bool
    partial: bool


def _cut(first: int, end: int) -> Iterator[tuple[int, int]]:
    """Cut keys into tiles; the last takes a rest shorter than a quarter of a tile with it."""
    while first < end:
        stop = first + KV_TILE
        if end - stop < KV_TILE / 4:
            stop = end
        yield first, stop
        first = stop


@dataclass(frozen=True, kw_only=True, slots=True)
class TilePlan:
    """Static geometry of one call.

    Attributes:
        q_len: queries.
        kv_len: keys of the step.
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

    def kv_tiles(self, start: int, end: int) -> Iterator[Tile]:
        """Yield the tiles of keys that some query of `start` to `end` may see."""
        first, last = self._position(start), self._position(end - 1)
        low, high = self._needed(first, last)
        prior_low = -self.prior_len if self.prior_moves else low
        for of_prior, oldest, newest in (
            (True, prior_low, min(high, 0)),
            (False, max(low, 0), high),
        ):
            shift = self.prior_len if of_prior else 0
            for key, stop in _cut(oldest, newest):
                yield Tile(
                    start=start,
                    end=end,
                    first=key + shift,
                    stop=stop + shift,
                    of_prior=of_prior,
                    partial=self._partial(key, stop - 1, first, last),
                )

    def _position(self, query: int) -> int:
        return self.q_offset + query * self.q_stride

    def _needed(self, first: int, last: int) -> tuple[int, int]:
        """Positions of keys, first and end, that queries at `first` to `last` may see."""
        if not self.causal:
            return -self.prior_len, self.kv_len
        low = -self.prior_len
        if self.sliding_window is not None:
            low = max(low, first - self.sliding_window + 1)
        if self.attention_chunk_size is not None:
            size = self.attention_chunk_size
            # wherever chunks begin, no two positions of one are further apart than its size
            low = max(low, first - size + 1 if self.chunk_moves else first // size * size)
        return low, min(last + 1, self.kv_len)

    def _partial(self, oldest: int, newest: int, first: int, last: int) -> bool:
        """Whether a query at `first` to `last` may not see a key at `oldest` to `newest`."""
        if not self.causal:
            return False
        if newest > first or (oldest < 0 and self.prior_moves):
            return True
        if self.sliding_window is not None and last - oldest >= self.sliding_window:
            return True
        size = self.attention_chunk_size
        if size is None:
            return False
        return self.chunk_moves or oldest // size != last // size

    def mask(
        self,
        tile: Tile,
        positions: Tensor | None,
        chunk_origin: Tensor | None,
        device: torch.device,
    ) -> Tensor:
        """Mask of one tile by position.

        Args:
            tile: which.
            positions: `(batch, prior_len)`, integer, of the cached keys, or None.
            chunk_origin: `(batch,)`, integer, if `chunk_moves`: what to add to a position before
                it is divided by the size of a chunk.
            device: where to make it.

        Returns:
            `(batch or 1, 1, queries, keys)`, bool, True = attend.
        """
        rows = torch.arange(tile.start, tile.end, device=device) * self.q_stride + self.q_offset
        q = rows[None, None, :, None]
        if positions is not None and tile.of_prior:
            k = positions[:, None, None, tile.first : tile.stop]
        else:
            shift = self.prior_len if tile.of_prior else 0
            k = torch.arange(tile.first - shift, tile.stop - shift, device=device)
            k = k[None, None, None, :]
        allowed = k <= q
        if self.sliding_window is not None:
            allowed = allowed & (q - k < self.sliding_window)
        size = self.attention_chunk_size
        if size is not None:
            if chunk_origin is not None:
                origin = chunk_origin[:, None, None, None]
                q, k = q + origin, k + origin
            same = torch.div(q, size, rounding_mode="floor") == torch.div(
                k, size, rounding_mode="floor"
            )
            allowed = allowed & same
        return allowed
