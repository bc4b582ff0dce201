"""The named stages of an attention layer, and the observers that each stage passes through.

An observer is called as `observe(stage, value, accumulation)` and returns the value that the
layer goes on with. That one seam captures intermediates, rounds them to a format, perturbs them
to predict an error, or rewrites them to imitate a known bug, without a second copy of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]

STAGES: dict[str, str] = {
    "q_product": "query projection before its bias, (batch, q_len, num_attention_heads * head_dim)",
    "q_proj": "query projection with its bias",
    "k_product": "key projection before its bias, (batch, q_len, num_key_value_heads * head_dim)",
    "k_proj": "key projection with its bias",
    "v_product": "value projection before its bias, (batch, q_len, num_key_value_heads * head_dim)",
    "v_proj": "value projection with its bias",
    "q_clip": "queries clamped to [-clip_qkv, clip_qkv]",
    "k_clip": "keys clamped to [-clip_qkv, clip_qkv]",
    "v_clip": "values clamped to [-clip_qkv, clip_qkv]",
    "q_norm_scale": "reciprocal root of the queries' mean square (or variance) plus eps",
    "q_norm_unit": "queries (centred by a layer norm) times that scale, before the learned weight",
    "q_norm": "normalised queries",
    "k_norm_scale": "reciprocal root of the keys' mean square (or variance) plus eps",
    "k_norm_unit": "keys (centred by a layer norm) times that scale, before the learned weight",
    "k_norm": "normalised keys",
    "rope_exponents": "2 i / rotary_dim, (rotary_dim / 2,)",
    "rope_powers": "theta to those exponents",
    "rope_frequencies": "reciprocals of those powers, radians per position",
    "rope_scaled_frequencies": "frequencies after the scaling for long contexts",
    "rope_angles": "position times frequency, (batch, q_len, rotary_dim / 2), radians",
    "rope_cos": "cosine of the angles times the attention factor",
    "rope_sin": "sine of the angles times the attention factor",
    "q_rope_cos": "queries times cosine, BHSD, rotated channels only",
    "q_rope_sin": "quarter-turned queries times sine, BHSD, rotated channels only",
    "q_rope": "rotated queries, BHSD",
    "k_rope_cos": "keys times cosine, BHSD, rotated channels only",
    "k_rope_sin": "quarter-turned keys times sine, BHSD, rotated channels only",
    "k_rope": "rotated keys, BHSD",
    "q_temperature": "queries after temperature tuning, BHSD",
    "k_cache": "keys as the cache stores them, BHSD",
    "v_cache": "values as the cache stores them, BHSD",
    "qk": "dot products of queries and keys, (batch, num_attention_heads, q_len, kv_len)",
    "scores": "dot products times softmax_scale",
    "softcap_ratio": "scores divided by the soft cap",
    "softcap_tanh": "tanh of that ratio",
    "softcap": "scores after the soft cap",
    "shifted_scores": "scores minus the row's largest visible score or sink",
    "exp": "exp(score - row maximum), zero where masked",
    "denominator": "sum of exp over the row, sink included, (batch, num_attention_heads, q_len, 1)",
    "unnormalised_weights": "exp(score - row maximum) as the product with the values reads it",
    "weights": "softmax weights as the product with the values reads them",
    "attn": "weights times values, BHSD",
    "o_product": "output projection before its bias, (batch, q_len, hidden_size)",
    "o_proj": "output projection with its bias",
}
"""Every stage in order, with its meaning and shape; a norm placed after RoPE comes after it."""

CALL_STAGES: dict[str, str] = {
    "input_sum": "hidden states plus residual, (batch, q_len, hidden_size)",
    "input_norm_scale": "reciprocal root of that sum's mean square plus eps",
    "input_norm_unit": "the sum times that scale, before the learned weight",
    "input_norm": "normalised hidden states, what the projections read",
    **{
        f"{name}_{stage}": meaning
        for name in "qkvo"
        for stage, meaning in (
            ("base", f"{name} projection without its adapters, before its bias"),
            ("lora_down", f"{name} adapter's inner values, (batch, q_len, rank)"),
            ("lora_up", f"{name} adapter's low-rank product"),
            ("lora", f"{name} adapter's term, scaled"),
        )
    },
}
"""Stages of what a call brings to a layer, its norm and its adapters; unobserved without them."""

GRADIENT_STAGES: dict[str, str] = {
    "grad_o_proj": "gradient of the output projection, (hidden_size, width of its input)",
    "grad_o_bias": "gradient of its bias",
    "d_attn": "cotangent of the heads' outputs, (batch, q_len, num_attention_heads * head_dim)",
    "logsumexp": "each row's log-sum-exp in base 2, for weights that are computed again",
    "weights_again": "softmax weights as their product with d_attn reads them",
    "d_v_heads": "each query head's part of the values' gradient; unobserved without groups",
    "d_v": "gradient of the values that attention read, BHSD",
    "d_weights": "products of d_attn and values, (batch, num_attention_heads, q_len, kv_len)",
    "delta": "sum of weights times d_weights over the row, (batch, num_attention_heads, q_len)",
    "delta_weights": "weights behind the output that delta is taken from, if it is d_attn . attn",
    "delta_output": "that output, BHSD",
    "delta_sum": "that output times d_attn, summed, in base 2, (batch, num_attention_heads, q_len)",
    "d_shifted_scores": "d_weights minus delta (plus the log-sum-exp's cotangent)",
    "d_softcap": "cotangent of the capped scores",
    "d_softcap_tanh": "cotangent of the cap's tanh",
    "d_softcap_ratio": "cotangent of the scores over the cap",
    "d_scores": "cotangent of the scaled dot products",
    "d_qk": "cotangent of the dot products",
    "d_q": "gradient of the queries that attention read, BHSD",
    "d_k_heads": "each query head's part of the keys' gradient; unobserved without groups",
    "d_k": "gradient of the keys that attention read, BHSD",
    "grad_sinks": "gradient of the sinks, (num_attention_heads,)",
    "d_k_cache": "cotangent of the keys in the cache, its own cotangent included",
    "d_v_cache": "cotangent of the values in the cache, its own cotangent included",
    "d_q_temperature": "cotangent of the queries before temperature tuning, BHSD",
    **{
        stage.replace("*", name): meaning
        for name in "qk"
        for stage, meaning in (
            ("d_*_rope_cos", "cotangent of the rotated heads times cosine, BHSD"),
            ("d_*_rope_sin", "that cotangent turned a quarter back, times sine, BHSD"),
            ("d_*_rope", "cotangent of the heads before their rotation, BHSD"),
            ("d_*_norm_unit", "cotangent of the norm's result, times its learned weight"),
            ("d_*_norm_terms", "that cotangent times the unit, the terms of the weight's gradient"),
            ("d_*_norm_mean", "mean of d_*_norm_unit times the unit, over the normed channels"),
            ("d_*_norm", "cotangent of what the norm reads"),
            ("grad_*_norm", "gradient of the norm's weight"),
            ("grad_*_norm_bias", "gradient of the norm's bias"),
        )
    },
    **{
        stage.replace("*", name): meaning
        for name in "qkv"
        for stage, meaning in (
            ("grad_*_bias", "gradient of the projection's bias"),
            ("grad_*_proj", "gradient of the projection, (width of its output, hidden_size)"),
            ("d_*_hidden", "the projection's part of d_hidden_states; unobserved if fused"),
        )
    },
    "d_hidden_sum": "values' and keys' parts of d_hidden_states together; unobserved if fused",
    "d_hidden_states": "gradient of the hidden states, (batch, q_len, hidden_size)",
}
"""Stages of a vector-Jacobian product, in which the forward pass is observed too."""


@dataclass(frozen=True, slots=True)
class Accumulation:
    """How a stage's value was summed, for observers that model the rounding of the sum.

    Attributes:
        length: number of terms in each sum, masked ones included.
        squares: computes the sum of the squared terms, broadcastable to the value; called only by
            observers that need it, since it costs as much as the stage itself.
        visible: computes the number of terms in each sum where masked ones and zeros are none,
            broadcastable to the value; None is `length` everywhere.
        rest: computes how large the sum is likely to be without its largest term: the terms' sum
            where all are positive, else the root of their sum of squares; None is unknown.
        terms: yields the terms of all sums in order, each shaped like the value, masked ones as
            zeros: as many as `length`, and those that a stage adds besides; None is unknown.
        shares: computes the share that each term has in the squares of all sums together,
            `(length,)`, where all sums run over the same axis; None is unknown.
    """

    length: int
    squares: Callable[[], Array]
    visible: Callable[[], Array] | None = None
    rest: Callable[[], Array] | None = None
    terms: Callable[[], Iterator[Array]] | None = None
    shares: Callable[[], Array] | None = None

    def count(self) -> Array:
        """Return how many terms each sum adds, broadcastable to the value."""
        return np.array(float(self.length)) if self.visible is None else self.visible()


class Observer(Protocol):
    """Sees each stage's value and returns the value to go on with, of the same shape."""

    def __call__(
        self, stage: str, value: Array, accumulation: Accumulation | None = None, /
    ) -> Array: ...


def unobserved(stage: str, value: Array, accumulation: Accumulation | None = None, /) -> Array:
    """Return the value as it is: the exact model."""
    return value


@dataclass(slots=True)
class Capture:
    """Observer that keeps each stage's value and changes nothing by itself.

    Attributes:
        only: stages to keep; empty keeps all.
        values: stage name to its value; a stage seen twice keeps the later one.
        through: another observer that each value passes first; what it returns is kept.
    """

    only: frozenset[str] = frozenset()
    values: dict[str, Array] = field(default_factory=dict)
    through: Observer = unobserved

    def __post_init__(self) -> None:
        known = STAGES.keys() | CALL_STAGES.keys() | GRADIENT_STAGES.keys()
        unknown = sorted(self.only - known)
        if unknown:
            raise ValueError(
                "only must name stages of golden.STAGES, CALL_STAGES or GRADIENT_STAGES, got "
                f"{', '.join(unknown)}; known stages are "
                f"{', '.join((*STAGES, *CALL_STAGES, *GRADIENT_STAGES))}"
            )

    def __call__(
        self, stage: str, value: Array, accumulation: Accumulation | None = None, /
    ) -> Array:
        value = self.through(stage, value, accumulation)
        if not self.only or stage in self.only:
            self.values[stage] = value.copy()
        return value
