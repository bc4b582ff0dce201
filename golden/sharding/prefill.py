"""Context encoding (prefill) on ranks: tensor, context and sequence parallel, over their caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from golden.arrays import as_float64, as_positions
from golden.caches.held import Cache
from golden.errors import ShapeError
from golden.lora import Lora
from golden.sharding.encoding import cached_heads, encode_tokens
from golden.sharding.layer import ShardedLayer, ShardedResult
from golden.sharding.observers import RankObserver, unobserved_ranks
from golden.sharding.prior import data_parallel_rows, gathered_prior
from golden.sharding.rank_heads import local_rows
from golden.sharding.rules import check_prefill


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
    """Encode a prompt on every rank: the whole, or what follows a prefix that the caches hold.

    D23: the ranks' outputs are those of `golden.forward`, to the roundoff of sums in another
        order: partial sums of a row, and with a ring partial softmaxes. Over empty caches that is
        `golden.context_encoding`; over cached keys (D27) it is prefix-cached prefill, or a window
        of a prompt.

    Args:
        layer: cut by `shard`.
        hidden_states: `(batch, q_len, hidden_size)`, whole and in order; each rank is given its
            part.
        position_ids: `(batch, q_len)`, int; -1 marks padding.
        caches: by rank, to read and to write to; None makes contiguous ones just long enough.
        seq_ids: `(batch,)`, int, the cache row of each batch row over all data-parallel ranks; an
            id outside of all makes the row idle. None takes rows in order.
        rotary_position_ids: positions for RoPE alone; None takes `position_ids`.
        lora: adapters of the whole layer, None for none.
        observe: gives each rank an observer.

    Raises:
        ShapeError: an array does not fit.
        ConfigError: the prompt cannot be cut, or a cache has no slot for a token.

    Source: neuronx-distributed-inference, `standard_causal_attention_forward` and
    `chunked_attention_with_context_parallel_forward`.
    """
    hidden = as_float64(
        "hidden_states",
        hidden_states,
        (None, None, layer.config.input_size),
        "(batch, q_len, hidden)",
    )
    batch, q_len = hidden.shape[:2]
    positions = as_positions("position_ids", position_ids, (batch, q_len))
    # where ids say which rank keeps a row, the batch need not be cut evenly
    check_prefill(
        layer.config, layer.parallelism, batch=batch if seq_ids is None else None, q_len=q_len
    )
    if caches is None:
        longest = int(positions.max(initial=0)) + 1
        caches = layer.empty_caches(batch=batch, max_length=longest)
    check_caches(layer, caches)
    owned = data_parallel_rows(layer, caches, seq_ids, batch) >= 0
    positions = np.where(owned[:, None], positions, -1)
    observers = [observe(rank) for rank in range(len(caches))]
    encoded = encode_tokens(
        layer,
        hidden,
        positions,
        observers,
        rotary_position_ids=rotary_position_ids,
        lora=lora,
        prior=gathered_prior(layer, caches, positions, seq_ids, observers),
    )
    written = tuple(
        cache.write(
            cached_heads(encoded.keys[r].k, layer.written[r]),
            cached_heads(encoded.keys[r].v, layer.written[r]),
            positions,
            seq_ids=local_rows(seq_ids, batch, layer.decode.mesh.row_of(r), cache.rows),
        )
        for r, cache in enumerate(caches)
    )
    return ShardedResult(encoded.outputs, encoded.tokens, written, encoded.residuals)


def check_caches(layer: ShardedLayer, caches: Sequence[Cache]) -> None:
    """Require a cache per rank.

    Raises:
        ShapeError: there are more or fewer.
    """
    ranks = layer.prefill.mesh.world_size
    if len(caches) != ranks:
        raise ShapeError(f"caches must be one per rank, {ranks}, got {len(caches)}")
