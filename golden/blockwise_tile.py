"""One piece of streamed attention: some queries of some KV heads' groups and the keys they see.

S1, how sums are kept, is told in `golden.blockwise_sums`. Further:

S2: where the lengths of queries and keys prove (Cauchy and Schwarz) that no score of a tile leaves
    `+-SPAN`, and no shift has moved yet, S1 cannot apply and the largest scores are not looked for.
    The result is the same, bit for bit, so masked keys cannot change it by their length (A6).
S3: a tile whose output is not finite is computed again, with values that are not finite kept from
    rows that do not see them; a zero weight alone does not keep NaN or infinity away (A6).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from golden.arrays import Positions
from golden.blockwise_pool import one_blas_thread
from golden.blockwise_scratch import Scratch, borrowed_scratch
from golden.blockwise_sums import ROUNDED, SPAN, RowSums
from golden.masks import Mask
from golden.stages import Array
from golden.tiles import BoolArray, Run

EVERYTHING = slice(None)


@dataclass(frozen=True, slots=True, eq=False)
class TileWork:
    """What it takes to attend from neighbouring queries of neighbouring KV heads; it pickles.

    Attributes:
        q: `(kv_heads, group, rows, head_dim)`, any real dtype.
        k: `(kv_heads, keys, head_dim)`, any real dtype.
        v: `(kv_heads, keys, value_dim)`, any real dtype.
        q_positions: `(1, rows)`.
        kv_positions: `(1, keys)`.
        mask: the mask of just these heads, queries and keys.
        tiles: `(first row, past the last row, key runs)` of each tile of queries.
        first_key: what to take off the keys of `tiles`, whose runs count from a longer array.
        first_cell: likewise for cells.
        reach: `(cells,)`, length of the longest key of each cell in any of the heads; not finite
            if a key is not.
        sinks: `(kv_heads, group)` or None.
        scale: factor on the dot products.
        softcap: cap of the scaled scores or None.
    """

    q: NDArray[np.generic]
    k: NDArray[np.generic]
    v: NDArray[np.generic]
    q_positions: Positions
    kv_positions: Positions
    mask: Mask
    tiles: tuple[tuple[int, int, tuple[Run, ...]], ...]
    first_key: int
    first_cell: int
    reach: Array
    sinks: Array | None
    scale: float
    softcap: float | None

    def keys(self, start: int, stop: int) -> slice:
        """Return where keys that a run counts are in `k`, `v` and `kv_positions`."""
        return slice(start - self.first_key, stop - self.first_key)

    def cells(self, run: Run) -> slice:
        """Return where the cells of a run are in `reach`."""
        return slice(run.first_cell - self.first_cell, run.last_cell - self.first_cell)

    def visible(self, rows: slice, keys: slice) -> BoolArray:
        """Return which keys these queries see, broadcastable to `(kv_heads, rows, group, keys)`."""
        q_positions, kv_positions = self.q_positions[:, rows], self.kv_positions[:, keys]
        mask = self.mask.block(EVERYTHING, EVERYTHING, rows, keys)
        seen = mask.visible(q_positions, kv_positions)[0]
        seen = seen & (q_positions.T >= 0) & (kv_positions >= 0)
        heads = self.q.shape[:2] if len(seen) > 1 else (1, 1)
        visible: BoolArray = seen.reshape(*heads, *seen.shape[1:]).swapaxes(1, 2)
        return visible


def scaled_queries(work: TileWork, rows: slice, scratch: Scratch) -> Array:
    """Return the queries times the scale: `(kv_heads, rows * group, head_dim)`.

    The heads of one query are neighbours, so that neighbouring queries are neighbouring rows.
    """
    part = work.q[:, :, rows].swapaxes(1, 2)
    queries = scratch.array("queries", *part.shape)
    np.copyto(queries, part, casting="unsafe")
    queries *= work.scale
    return queries.reshape(len(part), -1, part.shape[3])


def capped_scores(work: TileWork, queries: Array, keys: Array, scratch: Scratch) -> Array:
    """Return scores after the soft cap, before the mask (A3): `(kv_heads, rows, keys)`."""
    scores = scratch.array("scores", *queries.shape[:2], keys.shape[1])
    np.matmul(queries, keys.swapaxes(1, 2), out=scores)
    if work.softcap is not None:
        scores /= work.softcap
        np.tanh(scores, out=scores)
        scores *= work.softcap
    return scores


def attend_tiles(work: TileWork) -> tuple[Array, Array]:
    """Attend from the queries of a piece of work.

    Returns:
        Output `(kv_heads * group, rows, value_dim)` and log-sum-exp `(kv_heads * group, rows)`.
    """
    with one_blas_thread(), borrowed_scratch() as scratch, np.errstate(all="ignore"):  # A6
        parts = [_attend_tile(work, *tile, scratch) for tile in work.tiles]
    if len(parts) == 1:
        return parts[0]
    output, logsumexp = zip(*parts, strict=True)
    return np.concatenate(output, axis=1), np.concatenate(logsumexp, axis=1)


def _attend_tile(
    work: TileWork, first: int, last: int, runs: tuple[Run, ...], scratch: Scratch
) -> tuple[Array, Array]:
    (kv_heads, group), value_dim = work.q.shape[:2], work.v.shape[2]
    queries = scaled_queries(work, slice(first, last), scratch)
    reach = float(np.sqrt(np.einsum("hij,hij->hi", queries, queries).max(initial=0.0)))
    sinks = None if work.sinks is None else np.tile(work.sinks, (1, last - first))
    for wild_values in (False, True):
        rows_shape = queries.shape[:2]
        sums = RowSums(np.zeros((*rows_shape, value_dim)), *np.zeros((2, *rows_shape)))
        for run in runs:
            rows = slice(run.first_query * group, run.last_query * group)
            tile = slice(first + run.first_query, first + run.last_query)
            _add_run(
                work, run, tile, queries[:, rows], reach, sums.part(rows), wild_values, scratch
            )
        mixed, logsumexp = sums.finish(sinks)
        if np.isfinite(mixed).all():
            break
    by_query = (kv_heads, last - first, group)
    output = mixed.reshape(*by_query, value_dim).swapaxes(1, 2)
    return (
        output.reshape(-1, last - first, value_dim),
        logsumexp.reshape(by_query).swapaxes(1, 2).reshape(-1, last - first),
    )


def _add_run(
    work: TileWork,
    run: Run,
    tile: slice,
    queries: Array,
    reach: float,
    sums: RowSums,
    wild_values: bool,
    scratch: Scratch,
) -> None:
    keys = work.keys(run.start, run.stop)
    scores = capped_scores(work, queries, scratch.widened("keys", work.k[:, keys]), scratch)
    by_head = scores.reshape(len(scores), -1, work.q.shape[1], scores.shape[2])
    masked = [
        (slice(start - run.start, stop - run.start), ~work.visible(tile, work.keys(start, stop)))
        for start, stop in run.partial
    ]
    if sums.shift.any() or not _within_span(work, reach, work.reach[work.cells(run)]):
        for columns, hidden in masked:
            np.copyto(by_head[..., columns], -np.inf, where=hidden)
        sums.raise_to(scores.max(axis=2))
        if sums.shift.any():
            scores -= sums.shift[..., None]
        masked = []
    np.exp(scores, out=scores)
    for columns, hidden in masked:
        np.copyto(by_head[..., columns], 0.0, where=hidden)
    sums.total += scores @ np.ones(scores.shape[2])
    values = scratch.widened("values", work.v[:, keys])
    if wild_values:
        values = _without_wild_values(work, tile, keys, by_head, values, sums.mixed)
    mixed = scratch.array("mixed", *sums.mixed.shape)
    np.matmul(scores, values, out=mixed)
    sums.mixed += mixed


def _within_span(work: TileWork, reach: float, key_reach: Array) -> bool:
    bound = reach * float(key_reach.max())
    if work.softcap is not None:
        bound = min(work.softcap, bound)
    return bound <= SPAN * ROUNDED


def _without_wild_values(
    work: TileWork, tile: slice, keys: slice, weights: Array, values: Array, mixed: Array
) -> Array:
    """Add what values that are not finite give to the rows that see them; return the others.

    Args:
        work: the piece of work.
        tile: its queries.
        keys: its keys.
        weights: `(kv_heads, queries, group, keys)`, exponentials, 0 where masked.
        values: `(kv_heads, keys, value_dim)`.
        mixed: `(kv_heads, queries * group, value_dim)`, gets the products added.
    """
    finite = np.isfinite(values)
    visible = np.broadcast_to(work.visible(tile, keys), weights.shape)
    by_head = mixed.reshape(*weights.shape[:3], values.shape[2])
    for key in np.flatnonzero(~finite.all(axis=(0, 2))):
        wild = np.where(finite[:, key], 0.0, values[:, key])
        term = weights[..., key, None] * wild[:, None, None, :]
        by_head += np.where(visible[..., key, None], term, 0.0)
    return np.where(finite, values, 0.0)
