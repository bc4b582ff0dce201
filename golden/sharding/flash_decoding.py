"""Flash decoding: ranks that share a key/value head hold a part of its tokens each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from golden.arrays import Positions
from golden.attention import Attended, attend
from golden.caches.held import Rows
from golden.errors import ConfigError
from golden.masks import layer_mask
from golden.serving import active_part
from golden.sharding.collectives import all_gather, all_to_all, over_groups
from golden.sharding.core_cache import CoreCache
from golden.sharding.layer import ShardedLayer
from golden.sharding.mesh import Groups
from golden.sharding.rank_heads import RankHeads
from golden.split_kv import merge_attended
from golden.stages import Array, Observer


def core_groups(layer: ShardedLayer) -> Groups:
    """Return the ranks among which a key/value head's tokens are spread."""
    cores = layer.parallelism.cores_per_group
    ranks = range(layer.decode.mesh.world_size)
    return tuple(tuple(ranks[i : i + cores]) for i in range(0, len(ranks), cores))


def attend_in_groups(
    layer: ShardedLayer,
    heads: Sequence[RankHeads],
    places: Sequence[Positions],
    caches: Sequence[Any],
    ids: Sequence[Rows],
    active_masks: Sequence[Any],
    observers: Sequence[Observer],
) -> list[Array]:
    """Attend in three steps: gather queries, attend to own tokens, join by logsumexp.

    D26: every core attends with all queries of its group to the tokens it holds, new ones
        included; each rank then joins the partial results of its own heads, in which the sink
        counts once, as a part without a value.

    Args:
        layer: the layer.
        heads: by rank, queries, keys and values of the new tokens.
        places: by rank, their positions.
        caches: by rank, a `CoreCache`.
        ids: by rank, the cache row of each batch row.
        active_masks: by rank, which new tokens see which.
        observers: by rank.

    Returns:
        By rank, outputs of its heads, BHSD.

    Raises:
        ConfigError: a cache is of another kind.

    Source: neuronx-distributed-inference, `flash_decoding` and `distributed_softmax`.
    """
    groups = core_groups(layer)
    queries = over_groups(groups, [rank.q for rank in heads], lambda v: all_gather(v, axis=1))
    queries = [observe("q_gathered", q) for observe, q in zip(observers, queries, strict=True)]
    partial: list[Attended] = []
    for rank, cache in enumerate(caches):
        if not isinstance(cache, CoreCache):
            raise ConfigError(
                "caches must be those of ShardedLayer.empty_caches for flash decoding, got "
                f"{type(cache).__name__} on rank {rank}"
            )
        prior = cache.prior(places[rank], seq_ids=ids[rank])
        keys = prior.and_active(heads[rank].k, heads[rank].v, cache.own(places[rank]))
        mask = layer_mask(layer.config)
        if active_masks[rank] is not None:
            mask = mask & active_part(active_masks[rank], prior)
        partial.append(
            attend(
                queries[rank],
                keys.k,
                keys.v,
                q_positions=places[rank],
                kv_positions=keys.positions,
                mask=mask,
                softmax_scale=layer.config.softmax_scale,
                softcap=layer.config.softcap,
                observe=observers[rank],
            )
        )
    # each part as one more axis: every core sends rank i the heads of rank i
    outputs = over_groups(
        groups, [part.output[None] for part in partial], lambda v: all_to_all(v, split=2, join=0)
    )
    sent = [
        observe("logsumexp_sent", part.logsumexp)
        for observe, part in zip(observers, partial, strict=True)
    ]
    logs = over_groups(
        groups, [log[None] for log in sent], lambda v: all_to_all(v, split=2, join=0)
    )
    return [
        observe("attn_merged", _joined(output, log, weights.sinks))
        for observe, output, log, weights in zip(
            observers, outputs, logs, layer.decode.weights, strict=True
        )
    ]


def _joined(outputs: Array, logsumexps: Array, sinks: Array | None) -> Array:
    parts = list(map(Attended, outputs, logsumexps))
    if sinks is not None:
        log = np.broadcast_to(sinks[:, None], logsumexps[0].shape)
        parts.append(Attended(np.zeros_like(outputs[0]), log))
    return merge_attended(parts).output
