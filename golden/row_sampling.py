"""`attend_rows()`: exact attention of some of the queries, in time proportional to their number."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any

import numpy as np

from golden.arrays import as_positions, real_qkv
from golden.attention import Attended
from golden.blockwise import KEYS_PER_RUN, attend_streamed, streamed_problem
from golden.blockwise_tile import EVERYTHING
from golden.errors import ShapeError
from golden.masks import Mask


def attend_rows(
    q: Any,
    k: Any,
    v: Any,
    *,
    rows: Any,
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
    """Compute the rows of `golden.attend` that are asked for, exactly, at `O(rows * kv_len)`.

    R1: row `i` of the result is row `rows[i]` of `attend`, within the bound B1 of
        `golden.blockwise.attend_blockwise`.
    R2: keys and values are read where they are and widened tile by tile, so a million bfloat16
        tokens need a few MB beyond themselves.

    Args:
        q: `(batch, num_attention_heads, q_len, head_dim)`, BHSD, any real dtype: all queries.
        k: `(batch, num_key_value_heads, kv_len, head_dim)`, BHSD, any real dtype.
        v: `(batch, num_key_value_heads, kv_len, value_dim)`, BHSD, any real dtype.
        rows: `(n,)`, int, indices of queries (not positions), the same for every batch row and
            head; sorted ones share tiles best. `golden.row_plan.plan_rows` picks them.
        q_positions: `(batch, q_len)`, int, of all queries.
        kv_positions: `(batch, kv_len)`, int.
        mask: the mask of all queries; True = attend.
        softmax_scale: factor on the dot products; None is `head_dim ** -0.5`.
        sinks: `(num_attention_heads,)`, None for none.
        softcap: `c` in `c * tanh(x / c)`; None for none.
        q_tile: rows of a tile; None makes 256 over the query heads of a KV head.
        kv_tile: keys that a tile reads at one go.
        threads: as `attend_blockwise`.
        executor: as `attend_blockwise`.

    Returns:
        Output `(batch, num_attention_heads, n, value_dim)` and log-sum-exp
        `(batch, num_attention_heads, n)`, float64.

    Raises:
        ShapeError: an array has the wrong shape or dtype, or a row is not one of the queries.
        ConfigError: as `attend_blockwise`.
    """
    q, k, v = real_qkv(q, k, v)
    batch, _, q_len, _ = q.shape
    chosen = _checked_rows(rows, q_len)
    positions = as_positions("q_positions", q_positions, (batch, q_len))
    part = mask.block(EVERYTHING, EVERYTHING, chosen, EVERYTHING)
    problem = streamed_problem(
        q[:, :, chosen],
        k,
        v,
        q_positions=positions[:, chosen],
        kv_positions=kv_positions,
        mask=part,
        softmax_scale=softmax_scale,
        sinks=sinks,
        softcap=softcap,
        q_tile=q_tile,
        kv_tile=kv_tile,
        neighbours=False,
    )
    return attend_streamed(problem, threads=threads, executor=executor)


def _checked_rows(rows: Any, q_len: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    array = np.asarray(rows)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ShapeError(
            f"rows must be a list of query indices, (n,), got {array.dtype} of shape {array.shape}"
        )
    if array.size and (int(array.min()) < 0 or int(array.max()) >= q_len):
        raise ShapeError(
            f"rows must be at least 0 and below q_len = {q_len}, got {int(array.min())} to "
            f"{int(array.max())}"
        )
    return array.astype(np.int64)
