"""One prefill call on every rank, from hidden states to outputs, before anything is cached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from golden.arrays import Positions
from golden.caches.held import Held
from golden.lora import Lora
from golden.sharding.collectives import all_gather, over_groups
from golden.sharding.context_attention import Segments, attended_ranks
from golden.sharding.head_layout import PADDING, Heads
from golden.sharding.layer import RankStage, ShardedLayer
from golden.sharding.output import output_shares, reduced_output
from golden.sharding.rank_heads import RankHeads, heads_of_ranks, rotary_part
from golden.sharding.tokens import TokenPlan, Tokens, places_of, token_plan
from golden.stages import Array, Observer


class Encoded(NamedTuple):
    """What ranks computed of a prefill, not yet cached.

    Attributes:
        outputs: by rank, of the tokens it returns.
        keys: by rank, keys and values of all tokens, in order, of its prefill heads.
        tokens: by rank, the tokens it returns.
        residuals: see `ShardedResult`.
    """

    outputs: tuple[Array, ...]
    keys: list[Held]
    tokens: tuple[Tokens, ...]
    residuals: tuple[Array, ...] | None


def encode_tokens(
    layer: ShardedLayer,
    hidden: Array,
    positions: Positions,
    observers: Sequence[Observer],
    *,
    rotary_position_ids: Any = None,
    lora: Lora | None = None,
    prior: Sequence[Held] | None = None,
    segments: Segments | None = None,
) -> Encoded:
    """Compute a prefill on every rank and write nothing.

    Args:
        layer: the layer.
        hidden: `(batch, q_len, hidden_size)`, whole and in order.
        positions: `(batch, q_len)`, int64; -1 for padding.
        observers: by rank.
        rotary_position_ids: see `encode_sharded`.
        lora: see `encode_sharded`.
        prior: by rank, cached keys of its prefill heads; None for none.
        segments: of a packed row; None where a row is one sequence.
    """
    stage, ranks = layer.prefill, range(len(observers))
    plan = token_plan(layer.config, layer.parallelism, hidden.shape[1])
    given = [hidden[:, tokens] for tokens in plan.given]
    arrived, of_tokens = _gathered(plan, given)
    read = [_select(arrived[r], of_tokens[r], plan.queries[r]) for r in ranks]
    read = [observers[r]("hidden_gathered", read[r]) for r in ranks]
    every_row = slice(None)
    loras = [stage.lora(layer.config, lora, r) for r in ranks]
    heads = heads_of_ranks(
        layer,
        stage,
        read,
        [positions[:, plan.queries[r]] for r in ranks],
        [rotary_part(rotary_position_ids, every_row, plan.queries[r]) for r in ranks],
        loras,
        observers,
    )
    keys = _gathered_keys(stage, heads, plan, positions, observers)
    attended = attended_ranks(
        layer, heads, keys, plan, positions, observers, prior=prior, segments=segments
    )
    output = _projected(layer, attended, plan, loras, read, observers)
    outputs = tuple(observers[r]("returned", output[r]) for r in ranks)
    residuals = None
    if layer.parallelism.interleave in ("after_global", "between"):
        residuals = tuple(_select(arrived[r], of_tokens[r], plan.returned[r]) for r in ranks)
    return Encoded(outputs, keys, plan.returned, residuals)


def _select(value: Array, among: Tokens, wanted: Tokens, axis: int = 1) -> Array:
    return np.take(value, places_of(wanted, among), axis=axis)


def _gathered(plan: TokenPlan, given: Sequence[Array]) -> tuple[list[Array], list[Tokens]]:
    """Gather hidden states where the plan says so, and say which tokens arrived."""
    values, tokens = list(given), list(plan.given)
    for group in plan.gathered_given:
        joined = np.concatenate([given[rank] for rank in group], axis=1)
        arrived = np.concatenate([plan.given[rank] for rank in group])
        for rank in group:
            values[rank], tokens[rank] = joined, arrived
    return values, tokens


def _across_rows(
    stage: RankStage, values: Sequence[Array], plan: TokenPlan, axis: int
) -> list[Array]:
    """Gather tokens over the columns of the mesh and put them in the order of the prompt."""
    gathered = over_groups(stage.mesh.columns, values, lambda v: all_gather(v, axis=axis))
    order = np.argsort(np.concatenate([plan.queries[rank] for rank in stage.mesh.columns[0]]))
    return [np.take(value, order, axis=axis) for value in gathered]


def _gathered_keys(
    stage: RankStage,
    heads: Sequence[RankHeads],
    plan: TokenPlan,
    positions: Positions,
    observers: Sequence[Observer],
) -> list[Held]:
    """Return the whole prompt's keys and values of each rank's heads, in order."""
    k, v = [rank.k for rank in heads], [rank.v for rank in heads]
    if len(stage.mesh.rows) > 1:
        k = _across_rows(stage, k, plan, axis=2)
        v = _across_rows(stage, v, plan, axis=2)
        k = [observe("k_gathered", value) for observe, value in zip(observers, k, strict=True)]
        v = [observe("v_gathered", value) for observe, value in zip(observers, v, strict=True)]
    return [Held(*pair, positions) for pair in zip(k, v, strict=True)]


def _projected(
    layer: ShardedLayer,
    attended: Sequence[Array],
    plan: TokenPlan,
    loras: Sequence[Lora | None],
    read: Sequence[Array],
    observers: Sequence[Observer],
) -> list[Array]:
    """Project the heads' outputs, reduce them, and leave each rank the tokens it returns."""
    stage, tokens = layer.prefill, list(plan.queries)
    in_order = np.sort(np.concatenate([plan.queries[rank] for rank in stage.mesh.columns[0]]))
    if plan.gathers_heads:
        attended = _across_rows(stage, attended, plan, axis=2)
        attended = [
            observe("attn_gathered", value)
            for observe, value in zip(observers, attended, strict=True)
        ]
        tokens = [in_order] * len(tokens)
    shares = output_shares(stage, attended, loras, observers)
    axis = 1 if plan.scatters else None
    output = reduced_output(layer, stage, shares, observers, scatter_axis=axis)
    if plan.adds_residual:
        output = [value + states for value, states in zip(output, read, strict=True)]
    if plan.gathers_output:
        output = _across_rows(stage, output, plan, axis=1)
        tokens = [in_order] * len(tokens)
    if plan.scatters:
        return output
    return [_select(output[rank], tokens[rank], plan.returned[rank]) for rank in range(len(tokens))]


def cached_heads(value: Array, heads: Heads) -> Array:
    """Return the heads that a rank's cache holds, zeros for `PADDING`."""
    taken = value[:, np.maximum(heads, 0)]
    taken[:, np.array(heads) == PADDING] = 0.0
    return taken
