"""`attend_blockwise()`: attention streamed over tiles of keys, skipping those nobody sees."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any

import numpy as np

from golden.arrays import as_float64, as_positions, positive_scale, real_qkv
from golden.attention import Attended
from golden.blockwise_plan import Place, StreamedProblem
from golden.blockwise_pool import run_works, usable_threads
from golden.blockwise_tile import attend_tiles
from golden.errors import ConfigError
from golden.masks import Mask
from golden.stages import Array

ROWS_PER_TILE = 256
"""Rows of scores, over all query heads of a KV head, that a tile has unless told otherwise."""

CELLS_PER_TILE = 4
"""Parts of a tile whose queries are classified alone, so that a diagonal wastes less."""

ROWS_TOGETHER = 512
"""Rows of scores, over all KV heads of a piece of work: fewer, larger steps for short sequences."""

PIECES_PER_THREAD = 2
"""Pieces of work that joining heads must leave for each thread, so that all threads have some."""

KEYS_PER_RUN = 512
"""Keys that a tile reads at one go: with 256 rows, its scores are 1 MiB and stay in cache."""

TILES_PER_MESSAGE = 4
"""Tiles that travel to an executor together: 1,024 rows make 256 operations of each byte sent."""


def attend_blockwise(
    q: Any,
    k: Any,
    v: Any,
    *,
    q_positions: Any,
    kv_positions: Any,
    mask: Mask,
    softmax_scale: float | None = None,
    sinks: Any = None,
    softcap: float | None = None,
    q_tile: int | None = None,
    kv_tile: int = KEYS_PER_RUN,
    threads: int | None = None,
    executor: Executor | None = None,
) -> Attended:
    """Compute what `golden.attend` defines, clauses A1 to A6, in tiles.

    Work is proportional to the tiles in which some query sees some key, so a window of `W` costs
    `O(q_len * W)` and a chunk of `C` costs `O(q_len * C)`; memory beyond inputs and results is a
    few MB a thread. Nothing about the result depends on threads or executor, not one bit; tile
    sizes change the order of summation.

    B1: streamed and dense differ by the rounding of two evaluations of one formula. With
        `u = 2**-53`, `d = head_dim`, `n = kv_len` and `L_i = softmax_scale |q_i| max_j |k_j|` over
        the keys that row `i` sees (plus `|sink|`), a score of either errs by at most
        `gamma(d + 16) L_i`: the dot product by `gamma(d) |q_i| |k_j|`, scale, cap and shift by a
        few roundings. `exp` adds two. So each exponential errs by a factor of at most
        `exp(delta_i)`, `delta_i = gamma(d + 16) L_i + gamma(4)`, a weight by `exp(2 delta_i)`,
        and summing, mixing and dividing add `gamma(2 n + 8)`, in any order and with any shift:

            |output - dense| <= 2 (exp(2 delta_i + gamma(2 n + 8)) - 1) sum_j w_ij |v_j|

        For `d = 128`, `n = 4096` and scores of a few units that is 1e-12 at worst; measured
        differences of random inputs are a few ulp, 3e-15.
    B2: `|v|` is taken to be below 1e280, and to be 0 or above 1e-250: beyond that, running sums
        that are divided at the end overflow or lose digits where dense weights do not. Values
        that are not finite are treated as `attend` treats them.

    Args:
        q: `(batch, num_attention_heads, q_len, head_dim)`, BHSD, any real dtype: bfloat16 and
            float32 are widened tile by tile.
        k: `(batch, num_key_value_heads, kv_len, head_dim)`, BHSD, likewise.
        v: `(batch, num_key_value_heads, kv_len, value_dim)`, BHSD, likewise.
        q_positions: `(batch, q_len)`, int; -1 marks a padded query, which sees nothing. Any order
            is right; sorted positions are the ones whose tiles can be skipped.
        kv_positions: `(batch, kv_len)`, int; -1 marks an empty slot, which nothing sees.
        mask: which keys a query may see; True = attend.
        softmax_scale: factor on the dot products; None is `head_dim ** -0.5`.
        sinks: `(num_attention_heads,)`, one logit per query head; None for none.
        softcap: `c` in `c * tanh(x / c)`; None for none.
        q_tile: queries of a tile; None makes 256 rows over the query heads of a KV head.
        kv_tile: keys that a tile reads at one go.
        threads: threads to use, BLAS held to one each; None is one per processor. With an
            executor, the number of its workers to keep busy.
        executor: where to compute instead: any `concurrent.futures.Executor`, for example a
            process pool or Dask's `Client.get_executor()`; pieces of work are pickled with the
            queries, keys and values that they read.

    Returns:
        Output and log-sum-exp in float64.

    Raises:
        ShapeError: an array has the wrong shape or dtype.
        ConfigError: heads do not divide, or a scale, cap, tile size or thread count is not
            positive.

    Source: Milakov and Gimelshein (2018), arXiv 1805.02867, online softmax; Dao et al. (2022),
    arXiv 2205.14135, tiles; the shift that stays is that of `golden.blockwise_tile`.
    """
    problem = streamed_problem(
        q,
        k,
        v,
        q_positions=q_positions,
        kv_positions=kv_positions,
        mask=mask,
        softmax_scale=softmax_scale,
        sinks=sinks,
        softcap=softcap,
        q_tile=q_tile,
        kv_tile=kv_tile,
        threads=threads,
        tiles_per_work=1 if executor is None else TILES_PER_MESSAGE,
    )
    return attend_streamed(problem, threads=threads, executor=executor)


def streamed_problem(
    q: Any,
    k: Any,
    v: Any,
    *,
    q_positions: Any,
    kv_positions: Any,
    mask: Mask,
    softmax_scale: float | None,
    sinks: Any,
    softcap: float | None,
    q_tile: int | None,
    kv_tile: int,
    threads: int | None = None,
    tiles_per_work: int = 1,
    neighbours: bool = True,
) -> StreamedProblem:
    """Check the arguments of `attend_blockwise`, widening nothing.

    Args:
        q: as `attend_blockwise`; so are the others up to `kv_tile`.
        k: see there.
        v: see there.
        q_positions: see there.
        kv_positions: see there.
        mask: see there.
        softmax_scale: see there.
        sinks: see there.
        softcap: see there.
        q_tile: see there.
        kv_tile: see there.
        threads: see there; with many of them, pieces of work are smaller.
        tiles_per_work: tiles of queries that travel together.
        neighbours: queries of a tile lie close together, so that one range of positions stands
            for them; False looks at the mask of each query alone.

    Raises:
        ShapeError: as `attend_blockwise`.
        ConfigError: as `attend_blockwise`.
    """
    q, k, v = real_qkv(q, k, v)
    batch, num_heads, q_len, head_dim = q.shape
    scale = positive_scale(softmax_scale, softcap, head_dim)
    for name, size in (("q_tile", q_tile), ("kv_tile", kv_tile)):
        if size is not None and size < 1:
            raise ConfigError(f"{name} must be at least 1, got {size}")
    if sinks is not None:
        sinks = as_float64("sinks", sinks, (num_heads,), "(num_attention_heads,)")
    if q_tile is None:
        q_tile = max(1, ROWS_PER_TILE * k.shape[1] // num_heads)
    heads_per_work = 1
    if tiles_per_work == 1:
        rows = min(q_tile, max(1, q_len)) * (num_heads // k.shape[1])
        pieces = batch * k.shape[1] * -(-q_len // q_tile)
        most = min(ROWS_TOGETHER // rows, pieces // (PIECES_PER_THREAD * usable_threads(threads)))
        heads_per_work = max(h for h in range(1, k.shape[1] + 1) if _fits(h, most, k.shape[1]))
    cells = CELLS_PER_TILE if q_tile % CELLS_PER_TILE == 0 else 1
    return StreamedProblem(
        q=q,
        k=k,
        v=v,
        q_positions=as_positions("q_positions", q_positions, (batch, q_len)),
        kv_positions=as_positions("kv_positions", kv_positions, (batch, k.shape[2])),
        mask=mask,
        scale=scale,
        sinks=sinks,
        softcap=softcap,
        q_tile=q_tile,
        kv_tile=kv_tile,
        q_cell=q_tile // cells if neighbours else 1,
        tiles_per_work=tiles_per_work,
        heads_per_work=heads_per_work,
    )


def _fits(heads: int, most: int, num_kv_heads: int) -> bool:
    return heads == 1 or (heads <= most and num_kv_heads % heads == 0)


def attend_streamed(
    problem: StreamedProblem, *, threads: int | None, executor: Executor | None
) -> Attended:
    """Compute a checked problem; see `attend_blockwise`."""
    batch, num_heads, q_len, _ = problem.q.shape
    output = np.empty((batch, num_heads, q_len, problem.v.shape[3]))
    logsumexp = np.empty((batch, num_heads, q_len))

    def store(place: Place, result: tuple[Array, Array]) -> None:
        b, kv_heads, rows = place
        heads = problem.heads(kv_heads)
        output[b, heads, rows], logsumexp[b, heads, rows] = result

    run_works(problem.works(), attend_tiles, store, threads=threads, executor=executor)
    return Attended(output, logsumexp)
