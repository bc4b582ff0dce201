"""Attention of context-parallel ranks: own queries to all keys, gathered or passed round a ring."""

from __future__ import annotations

from collections.abc import Sequence

from golden.arrays import Positions
from golden.attention import Attended, attend
from golden.caches.held import Held
from golden.masks import layer_mask
from golden.sharding.layer import ShardedLayer
from golden.sharding.rank_heads import RankHeads
from golden.sharding.tokens import TokenPlan, Tokens
from golden.split_kv import merge_attended
from golden.stages import Array, Observer


def attended_ranks(
    layer: ShardedLayer,
    heads: Sequence[RankHeads],
    keys: Sequence[Held],
    plan: TokenPlan,
    positions: Positions,
    observers: Sequence[Observer],
) -> list[Array]:
    """Attend on each rank, from its queries to the prompt's keys.

    D24: passed round a ring, each row's keys are attended to alone and the results joined through
        their natural logsumexp; the sink counts with the rank's own keys, once.
    """
    stage, attended = layer.prefill, []
    for rank, observe in enumerate(observers):
        own, held = plan.queries[rank], keys[rank]
        blocks = [held]
        if layer.parallelism.kv_exchange == "ring" and len(stage.mesh.rows) > 1:
            row, rows = stage.mesh.row_of(rank), len(stage.mesh.rows)
            column = stage.mesh.columns[stage.mesh.column_of(rank)]
            sources = [column[(row - step) % rows] for step in range(rows)]
            blocks = [_of_tokens(held, plan.queries[source]) for source in sources]
        parts = [
            _attend(layer, rank, heads[rank].q, positions[:, own], block, step == 0, observe)
            for step, block in enumerate(blocks)
        ]
        if len(parts) == 1:
            attended.append(parts[0].output)
        else:
            attended.append(observe("attn_merged", merge_attended(parts).output))
    return attended


def _of_tokens(held: Held, tokens: Tokens) -> Held:
    return Held(held.k[:, :, tokens], held.v[:, :, tokens], held.positions[:, tokens])


def _attend(
    layer: ShardedLayer,
    rank: int,
    q: Array,
    q_positions: Positions,
    held: Held,
    with_sink: bool,
    observe: Observer,
) -> Attended:
    return attend(
        q,
        held.k,
        held.v,
        q_positions=q_positions,
        kv_positions=held.positions,
        mask=layer_mask(layer.config),
        softmax_scale=layer.config.softmax_scale,
        sinks=layer.prefill.weights[rank].sinks if with_sink else None,
        softcap=layer.config.softcap,
        observe=observe,
    )
