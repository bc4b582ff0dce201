"""Vector-Jacobian products of the layer: from its output back to hidden states and weights.

The forward pass is `context_encoding` or `token_generation` itself, whose stages are captured;
nothing of it is computed a second time here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from golden.arrays import Positions, as_float64
from golden.cache import ContiguousCache
from golden.config import AttentionConfig
from golden.gradients.attention import AttendGradients, attend_vjp
from golden.gradients.cache import part_written
from golden.gradients.forward import Pass, run_forward
from golden.gradients.heads import heads_vjp
from golden.masks import layer_mask
from golden.stages import Accumulation, Array, Observer, unobserved
from golden.weights import AttentionWeights


class LayerGradients(NamedTuple):
    """Result of a layer's vector-Jacobian product, float64.

    Attributes:
        hidden_states: `(batch, q_len, hidden_size)`; zero for padded tokens.
        weights: the gradient of each array, shaped and named like the array; None where the layer
            has none. `fuse_qkv` makes the gradient of a fused projection of it.
        cache_k: `(batch, num_key_value_heads, max_length, head_dim)`, of the keys that the cache
            held before the call; None without a cache.
        cache_v: likewise for values.
    """

    hidden_states: Array
    weights: AttentionWeights
    cache_k: Array | None
    cache_v: Array | None


def context_encoding_vjp(
    config: AttentionConfig,
    weights: AttentionWeights,
    hidden_states: Any,
    d_output: Any,
    *,
    position_ids: Any,
    cache: ContiguousCache | None = None,
    d_cache_k: Any = None,
    d_cache_v: Any = None,
    rotary_position_ids: Any = None,
    observe: Observer = unobserved,
) -> LayerGradients:
    """Carry cotangents of `context_encoding` (prefill) back to its inputs.

    The layer is `y = merge(attend(q, k, v)) @ W_o.T + b_o`, so `d_b_o = sum_tokens d_y`,
    `d_W_o = sum_tokens d_y merge(attn)` and `d_attn = split(d_y @ W_o)`; `attend_vjp` carries
    that to the heads, and `heads_vjp` through rotation, norm, clip and projection to the hidden
    states. Positions and the angles they make are constants.

    G11: a padded token's output is the bias alone, so its cotangent reaches only the bias.
    G12 (`part_written`): the cache's slots pass their cotangent to the token written there, all
        others to the cache before.

    Args:
        config: the layer.
        weights: its arrays.
        hidden_states: `(batch, q_len, hidden_size)`.
        d_output: `(batch, q_len, hidden_size)`, cotangent of the output.
        position_ids: `(batch, q_len)`, int; -1 marks padding.
        cache: cache the call writes to; None makes one just long enough.
        d_cache_k: `(batch, num_key_value_heads, max_length, head_dim)`, cotangent of the keys of
            the cache after the call; None is zeros.
        d_cache_v: likewise for values.
        rotary_position_ids: positions for RoPE alone, as the layer takes them; None takes
            `position_ids`.
        observe: sees and may change each stage, of `golden.STAGES` and of
            `golden.GRADIENT_STAGES`.

    Returns:
        Gradients in float64.

    Raises:
        ShapeError: an array does not fit the layer.
        ConfigError: a position is beyond the cache, or a feature has no gradient here.
    """
    done, after, d_attn, found = run_forward(
        config,
        weights,
        hidden_states,
        d_output,
        (position_ids, rotary_position_ids),
        cache,
        decode=False,
        observe=observe,
    )
    gradients = _attention_vjp(
        done, d_attn, done.stages["k_cache"], done.stages["v_cache"], done.positions, observe
    )
    d_new: dict[str, Array] = {"k": gradients.k, "v": gradients.v}
    d_before: dict[str, Array | None] = {"k": None, "v": None}
    for name, value in (("k", d_cache_k), ("v", d_cache_v)):
        if cache is not None or value is not None:  # a new cache may be long, and unread
            d_after = _cotangent(f"d_cache_{name}", value, after.k)
            d_written, d_before[name] = part_written(after, done.positions, d_after)
            d_new[name] = observe(f"d_{name}_cache", d_new[name] + d_written)
    if cache is None:
        d_before = {"k": None, "v": None}
    d_hidden, more = heads_vjp(done, gradients.q, d_new["k"], d_new["v"], observe)
    return LayerGradients(
        d_hidden, _as_weights(found | more, gradients), d_before["k"], d_before["v"]
    )


def token_generation_vjp(
    config: AttentionConfig,
    weights: AttentionWeights,
    hidden_states: Any,
    d_output: Any,
    *,
    position_ids: Any,
    cache: ContiguousCache,
    d_cache_k: Any = None,
    d_cache_v: Any = None,
    rotary_position_ids: Any = None,
    observe: Observer = unobserved,
) -> LayerGradients:
    """Carry cotangents of `token_generation` (decode) back to its inputs and the cache.

    As `context_encoding_vjp`, except that attention reads keys and values from the cache after
    the write: their gradients add to the cache's own cotangents before those part (G12) into the
    new tokens' and the cache's before.

    Args:
        config: the layer.
        weights: its arrays.
        hidden_states: `(batch, q_len, hidden_size)`, the new tokens.
        d_output: `(batch, q_len, hidden_size)`, cotangent of the output.
        position_ids: `(batch, q_len)`, int; -1 marks an idle row.
        cache: keys and values of the tokens before; not changed.
        d_cache_k: like `cache.k`, cotangent of the cache after the call; None is zeros.
        d_cache_v: likewise for values.
        rotary_position_ids: positions for RoPE alone, as the layer takes them; None takes
            `position_ids`.
        observe: sees and may change each stage, of `golden.STAGES` and of
            `golden.GRADIENT_STAGES`.

    Returns:
        Gradients in float64; `cache_k` and `cache_v` are those of `cache.k` and `cache.v`.

    Raises:
        ShapeError: an array does not fit the layer.
        ConfigError: a position is beyond the cache, or a feature has no gradient here.
    """
    done, after, d_attn, found = run_forward(
        config,
        weights,
        hidden_states,
        d_output,
        (position_ids, rotary_position_ids),
        cache,
        decode=True,
        observe=observe,
    )
    gradients = _attention_vjp(done, d_attn, after.k, after.v, after.positions, observe)
    d_after_k = observe("d_k_cache", gradients.k + _cotangent("d_cache_k", d_cache_k, after.k))
    d_after_v = observe("d_v_cache", gradients.v + _cotangent("d_cache_v", d_cache_v, after.k))
    d_k, d_before_k = part_written(after, done.positions, d_after_k)
    d_v, d_before_v = part_written(after, done.positions, d_after_v)
    d_hidden, more = heads_vjp(done, gradients.q, d_k, d_v, observe)
    return LayerGradients(d_hidden, _as_weights(found | more, gradients), d_before_k, d_before_v)


def _attention_vjp(
    done: Pass, d_attn: Array, k: Array, v: Array, kv_positions: Positions, observe: Observer
) -> AttendGradients:
    def after_forward(
        stage: str, value: Array, accumulation: Accumulation | None = None, /
    ) -> Array:
        """Show the observer gradients alone; the forward stages are as it left them."""
        known = done.stages.get(stage)
        return observe(stage, value, accumulation) if known is None else known

    return attend_vjp(
        done.queries(),
        k,
        v,
        d_attn,
        q_positions=done.positions,
        kv_positions=kv_positions,
        mask=layer_mask(done.config),
        softmax_scale=done.config.softmax_scale,
        sinks=done.weights.sinks,
        softcap=done.config.softcap,
        observe=after_forward,
    )


def _cotangent(name: str, value: Any, cached: Array) -> Array:
    if value is None:
        return np.zeros_like(cached)
    return as_float64(name, value, cached.shape, "BHSD, as the cache")


def _as_weights(found: dict[str, Array], gradients: AttendGradients) -> AttentionWeights:
    if gradients.sinks is not None:
        found = found | {"sinks": gradients.sinks}
    return AttentionWeights(**found)
