"""The attention layer: hidden states to output, for context encoding and token generation."""

from __future__ import annotations

from typing import Any, NamedTuple

from golden.arrays import Positions, as_positions
from golden.attention import attend
from golden.cache import ContiguousCache, empty_cache
from golden.config import AttentionConfig
from golden.heads import (
    Projected,
    add_bias,
    layer_heads,
    merge_heads,
    product,
    project_qkv,
    split_heads,
)
from golden.lora import Lora
from golden.masks import Mask, layer_mask
from golden.stages import Accumulation, Array, Observer, unobserved
from golden.weights import AttentionWeights

__all__ = [
    "LayerResult",
    "Projected",
    "attend_and_project",
    "context_encoding",
    "encode_projected",
    "generate_projected",
    "merge_heads",
    "output_product",
    "project_qkv",
    "split_heads",
    "token_generation",
]


class LayerResult(NamedTuple):
    """Result of a layer.

    Attributes:
        output: `(batch, q_len, hidden_size)`, float64; rows of padded tokens hold the bias alone.
        cache: the cache after this call's keys and values were written.
    """

    output: Array
    cache: ContiguousCache


def context_encoding(
    config: AttentionConfig,
    weights: AttentionWeights,
    hidden_states: Any,
    *,
    position_ids: Any,
    cache: ContiguousCache | None = None,
    observe: Observer = unobserved,
    rotary_position_ids: Any = None,
    lora: Lora | None = None,
) -> LayerResult:
    """Encode a prompt (prefill): every token attends to the prompt's tokens it may see.

    What `cache` held before is not read; `golden.forward` continues from a cached prefix.

    Args:
        config: the layer.
        weights: its arrays.
        hidden_states: `(batch, q_len, hidden_size)`.
        position_ids: `(batch, q_len)`, int; -1 marks padding, on either side.
        cache: cache to write to; None makes one just long enough.
        observe: sees and may change each stage.
        rotary_position_ids: positions for RoPE alone, `(batch, q_len)` or, for M-RoPE,
            `(axes, batch, q_len)`, int; None takes `position_ids`.
        lora: adapters on the projections, None for none.

    Raises:
        ShapeError: an array does not fit the layer.
        ConfigError: a position is beyond the cache.
    """
    projected = project_qkv(config, weights, hidden_states, lora=lora, observe=observe)
    return encode_projected(
        config,
        weights,
        projected,
        position_ids=position_ids,
        cache=cache,
        observe=observe,
        rotary_position_ids=rotary_position_ids,
        lora=lora,
    )


def encode_projected(
    config: AttentionConfig,
    weights: AttentionWeights,
    projected: Projected,
    *,
    position_ids: Any,
    cache: ContiguousCache | None = None,
    observe: Observer = unobserved,
    rotary_position_ids: Any = None,
    lora: Lora | None = None,
) -> LayerResult:
    """Context encoding from projections made before: what an error model repeats.

    Takes and raises what `context_encoding` does, with `projected` for its hidden states; of
    `lora` only the output projection's adapters are left to add.
    """
    batch, q_len = projected.q.shape[:2]
    positions = as_positions("position_ids", position_ids, (batch, q_len))
    if cache is None:
        longest = int(positions.max(initial=0)) + 1
        cache = empty_cache(config, batch=batch, max_length=longest)
    q, k, v = layer_heads(config, weights, projected, positions, observe, rotary_position_ids)
    output = attend_and_project(
        config, weights, q, k, v, positions, positions, layer_mask(config), observe, lora
    )
    return LayerResult(output, cache.write(k, v, positions))


def token_generation(
    config: AttentionConfig,
    weights: AttentionWeights,
    hidden_states: Any,
    *,
    position_ids: Any,
    cache: ContiguousCache,
    observe: Observer = unobserved,
    rotary_position_ids: Any = None,
    lora: Lora | None = None,
) -> LayerResult:
    """Generate (decode): new tokens attend to the cache and to each other.

    Args:
        config: the layer.
        weights: its arrays.
        hidden_states: `(batch, q_len, hidden_size)`, the new tokens.
        position_ids: `(batch, q_len)`, int; -1 marks an idle row.
        cache: keys and values of the tokens before; not changed.
        observe: sees and may change each stage.
        rotary_position_ids: positions for RoPE alone, `(batch, q_len)` or, for M-RoPE,
            `(axes, batch, q_len)`, int; None takes `position_ids`.
        lora: adapters on the projections, None for none.

    Raises:
        ShapeError: an array does not fit the layer.
        ConfigError: a position is beyond the cache.
    """
    projected = project_qkv(config, weights, hidden_states, lora=lora, observe=observe)
    return generate_projected(
        config,
        weights,
        projected,
        position_ids=position_ids,
        cache=cache,
        observe=observe,
        rotary_position_ids=rotary_position_ids,
        lora=lora,
    )


def generate_projected(
    config: AttentionConfig,
    weights: AttentionWeights,
    projected: Projected,
    *,
    position_ids: Any,
    cache: ContiguousCache,
    observe: Observer = unobserved,
    rotary_position_ids: Any = None,
    lora: Lora | None = None,
) -> LayerResult:
    """Token generation from projections made before: what an error model repeats.

    Takes and raises what `token_generation` does, with `projected` for its hidden states; of
    `lora` only the output projection's adapters are left to add.
    """
    batch, q_len = projected.q.shape[:2]
    positions = as_positions("position_ids", position_ids, (batch, q_len))
    q, k, v = layer_heads(config, weights, projected, positions, observe, rotary_position_ids)
    cache = cache.write(k, v, positions)
    output = attend_and_project(
        config,
        weights,
        q,
        cache.k,
        cache.v,
        positions,
        cache.positions,
        layer_mask(config),
        observe,
        lora,
    )
    return LayerResult(output, cache)


def attend_and_project(
    config: AttentionConfig,
    weights: AttentionWeights,
    q: Array,
    k: Array,
    v: Array,
    q_positions: Positions,
    kv_positions: Positions,
    mask: Mask,
    observe: Observer,
    lora: Lora | None = None,
) -> Array:
    """Attend with the layer's scale, cap and sinks, then project to `hidden_size`.

    Returns:
        `(batch, q_len, hidden_size)`, float64.
    """
    attended = attend(
        q,
        k,
        v,
        q_positions=q_positions,
        kv_positions=kv_positions,
        mask=mask,
        softmax_scale=config.softmax_scale,
        sinks=weights.sinks,
        softcap=config.softcap,
        observe=observe,
    )
    projection, accumulation = output_product(weights, attended.output, lora, observe)
    return add_bias("o", projection, accumulation, weights.o_bias, observe)


def output_product(
    weights: AttentionWeights,
    attended: Array,
    lora: Lora | None = None,
    observe: Observer = unobserved,
) -> tuple[Array, Accumulation]:
    """Multiply the heads' outputs, BHSD, with the output projection and its adapters.

    Returns:
        `(batch, q_len, hidden_size)`, float64, before the bias, and how it was summed. On one
        rank of several this is its share of the sum over all heads.
    """
    merged = merge_heads(attended)
    projection, accumulation = product(merged, weights.o_proj)
    if lora is None:
        return projection, accumulation
    return lora.add("o", merged, projection, accumulation, observe)
