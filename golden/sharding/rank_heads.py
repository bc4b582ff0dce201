"""Hidden states to heads on every rank, and which rows and positions are a rank's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from golden.arrays import Positions
from golden.caches.held import Rows
from golden.errors import ShapeError
from golden.heads import flat_projections, project_qkv, rotated_heads
from golden.lora import Lora
from golden.sharding.layer import RankStage, ShardedLayer
from golden.sharding.rank_weights import whole_projection
from golden.stages import Array, Observer


class RankHeads(NamedTuple):
    """One rank's queries, keys and values, BHSD."""

    q: Array
    k: Array
    v: Array


def heads_of_ranks(
    layer: ShardedLayer,
    stage: RankStage,
    hidden: Sequence[Array],
    positions: Sequence[Positions],
    rotary: Sequence[Any],
    loras: Sequence[Lora | None],
    observers: Sequence[Observer],
) -> list[RankHeads]:
    """Project each rank's hidden states and turn them into its heads.

    D19: a norm over the whole projection needs the mean square of all heads of the row, not of the
        rank's own, and not of padding or repetitions. The module's weightless norm takes the
        rank's own instead, which makes its result depend on the degree.
    """
    flats = [
        flat_projections(
            stage.config,
            stage.weights[rank],
            project_qkv(
                stage.config,
                stage.weights[rank],
                states,
                lora=loras[rank],
                observe=observers[rank],
            ),
            observers[rank],
        )
        for rank, states in enumerate(hidden)
    ]
    whole: list[tuple[Array, Array] | None] = [None] * len(flats)
    norm, width = layer.config.qk_norm, layer.config.head_dim
    if norm is not None and norm.scope == "projection":
        for row in stage.mesh.rows:
            q_heads = [stage.layout.q_part(stage.part(rank)) for rank in row]
            kv_heads = [stage.layout.kv_part(stage.part(rank)) for rank in row]
            joined = (
                whole_projection([flats[rank].q for rank in row], q_heads, width),
                whole_projection([flats[rank].k for rank in row], kv_heads, width),
            )
            for rank in row:
                whole[rank] = joined
    return [
        RankHeads(
            *rotated_heads(
                stage.config,
                stage.weights[rank],
                flat,
                positions[rank],
                observers[rank],
                rotary[rank],
                whole[rank],
            )
        )
        for rank, flat in enumerate(flats)
    ]


def local_rows(seq_ids: Any, batch: int, row: int, rows: int) -> Rows:
    """Return the rank's cache row of each sequence, -1 for those of other data-parallel ranks.

    D20: data-parallel rank `d` owns the sequence ids from `d * rows` to `(d + 1) * rows - 1`.

    Raises:
        ShapeError: `seq_ids` is not `(batch,)` integers.
    """
    ids = np.arange(batch) if seq_ids is None else np.asarray(seq_ids)
    if ids.shape != (batch,) or ids.dtype.kind not in "iu":
        raise ShapeError(
            f"seq_ids must be integers of shape ({batch},), got {ids.dtype} {ids.shape}"
        )
    local = ids.astype(np.int64) - row * rows
    return np.where((local >= 0) & (local < rows) & (ids >= 0), local, -1)


def rotary_part(rotary_position_ids: Any, rows: slice, tokens: Any) -> Any:
    """Cut positions for RoPE, `(batch, q_len)` or `(axes, batch, q_len)`; None stays None."""
    if rotary_position_ids is None:
        return None
    array = np.asarray(rotary_position_ids)
    batch_axis = array if array.ndim < 2 or array.shape[-2] == 1 else array[..., rows, :]
    return batch_axis[..., tokens]
