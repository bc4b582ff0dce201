"""Cross attention: queries of one sequence, keys and values of another, no causal order."""

from __future__ import annotations

from typing import Any

import numpy as np

from golden.config import AttentionConfig
from golden.errors import ConfigError, ShapeError
from golden.heads import Projected, layer_heads, project_qkv
from golden.layer import attend_and_project
from golden.masks import Everything
from golden.stages import Array, Observer, unobserved
from golden.weights import AttentionWeights


def cross_attention(
    config: AttentionConfig,
    weights: AttentionWeights,
    hidden_states: Any,
    source_states: Any,
    *,
    source_mask: Any = None,
    observe: Observer = unobserved,
) -> Array:
    """Attend from a sequence to every state of a source: an encoder's or an image's.

    X1: every query sees every source state that is not padding, whatever the two lengths.
    X2: keys and values depend on the source alone, so they may be computed once and kept.

    Args:
        config: the layer, without RoPE, temperature tuning, window or chunk: positions of two
            sequences do not compare.
        weights: its arrays.
        hidden_states: `(batch, q_len, hidden_size)`.
        source_states: `(batch, kv_len, hidden_size)`.
        source_mask: `(batch, kv_len)`, bool, False for padding; None for none.
        observe: sees and may change each stage.

    Returns:
        `(batch, q_len, hidden_size)`, float64.

    Raises:
        ConfigError: the layer orders its tokens by position.
        ShapeError: an array does not fit.

    Source: Vaswani et al. (2017), arXiv 1706.03762, section 3.2.3.
    """
    ordered = [
        name
        for name in ("rope", "temperature_tuning", "sliding_window", "attention_chunk_size")
        if getattr(config, name) is not None
    ]
    if ordered:
        raise ConfigError(
            f"cross attention excludes {' and '.join(ordered)}: positions of two sequences do not "
            "compare"
        )
    here = project_qkv(config, weights, hidden_states)
    there = project_qkv(config, weights, source_states)
    if here.q.shape[0] != there.k.shape[0]:
        raise ShapeError(
            f"source_states must have the batch of hidden_states, {here.q.shape[0]}, got "
            f"{there.k.shape[0]}"
        )
    sums = (here.accumulations[0], *there.accumulations[1:])
    queries = np.zeros(here.q.shape[:2], dtype=np.int64)
    occupied = np.ones(there.k.shape[:2], dtype=np.bool_)
    if source_mask is not None:
        occupied = np.asarray(source_mask)
        if occupied.dtype != np.bool_ or occupied.shape != there.k.shape[:2]:
            raise ShapeError(
                f"source_mask must be bool of shape {there.k.shape[:2]}, got {occupied.dtype} "
                f"{occupied.shape}"
            )
    keys = np.where(occupied, np.arange(there.k.shape[1]), -1)
    q, k, v = layer_heads(
        config, weights, Projected(here.q, there.k, there.v, sums), queries, observe
    )
    return attend_and_project(config, weights, q, k, v, queries, keys, Everything(), observe)
