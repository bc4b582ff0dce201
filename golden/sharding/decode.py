"""Token generation (decode) on ranks: tensor and data parallel, and flash decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from golden.arrays import as_float64, as_positions
from golden.attention import attend
from golden.caches.held import Cache, seated
from golden.errors import ShapeError
from golden.lora import Lora
from golden.masks import layer_mask
from golden.serving import active_part
from golden.sharding.flash_decoding import attend_in_groups
from golden.sharding.layer import ShardedLayer, ShardedResult
from golden.sharding.observers import RankObserver, unobserved_ranks
from golden.sharding.output import dispatched_output, output_shares
from golden.sharding.rank_heads import RankHeads, heads_of_ranks, local_rows, rotary_part
from golden.sharding.rules import check_decode
from golden.stages import Array, Observer

C = TypeVar("C", bound=Cache)


def generate_sharded(
    layer: ShardedLayer,
    hidden_states: Any,
    *,
    position_ids: Any,
    caches: Sequence[C],
    seq_ids: Any = None,
    active_mask: Any = None,
    rotary_position_ids: Any = None,
    lora: Lora | None = None,
    observe: RankObserver = unobserved_ranks,
) -> ShardedResult[C]:
    """Run new tokens through the layer on every rank, with the caches that prefill left.

    D25: the ranks' outputs are those of `golden.forward`. Data-parallel rank `d` computes batch
        rows `d * batch / degree` and on, and finds their keys in its own cache.

    Args:
        layer: cut by `shard`.
        hidden_states: `(batch, q_len, hidden_size)`, the whole batch.
        position_ids: `(batch, q_len)`, int; -1 marks an idle row.
        caches: by rank; not changed.
        seq_ids: `(batch,)`, int, the cache row of each batch row over all data-parallel ranks; a
            row whose sequence another data-parallel rank holds is idle. None takes rows in order.
        active_mask: which of the call's tokens see which, as in `golden.forward`.
        rotary_position_ids: positions for RoPE alone; None takes `position_ids`.
        lora: adapters of the whole layer, None for none.
        observe: gives each rank an observer.

    Returns:
        Every rank's output holds the whole batch.

    Raises:
        ShapeError: an array does not fit.
        ConfigError: the batch cannot be cut, or a cache has no slot for a token.
    """
    config, stage = layer.config, layer.decode
    hidden = as_float64(
        "hidden_states", hidden_states, (None, None, config.input_size), "(batch, q_len, hidden)"
    )
    batch, q_len = hidden.shape[:2]
    positions = as_positions("position_ids", position_ids, (batch, q_len))
    check_decode(layer.parallelism, batch=batch)
    ranks = range(stage.mesh.world_size)
    if len(caches) != len(ranks):
        raise ShapeError(f"caches must be one per rank, {len(ranks)}, got {len(caches)}")
    observers = [observe(rank) for rank in ranks]
    share = batch // len(stage.mesh.rows)
    rows = [slice(row * share, (row + 1) * share) for row in map(stage.mesh.row_of, ranks)]
    ids = [
        local_rows(seq_ids, batch, stage.mesh.row_of(rank), caches[rank].rows)[rows[rank]]
        for rank in ranks
    ]
    places = [seated(caches[rank], positions[rows[rank]], ids[rank]) for rank in ranks]
    loras = [_rows_of(stage.lora(config, lora, rank), rows[rank]) for rank in ranks]
    heads = heads_of_ranks(
        layer,
        stage,
        [observers[rank]("hidden_gathered", hidden[rows[rank]]) for rank in ranks],
        places,
        [rotary_part(rotary_position_ids, rows[rank], slice(None)) for rank in ranks],
        loras,
        observers,
    )
    masks = [_rows_of_mask(active_mask, rows[rank]) for rank in ranks]
    if layer.parallelism.cores_per_group > 1:
        attended = attend_in_groups(layer, heads, places, caches, ids, masks, observers)
    else:
        attended = [
            _attended(layer, rank, heads[rank], places[rank], caches[rank], ids[rank], mask, see)
            for rank, (mask, see) in enumerate(zip(masks, observers, strict=True))
        ]
    shares = output_shares(stage, attended, loras, observers)
    output = dispatched_output(layer, stage, shares, observers)
    written = tuple(
        cache.write(heads[rank].k, heads[rank].v, places[rank], seq_ids=ids[rank])
        for rank, cache in enumerate(caches)
    )
    outputs = tuple(observers[rank]("returned", output[rank]) for rank in ranks)
    return ShardedResult(outputs, (np.arange(q_len),) * len(ranks), written)


def _attended(
    layer: ShardedLayer,
    rank: int,
    heads: RankHeads,
    places: Any,
    cache: Cache,
    ids: Any,
    active_mask: Any,
    observe: Observer,
) -> Array:
    """Attend on one rank to its cache and to the call's own tokens, in one softmax."""
    prior = cache.prior(places, seq_ids=ids)
    keys = prior.and_active(heads.k, heads.v, places)
    mask = layer_mask(layer.config)
    if active_mask is not None:
        mask = mask & active_part(active_mask, prior)
    return attend(
        heads.q,
        keys.k,
        keys.v,
        q_positions=places,
        kv_positions=keys.positions,
        mask=mask,
        softmax_scale=layer.config.softmax_scale,
        sinks=layer.decode.weights[rank].sinks,
        softcap=layer.config.softcap,
        observe=observe,
    ).output


def _rows_of(lora: Lora | None, rows: slice) -> Lora | None:
    return None if lora is None else Lora(lora.adapters, lora.adapter_ids[rows])


def _rows_of_mask(active_mask: Any, rows: slice) -> Any:
    array = None if active_mask is None else np.asarray(active_mask)
    if array is None or array.ndim != 3 or array.shape[0] == 1:
        return array
    return array[rows]
