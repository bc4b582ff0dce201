"""One rank's part of a layer: its configuration, weights and adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from golden.config import AttentionConfig
from golden.lora import Adapters, Lora
from golden.sharding.head_layout import PADDING, HeadLayout, Heads
from golden.stages import Array
from golden.weights import AttentionWeights


def rank_config(config: AttentionConfig, layout: HeadLayout) -> AttentionConfig:
    """Return the layer as one rank of a row computes it: its own heads, and no output bias.

    D13: the output bias is added once, after the sum over the row; a rank that adds it before
        leaves it there as often as there are ranks.
    """
    return replace(
        config,
        num_attention_heads=len(layout.q_heads) // layout.tp_degree,
        num_key_value_heads=len(layout.kv_heads) // layout.tp_degree,
        o_bias=False,
    )


def rank_weights(
    config: AttentionConfig, weights: AttentionWeights, layout: HeadLayout, part: int
) -> AttentionWeights:
    """Cut one part of a layer's weights.

    D14: rows of q, k and v, columns of o, biases, sinks and the weights of a norm over the whole
        projection are cut by heads; the weights of a norm over one head are shared. Fused weights
        are cut as q, k and v and then joined: `fuse_qkv` of the result.
    """
    q, kv, width = layout.q_part(part), layout.kv_part(part), config.head_dim
    by_head = config.qk_norm is None or config.qk_norm.scope == "head"

    def normed(value: Array | None, heads: Heads) -> Array | None:
        return value if by_head or value is None else take_heads(value, heads, width)

    def cut(value: Array | None, heads: Heads) -> Array | None:
        return None if value is None else take_heads(value, heads, width)

    return AttentionWeights(
        q_proj=take_heads(weights.q_proj, q, width),
        k_proj=take_heads(weights.k_proj, kv, width),
        v_proj=take_heads(weights.v_proj, kv, width),
        o_proj=take_heads(weights.o_proj, q, width, axis=1),
        q_bias=cut(weights.q_bias, q),
        k_bias=cut(weights.k_bias, kv),
        v_bias=cut(weights.v_bias, kv),
        q_norm=normed(weights.q_norm, q),
        k_norm=normed(weights.k_norm, kv),
        q_norm_bias=normed(weights.q_norm_bias, q),
        k_norm_bias=normed(weights.k_norm_bias, kv),
        sinks=None if weights.sinks is None else take_heads(weights.sinks, q, 1),
    )


def rank_lora(config: AttentionConfig, lora: Lora, layout: HeadLayout, part: int) -> Lora:
    """Cut one part of a layer's adapters.

    D15: as the projections are cut: `up` of q, k and v by its output, `down` of o by its input;
        the other matrix is shared. The low-rank terms of o then add up over the row.
    """
    heads = {"q": layout.q_part(part), "k": layout.kv_part(part), "v": layout.kv_part(part)}
    width, cut = config.head_dim, dict[str, Adapters]()
    for target, (down, up, scaling) in lora.adapters.items():
        if target == "o":
            down = take_heads(down, layout.q_part(part), width, axis=2)
        else:
            up = take_heads(up, heads[target], width, axis=1)
        cut[target] = Adapters(down, up, scaling)
    return Lora(cut, lora.adapter_ids)


def take_heads(value: Array, heads: Sequence[int], width: int, *, axis: int = 0) -> Array:
    """Return the blocks of `width` entries that belong to these heads, zeros for `PADDING`."""
    shape = (*value.shape[:axis], -1, width, *value.shape[axis + 1 :])
    sources = np.array(heads, dtype=np.int64)
    taken = np.take(value.reshape(shape), np.maximum(sources, 0), axis=axis)
    padding = (slice(None),) * axis + (sources == PADDING,)
    taken[padding] = 0.0
    joined: Array = taken.reshape(*value.shape[:axis], len(heads) * width, *value.shape[axis + 1 :])
    return joined


def whole_projection(parts: Sequence[Array], heads: Sequence[Heads], width: int) -> Array:
    """Join ranks' flat projections into the layer's own, without padding and repetitions.

    Args:
        parts: per rank of a row, `(batch, q_len, heads of the rank * width)`.
        heads: per rank, the source of each of its heads.
        width: of a head.

    Returns:
        `(batch, q_len, heads of the layer * width)`, heads in order.
    """
    found: dict[int, Array] = {}
    for value, sources in zip(parts, heads, strict=True):
        for slot, head in enumerate(sources):
            if head != PADDING:
                found.setdefault(head, value[..., slot * width : (slot + 1) * width])
    return np.concatenate([found[head] for head in sorted(found)], axis=-1)
