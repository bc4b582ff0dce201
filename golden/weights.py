"""The arrays of one attention layer, and the fused form of its query, key and value projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from golden.arrays import as_float64
from golden.config import AttentionConfig, QKNorm
from golden.errors import ConfigError
from golden.stages import Array


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AttentionWeights:
    """One layer's arrays, float64, matrices as `(out, in)`: a projection is `x @ w.T + b`.

    Attributes:
        q_proj: `(num_attention_heads * head_dim, input_size)`; the input is `hidden_size` wide,
            twice that for an EAGLE-3 draft.
        k_proj: `(num_key_value_heads * head_dim, input_size)`.
        v_proj: like `k_proj`.
        o_proj: `(hidden_size, num_attention_heads * head_dim)`.
        q_bias: `(num_attention_heads * head_dim,)`, None without qkv_bias.
        k_bias: `(num_key_value_heads * head_dim,)`, None without qkv_bias.
        v_bias: like `k_bias`.
        o_bias: `(hidden_size,)`, None without o_bias.
        q_norm: learned weight of the query norm, `(head_dim,)` for scope `head`, the width of
            the projection for scope `projection`; None when the norm has none.
        k_norm: likewise for keys.
        q_norm_bias: learned bias of a weighted layer norm, shaped like `q_norm`.
        k_norm_bias: likewise for keys.
        sinks: `(num_attention_heads,)`, None without learned sinks.
    """

    q_proj: Array
    k_proj: Array
    v_proj: Array
    o_proj: Array
    q_bias: Array | None = None
    k_bias: Array | None = None
    v_bias: Array | None = None
    o_bias: Array | None = None
    q_norm: Array | None = None
    k_norm: Array | None = None
    q_norm_bias: Array | None = None
    k_norm_bias: Array | None = None
    sinks: Array | None = None


def weight_shapes(config: AttentionConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every array a layer of this configuration has, by field name."""
    shapes: dict[str, tuple[int, ...]] = {
        "q_proj": (config.q_size, config.input_size),
        "k_proj": (config.kv_size, config.input_size),
        "v_proj": (config.kv_size, config.input_size),
        "o_proj": (config.hidden_size, config.q_size),
    }
    if config.qkv_bias:
        shapes |= {
            "q_bias": (config.q_size,),
            "k_bias": (config.kv_size,),
            "v_bias": (config.kv_size,),
        }
    if config.o_bias:
        shapes["o_bias"] = (config.hidden_size,)
    if config.qk_norm is not None and config.qk_norm.weighted:
        shapes |= _norm_shapes(config, config.qk_norm)
    if config.learned_sinks_size is not None:
        shapes["sinks"] = (config.num_attention_heads,)
    return shapes


def _norm_shapes(config: AttentionConfig, norm: QKNorm) -> dict[str, tuple[int, ...]]:
    per_head = norm.scope == "head"
    q_shape = (config.head_dim if per_head else config.q_size,)
    k_shape = (config.head_dim if per_head else config.kv_size,)
    shapes: dict[str, tuple[int, ...]] = {"q_norm": q_shape, "k_norm": k_shape}
    if norm.kind == "layer":
        shapes |= {"q_norm_bias": q_shape, "k_norm_bias": k_shape}
    return shapes


def make_weights(config: AttentionConfig, **arrays: Any) -> AttentionWeights:
    """Check a layer's arrays against its configuration and widen them to float64.

    Args:
        config: the layer.
        **arrays: one array per name of `weight_shapes(config)`, no more and no fewer.

    Raises:
        ConfigError: an array is missing, or the configuration has no use for one.
        ShapeError: an array has the wrong shape or dtype.
    """
    shapes = weight_shapes(config)
    missing = sorted(shapes.keys() - arrays.keys())
    unused = sorted(arrays.keys() - shapes.keys())
    if missing or unused:
        raise ConfigError(
            "weights must be exactly those of weight_shapes(config); "
            f"missing: {', '.join(missing) or 'none'}; not used: {', '.join(unused) or 'none'}"
        )
    return AttentionWeights(
        **{
            name: as_float64(name, arrays[name], shape, "(out, in)")
            for name, shape in shapes.items()
        }
    )


def fuse_qkv(weights: AttentionWeights) -> tuple[Array, Array | None]:
    """Return the fused projection and bias: rows of q, then k, then v.

    Returns:
        `((num_attention_heads + 2 num_key_value_heads) * head_dim, input_size)` and the bias of
        as many rows, None without bias.
    """
    matrix = np.concatenate([weights.q_proj, weights.k_proj, weights.v_proj])
    if weights.q_bias is None or weights.k_bias is None or weights.v_bias is None:
        return matrix, None
    return matrix, np.concatenate([weights.q_bias, weights.k_bias, weights.v_bias])


def split_qkv(config: AttentionConfig, fused: Any) -> tuple[Array, Array, Array]:
    """Cut a fused projection `(rows, input_size)` or bias `(rows,)` into q, k and v.

    Raises:
        ShapeError: `fused` has not `(num_attention_heads + 2 num_key_value_heads) * head_dim` rows.
    """
    rows = config.q_size + 2 * config.kv_size
    array = np.asarray(fused)
    shape = (rows,) if array.ndim == 1 else (rows, config.input_size)
    array = as_float64("fused", array, shape, "rows of q, k, v")
    q, k, v = np.split(array, [config.q_size, config.q_size + config.kv_size])
    return q, k, v
