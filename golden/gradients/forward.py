"""The forward pass that a backward pass reads: the layer itself, with its stages captured."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from golden.arrays import Positions, as_float64, as_positions
from golden.cache import ContiguousCache
from golden.config import AttentionConfig
from golden.errors import ConfigError
from golden.gradients.steps import bias_vjp, projection_vjp
from golden.layer import context_encoding, merge_heads, split_heads, token_generation
from golden.stages import Array, Capture, Observer
from golden.weights import AttentionWeights

_DIFFERENTIATED = frozenset(
    {
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "qkv_bias",
        "o_bias",
        "fused_qkv",
        "clip_qkv",
        "qk_norm",
        "rope",
        "softmax_scale",
        "softcap",
        "sliding_window",
        "attention_chunk_size",
        "learned_sinks_size",
        "temperature_tuning",
    }
)


def check_differentiable(config: AttentionConfig) -> None:
    """Refuse a layer with a feature whose gradient is not defined here.

    Raises:
        ConfigError: a field outside those differentiated is not at its default.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in _DIFFERENTIATED and value != field.default:
            raise ConfigError(
                f"{field.name} must be {field.default!r} for gradients, got {value!r}; "
                "the layer's vector-Jacobian product does not cover it"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """One forward pass of a layer, as its backward pass reads it.

    Attributes:
        config: the layer.
        weights: its arrays.
        hidden_states: `(batch, q_len, hidden_size)`, float64, zero where the token is padding.
        positions: `(batch, q_len)`, int64.
        stages: the captured stages of the pass (`golden.STAGES`).
    """

    config: AttentionConfig
    weights: AttentionWeights
    hidden_states: Array
    positions: Positions
    stages: dict[str, Array]

    def queries(self) -> Array:
        """Return the queries that attention read, BHSD: the last query stage there is.

        The layer's order is projection, clip, norm, RoPE, norm, temperature; queries are split
        into heads after a norm of the flat projection and before one of the heads.
        """
        norm = self.config.qk_norm
        last = "q_proj"
        if self.config.clip_qkv is not None:
            last = "q_clip"
        if norm is not None and norm.placement == "pre_rope":
            last = "q_norm"
        if self.config.rope is not None:
            last = "q_rope"
        if norm is not None and norm.placement == "post_rope":
            last = "q_norm"
        if self.config.temperature_tuning is not None:
            last = "q_temperature"
        queries = self.stages[last]
        if queries.ndim == 4:
            return queries
        return split_heads(queries, self.config.num_attention_heads)


def run_forward(
    config: AttentionConfig,
    weights: AttentionWeights,
    hidden_states: Any,
    d_output: Any,
    position_ids: tuple[Any, Any],
    cache: ContiguousCache | None,
    *,
    decode: bool,
    observe: Observer,
) -> tuple[Pass, ContiguousCache, Array, dict[str, Array]]:
    """Run the layer, then go back through its output projection.

    Args:
        config: the layer.
        weights: its arrays.
        hidden_states: `(batch, q_len, input_size)`.
        d_output: `(batch, q_len, hidden_size)`.
        position_ids: of the layer, and for RoPE alone.
        cache: None makes one just long enough.
        decode: whether this is token generation.
        observe: sees and may change each stage.

    Returns:
        The pass, the cache after it, the cotangent of attention's output in BHSD, and the
        gradients of the output projection and its bias.
    """
    check_differentiable(config)
    shape = (None, None, config.input_size)
    hidden = as_float64("hidden_states", hidden_states, shape, "(batch, q_len, hidden_size)")
    batch, q_len = hidden.shape[:2]
    positions = as_positions("position_ids", position_ids[0], (batch, q_len))
    given: dict[str, Any] = {"position_ids": positions, "rotary_position_ids": position_ids[1]}
    hidden = np.where((positions >= 0)[..., None], hidden, 0.0)  # padding may hold anything
    seen = Capture(through=observe)
    if decode:
        if not isinstance(cache, ContiguousCache):
            raise ConfigError(
                f"cache must be a ContiguousCache for gradients, got {type(cache).__name__}"
            )
        result = token_generation(config, weights, hidden, cache=cache, observe=seen, **given)
    else:
        result = context_encoding(config, weights, hidden, cache=cache, observe=seen, **given)
    d_output = as_float64(
        "d_output", d_output, (batch, q_len, config.hidden_size), "(batch, q_len, hidden_size)"
    )
    attn = merge_heads(seen.values["attn"])
    d_attn, d_matrix = projection_vjp(attn, weights.o_proj, d_output)
    found = {"o_proj": observe("grad_o_proj", *d_matrix)}
    if config.o_bias:
        found["o_bias"] = observe("grad_o_bias", *bias_vjp(d_output))
    d_heads = split_heads(observe("d_attn", *d_attn), config.num_attention_heads)
    done = Pass(config, weights, hidden, positions, seen.values)
    return done, result.cache, d_heads, found
