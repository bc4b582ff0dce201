"""Attention of context-parallel ranks: own queries to all keys, gathered or passed round a ring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from golden.arrays import Positions
from golden.attention import Attended, attend
from golden.caches.held import Held
from golden.masks import Mask, layer_mask
from golden.segments import SameSegment
from golden.sharding.layer import ShardedLayer
from golden.sharding.rank_heads import RankHeads
from golden.sharding.tokens import TokenPlan, Tokens
from golden.split_kv import merge_attended
from golden.stages import Array, Observer


class Segments(NamedTuple):
    """Which sequence of a packed row each key belongs to.

    Attributes:
        active: `(1, q_len)`, int64, of the row's tokens; -1 for padding.
        prior: `(1, sequences * slots)`, int64, of the cached ones.
    """

    active: Positions
    prior: Positions


def attended_ranks(
    layer: ShardedLayer,
    heads: Sequence[RankHeads],
    keys: Sequence[Held],
    plan: TokenPlan,
    positions: Positions,
    observers: Sequence[Observer],
    *,
    prior: Sequence[Held] | None = None,
    segments: Segments | None = None,
) -> list[Array]:
    """Attend on each rank, from its queries to the cached keys and to those of the call.

    D24: passed round a ring, each row's keys are attended to alone and the results joined through
        their natural logsumexp; the sink counts with the rank's own keys, once, and so do the
        cached keys, which every rank has.

    Args:
        layer: the layer.
        heads: by rank, of its own tokens.
        keys: by rank, of all tokens of the call, in order.
        plan: whose queries are whose.
        positions: `(batch, q_len)`, of the call.
        observers: by rank.
        prior: by rank, cached keys of its heads; None for none.
        segments: of a packed row; None where a row is one sequence.
    """
    stage, attended = layer.prefill, []
    everything = np.arange(positions.shape[1])
    for rank, observe in enumerate(observers):
        own, blocks = plan.queries[rank], [everything]
        if layer.parallelism.kv_exchange == "ring" and len(stage.mesh.rows) > 1:
            row, rows = stage.mesh.row_of(rank), len(stage.mesh.rows)
            column = stage.mesh.columns[stage.mesh.column_of(rank)]
            blocks = [plan.queries[column[(row - step) % rows]] for step in range(rows)]
        parts = []
        for step, block in enumerate(blocks):
            cached = prior[rank] if prior is not None and step == 0 else None
            held = _of_tokens(keys[rank], block)
            mask = layer_mask(layer.config)
            if segments is not None:
                mask = mask & _together(segments, own, block, with_prior=cached is not None)
            if cached is not None:
                held = cached.and_active(*held)
            q, at = heads[rank].q, positions[:, own]
            parts.append(_attend(layer, rank, q, at, held, mask, step == 0, observe))
        if len(parts) == 1:
            attended.append(parts[0].output)
        else:
            attended.append(observe("attn_merged", merge_attended(parts).output))
    return attended


def _together(segments: Segments, queries: Tokens, keys: Tokens, *, with_prior: bool) -> Mask:
    of_keys = segments.active[:, keys]
    if with_prior:
        of_keys = np.concatenate([segments.prior, of_keys], axis=1)
    return SameSegment(segments.active[:, queries], of_keys)


def _of_tokens(held: Held, tokens: Tokens) -> Held:
    return Held(held.k[:, :, tokens], held.v[:, :, tokens], held.positions[:, tokens])


def _attend(
    layer: ShardedLayer,
    rank: int,
    q: Array,
    q_positions: Positions,
    held: Held,
    mask: Mask,
    with_sink: bool,
    observe: Observer,
) -> Attended:
    return attend(
        q,
        held.k,
        held.v,
        q_positions=q_positions,
        kv_positions=held.positions,
        mask=mask,
        softmax_scale=layer.config.softmax_scale,
        sinks=layer.prefill.weights[rank].sinks if with_sink else None,
        softcap=layer.config.softcap,
        observe=observe,
    )
