"""`attend_blockwise_vjp()`: the vector-Jacobian product of attention, streamed over tiles."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np

from golden.arrays import as_float64
from golden.blockwise import KEYS_PER_RUN, attend_streamed, streamed_problem
from golden.blockwise_plan import Place, StreamedProblem
from golden.blockwise_pool import one_blas_thread, run_works
from golden.blockwise_scratch import Scratch, borrowed_scratch
from golden.blockwise_tile import TileWork, capped_scores, scaled_queries
from golden.errors import ShapeError
from golden.gradients.attention import AttendGradients
from golden.masks import Mask
from golden.stages import Array
from golden.tiles import Run


def attend_blockwise_vjp(
    q: Any,
    k: Any,
    v: Any,
    d_output: Any,
    *,
    q_positions: Any,
    kv_positions: Any,
    mask: Mask,
    softmax_scale: float | None = None,
    sinks: Any = None,
    softcap: float | None = None,
    d_logsumexp: Any = None,
    q_tile: int | None = None,
    kv_tile: int = KEYS_PER_RUN,
    threads: int | None = None,
    executor: Executor | None = None,
) -> AttendGradients:
    """Compute what `golden.gradients.attend_vjp` defines, clauses G1 and G2, in tiles.

    The weights are computed again, tile by tile, from the scores and the log-sum-exp of a first
    pass; tiles in which no query sees a key are skipped. Memory beyond inputs and results is
    `O(kv_len * head_dim)` a thread. Batch rows and KV heads are computed in parallel, the tiles of
    one KV head one after the other, so that no bit depends on threads or executor.

    Args:
        q: as `attend_blockwise`; so are the others up to `executor`.
        k: see there.
        v: see there.
        d_output: `(batch, num_attention_heads, q_len, value_dim)`, cotangent of the output.
        q_positions: see there.
        kv_positions: see there.
        mask: see there.
        softmax_scale: see there.
        sinks: see there.
        softcap: see there.
        d_logsumexp: `(batch, num_attention_heads, q_len)`, cotangent of the log-sum-exp; None is
            zeros.
        q_tile: see there.
        kv_tile: see there.
        threads: see there.
        executor: see there.

    Returns:
        Gradients in float64.

    Raises:
        ShapeError: an array has the wrong shape or dtype, or an occupied slot holds NaN or
            infinity, which only the dense form carries on.
        ConfigError: as `attend_blockwise`.

    Source: Dao et al. (2022), arXiv 2205.14135, algorithm 4.
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
    )
    output, logsumexp = attend_streamed(problem, threads=threads, executor=executor)
    d_output = as_float64("d_output", d_output, output.shape, "BHSD")
    if d_logsumexp is None:
        d_logsumexp = np.zeros(logsumexp.shape)
    d_logsumexp = as_float64(
        "d_logsumexp", d_logsumexp, logsumexp.shape, "(batch, num_attention_heads, q_len)"
    )
    padded, empty = problem.q_positions < 0, problem.kv_positions < 0
    cleaned = problem.changed(
        q=_without_unused("q", problem.q, padded),
        k=_without_unused("k", problem.k, empty),
        v=_without_unused("v", problem.v, empty),
        tiles_per_work=max(1, -(-problem.q.shape[2] // problem.q_tile)),
        heads_per_work=1,
    )
    d_output = _without_unused("d_output", d_output, padded)
    return _streamed_gradients(
        cleaned,
        d_output,
        d_logsumexp - (d_output * output).sum(axis=-1),
        logsumexp,
        threads=threads,
        executor=executor,
    )


@dataclass(frozen=True, slots=True, eq=False)
class GradientWork:
    """All tiles of one KV head's group, and the cotangents of its rows; it pickles.

    Attributes:
        tiles: the queries, keys and values.
        d_output: `(group, rows, value_dim)`.
        d_row: `(group, rows)`, cotangent of the log-sum-exp less `sum(d_output * output)`.
        logsumexp: `(group, rows)`.
    """

    tiles: TileWork
    d_output: Array
    d_row: Array
    logsumexp: Array


def gradients_of_tiles(work: GradientWork) -> tuple[Array, Array, Array]:
    """Return the gradients of queries, keys and values, shaped like those of the tiles."""
    tiles = work.tiles
    _, group, rows, head_dim = tiles.q.shape
    d_q = np.zeros((1, rows * group, head_dim))
    d_k, d_v = np.zeros(tiles.k.shape), np.zeros(tiles.v.shape)
    with one_blas_thread(), borrowed_scratch() as scratch, np.errstate(all="ignore"):
        for first, last, runs in tiles.tiles:
            queries = scaled_queries(tiles, slice(first, last), scratch)
            for run in runs:
                part = slice(run.first_query * group, run.last_query * group)
                tile = slice(first + run.first_query, first + run.last_query)
                d_queries = d_q[:, tile.start * group : tile.stop * group]
                _add_run(work, run, tile, queries[:, part], d_queries, d_k, d_v, scratch)
    d_q *= tiles.scale
    return d_q.reshape(rows, group, head_dim).swapaxes(0, 1), d_k[0], d_v[0]


def _add_run(
    work: GradientWork,
    run: Run,
    tile: slice,
    queries: Array,
    d_queries: Array,
    d_k: Array,
    d_v: Array,
    scratch: Scratch,
) -> None:
    tiles, keys = work.tiles, work.tiles.keys(run.start, run.stop)
    k = scratch.widened("keys", tiles.k[:, keys])
    scores = capped_scores(tiles, queries, k, scratch)
    slope = 1.0 - np.square(scores / tiles.softcap) if tiles.softcap is not None else None
    scores -= _by_row(work.logsumexp[:, tile])
    np.exp(scores, out=scores)
    by_head = scores.reshape(1, -1, tiles.q.shape[1], scores.shape[2])
    for start, stop in run.partial:
        hidden = ~tiles.visible(tile, tiles.keys(start, stop))
        np.copyto(by_head[..., start - run.start : stop - run.start], 0.0, where=hidden)
    d_output = work.d_output[:, tile].swapaxes(0, 1).reshape(-1, work.d_output.shape[2])
    d_v[:, keys] += scores.swapaxes(1, 2) @ d_output
    d_scores = d_output @ scratch.widened("values", tiles.v[:, keys]).swapaxes(1, 2)
    d_scores += _by_row(work.d_row[:, tile])
    d_scores *= scores
    if slope is not None:
        d_scores *= slope
    d_queries += d_scores @ k
    d_k[:, keys] += d_scores.swapaxes(1, 2) @ queries


def _by_row(values: Array) -> Array:
    """Return `(group, rows)` as a column in the order of `scaled_queries`."""
    column: Array = values.T.reshape(-1, 1)
    return column


def _without_unused(name: str, array: Any, unused: Any) -> Array:
    """Return the array with zeros where a slot is empty, in float64 only if that changes it.

    Raises:
        ShapeError: another slot holds NaN or infinity.
    """
    finite = np.isfinite(array).all(axis=(1, 3))
    if not (finite | unused).all():
        raise ShapeError(
            f"{name} must be finite wherever a slot is occupied, got NaN or infinity; "
            "golden.gradients.attend_vjp takes them"
        )
    zeroed: Array = array if finite.all() else np.where(unused[:, None, :, None], 0, array)
    return zeroed


def _streamed_gradients(
    problem: StreamedProblem,
    d_output: Array,
    d_row: Array,
    logsumexp: Array,
    *,
    threads: int | None,
    executor: Executor | None,
) -> AttendGradients:
    d_q, d_k, d_v = (np.zeros(x.shape) for x in (problem.q, problem.k, problem.v))

    def works() -> Iterator[tuple[tuple[Place, slice], GradientWork]]:
        for place, tiles in problem.works():
            b, kv_heads, rows = place
            heads = problem.heads(kv_heads)
            keys = slice(tiles.first_key, tiles.first_key + tiles.k.shape[1])
            parts = (x[b, heads, rows] for x in (d_output, d_row, logsumexp))
            yield (place, keys), GradientWork(tiles, *parts)

    def store(place: tuple[Place, slice], result: tuple[Array, Array, Array]) -> None:
        (b, kv_heads, rows), keys = place
        kv_head, heads = kv_heads.start, problem.heads(kv_heads)
        d_q[b, heads, rows], d_k[b, kv_head, keys], d_v[b, kv_head, keys] = result

    run_works(works(), gradients_of_tiles, store, threads=threads, executor=executor)
    d_sinks = None
    if problem.sinks is not None:
        share = np.exp(problem.sinks[:, None] - logsumexp)
        share[np.isneginf(logsumexp)] = 0.0
        d_sinks = (share * d_row).sum(axis=(0, 2))
    return AttendGradients(d_q, d_k, d_v, d_sinks)
