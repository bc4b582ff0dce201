"""Context encoding (prefill) on ranks: tensor, context and sequence parallel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from golden.arrays import Positions, as_float64, as_positions
from golden.caches.held import Cache, Held
from golden.errors import ShapeError
from golden.lora import Lora
from golden.sharding.collectives import all_gather, over_groups
from golden.sharding.context_attention import attended_ranks
from golden.sharding.head_layout import PADDING, Heads
from golden.sharding.layer import RankStage, ShardedLayer, ShardedResult
from golden.sharding.observers import RankObserver, unobserved_ranks
from golden.sharding.output import output_shares, reduced_output
from golden.sharding.rank_heads import RankHeads, heads_of_ranks, local_rows, rotary_part
from golden.sharding.rules import check_prefill
from golden.sharding.tokens import TokenPlan, Tokens, places_of, token_plan
from golden.stages import Array, Observer


def encode_sharded(
    layer: ShardedLayer,
    hidden_states: Any,
    *,
    position_ids: Any,
    caches: Sequence[Cache] | None = None,
    seq_ids: Any = None,
    rotary_position_ids: Any = None,
    lora: Lora | None = None,
    observe: RankObserver = unobserved_ranks,
) -> ShardedResult[Any]:
    """Encode a prompt on every rank.

    D23: the ranks' outputs are those of `golden.context_encoding`, to the roundoff of sums in
        another order: partial sums of a row, and with a ring partial softmaxes.

    Args:
        layer: cut by `shard`.
        hidden_states: `(batch, q_len, hidden_size)`, whole and in order; each rank is given its
            part.
        position_ids: `(batch, q_len)`, int; -1 marks padding.
        caches: by rank, to write to; None makes contiguous ones just long enough.
        seq_ids: `(batch,)`, int, the cache row of each batch row over all data-parallel ranks;
            None takes rows in order.
        rotary_position_ids: positions for RoPE alone; None takes `position_ids`.
        lora: adapters of the whole layer, None for none.
        observe: gives each rank an observer.

    Raises:
        ShapeError: an array does not fit.
        ConfigError: the prompt cannot be cut, or a cache has no slot for a token.

    Source: neuronx-distributed-inference, `standard_causal_attention_forward` and
    `chunked_attention_with_context_parallel_forward`.
    """
    config, stage = layer.config, layer.prefill
    hidden = as_float64(
        "hidden_states", hidden_states, (None, None, config.input_size), "(batch, q_len, hidden)"
    )
    batch, q_len = hidden.shape[:2]
    positions = as_positions("position_ids", position_ids, (batch, q_len))
    check_prefill(config, layer.parallelism, batch=batch, q_len=q_len)
    ranks = range(stage.mesh.world_size)
    plan, observers = token_plan(config, layer.parallelism, q_len), [observe(r) for r in ranks]
    if caches is None:
        longest = int(positions.max(initial=0)) + 1
        caches = layer.empty_caches(batch=batch, max_length=longest)
    if len(caches) != len(ranks):
        raise ShapeError(f"caches must be one per rank, {len(ranks)}, got {len(caches)}")

    given = [hidden[:, tokens] for tokens in plan.given]
    arrived, of_tokens = _gathered(plan, given)
    read = [_select(arrived[r], of_tokens[r], plan.queries[r]) for r in ranks]
    read = [observers[r]("hidden_gathered", read[r]) for r in ranks]
    every_row = slice(None)
    loras = [stage.lora(config, lora, r) for r in ranks]
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
    attended = attended_ranks(layer, heads, keys, plan, positions, observers)
    output = _projected(layer, attended, plan, loras, read, observers)
    outputs = tuple(observers[r]("returned", output[r]) for r in ranks)
    residuals = None
    if layer.parallelism.interleave in ("after_global", "between"):
        residuals = tuple(_select(arrived[r], of_tokens[r], plan.returned[r]) for r in ranks)
    written = tuple(
        cache.write(
            _cached(keys[r].k, layer.written[r]),
            _cached(keys[r].v, layer.written[r]),
            positions,
            seq_ids=local_rows(seq_ids, batch, layer.decode.mesh.row_of(r), cache.rows),
        )
        for r, cache in enumerate(caches)
    )
    return ShardedResult(outputs, plan.returned, written, residuals)


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


def _cached(value: Array, heads: Heads) -> Array:
    """Return the heads that a rank's cache holds, zeros for `PADDING`."""
    taken = value[:, np.maximum(heads, 0)]
    taken[:, np.array(heads) == PADDING] = 0.0
    return taken
