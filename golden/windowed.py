"""Windowed context encoding: a prompt in pieces, each attending to the pieces before it."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np

from golden.arrays import as_positions
from golden.caches.held import Cache
from golden.config import AttentionConfig
from golden.errors import ConfigError
from golden.lora import Lora
from golden.serving import ForwardResult, forward
from golden.stages import Observer, unobserved
from golden.weights import AttentionWeights

C = TypeVar("C", bound=Cache)


def windowed_encoding(
    config: AttentionConfig,
    weights: AttentionWeights,
    hidden_states: Any,
    *,
    position_ids: Any,
    cache: C,
    encoding_window: int,
    lora: Lora | None = None,
    observe: Observer = unobserved,
) -> ForwardResult[C]:
    """Encode a prompt (prefill) in windows of `encoding_window` tokens.

    W1: the result is that of one context encoding, whatever the window: each piece reads what
        the pieces before it left in the cache. A sliding window of the layer, a chunk and a
        sink keep their meaning; the public module wants `encoding_window == sliding_window`.

    Args:
        config: the layer.
        weights: its arrays.
        hidden_states: `(batch, q_len, hidden_size)`.
        position_ids: `(batch, q_len)`, int; -1 marks padding, on either side.
        cache: what a prefix left, or an empty cache.
        encoding_window: tokens of a piece; the last one may be shorter.
        lora: adapters on the projections, None for none.
        observe: sees and may change each stage, once per piece.

    Returns:
        The pieces' outputs side by side, and the cache after the last.

    Raises:
        ConfigError: `encoding_window` is not positive, or the cache has no slot for a token.
        ShapeError: an array does not fit the layer.

    Source: neuronx-distributed-inference, `windowed_context_encoding_size`.
    """
    if encoding_window < 1:
        raise ConfigError(f"encoding_window must be positive, got {encoding_window}")
    hidden = np.asarray(hidden_states)
    positions = as_positions("position_ids", position_ids, (hidden.shape[0], hidden.shape[1]))
    outputs = [np.zeros((hidden.shape[0], 0, config.hidden_size))]
    for start in range(0, hidden.shape[1], encoding_window):
        piece = slice(start, start + encoding_window)
        result = forward(
            config,
            weights,
            hidden[:, piece],
            position_ids=positions[:, piece],
            cache=cache,
            lora=lora,
            observe=observe,
        )
        outputs.append(result.output)
        cache = result.cache
    return ForwardResult(np.concatenate(outputs, axis=1), cache)
