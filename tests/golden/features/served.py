"""Layers served through caches, and the bound that ties them to one context encoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from golden import (
    Array,
    AttentionConfig,
    Cache,
    Capture,
    Positions,
    chunk_cache,
    context_encoding,
    empty_cache,
    forward,
    layer_mask,
    paged_cache,
    rolling_cache,
    sharded_cache,
    transposed_cache,
)
from tests.golden.layers import (
    LAYERS,
    assert_within,
    integer_weights,
    layer_bound,
    seen,
    small_integers,
)

BLOCK_SIZE = 2


def scrambled_tables(batch: int, max_length: int) -> Positions:
    """Return block tables whose blocks lie out of order in the pool."""
    blocks = -(-max_length // BLOCK_SIZE)
    order = np.random.default_rng(batch).permutation(batch * blocks)
    return order.reshape(batch, blocks)


def paged(config: AttentionConfig, batch: int, max_length: int) -> Cache:
    tables = scrambled_tables(batch, max_length)
    return paged_cache(config, num_blocks=tables.size, block_size=BLOCK_SIZE, block_tables=tables)


CACHES: dict[str, Callable[[AttentionConfig, int, int], Cache]] = {
    "contiguous": lambda c, batch, length: empty_cache(c, batch=batch, max_length=length),
    "transposed": lambda c, batch, length: transposed_cache(c, batch=batch, max_length=length),
    "paged": paged,
    "sharded": lambda c, batch, length: sharded_cache(c, batch=batch, max_length=length, cores=3),
    "rolling": lambda c, batch, length: rolling_cache(c, batch=batch),
    "rolling-spare": lambda c, batch, length: rolling_cache(
        c, batch=batch, speculation_length=3, slots=8
    ),
    "chunk": lambda c, batch, length: chunk_cache(c, batch=batch),
}

SERVED = [
    (cache, layer)
    for cache in CACHES
    for layer, config in LAYERS.items()
    if (config.sliding_window is not None or not cache.startswith("rolling"))
    and (config.attention_chunk_size is not None or cache != "chunk")
]
"""Every cache beside every layer that it fits."""


@dataclass(frozen=True)
class Whole:
    """One context encoding of whole sequences, and how far another evaluation may lie from it."""

    states: Array
    positions: Positions
    output: Array
    bound: Array


def whole(config: AttentionConfig, seed: int, batch: int, length: int) -> Whole:
    """Encode `batch` sequences of `length` tokens at positions 0 to `length - 1`."""
    return encoded(config, seed, small_integers(seed, batch, length, config.hidden_size))


def encoded(config: AttentionConfig, seed: int, states: Array) -> Whole:
    """Encode these hidden states, small integers, in one context encoding."""
    weights = integer_weights(config, seed)
    batch, length = states.shape[:2]
    positions = np.tile(np.arange(length), (batch, 1))
    capture = Capture()
    output = context_encoding(
        config, weights, states, position_ids=positions, observe=capture
    ).output
    shape = (batch, config.num_attention_heads, length, length)
    visible = seen(layer_mask(config), positions, positions, shape)
    bound = layer_bound(config, weights, capture, visible, last_position=length)
    return Whole(states, positions, output, bound)


def serve(
    config: AttentionConfig,
    seed: int,
    sequences: Whole,
    cuts: Sequence[int],
    cache: Cache,
    **options: Any,
) -> tuple[Array, Cache]:
    """Run whole sequences in calls that end at the cuts, and return the outputs side by side."""
    weights, length = integer_weights(config, seed), sequences.states.shape[1]
    outputs = []
    for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
        result = forward(
            config,
            weights,
            sequences.states[:, start:stop],
            position_ids=sequences.positions[:, start:stop],
            cache=cache,
            **options,
        )
        outputs.append(result.output)
        cache = result.cache
    return np.concatenate(outputs, axis=1), cache


def check_served(
    config: AttentionConfig, seed: int, length: int, cuts: Sequence[int], cache: Cache
) -> None:
    """Assert that a cache changes nothing but rounding."""
    sequences = whole(config, seed, 2, length)
    output, _ = serve(config, seed, sequences, cuts, cache)
    assert_within(output, sequences.output, sequences.bound)
