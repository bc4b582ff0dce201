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
    """

    length: int
    squares: Callable[[], Array]
    visible: Callable[[], Array] | None = None
    rest: Callable[[], Array] | None = None
    terms: Callable[[], Iterator[Array]] | None = None

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
    """Observer that keeps each stage's value and changes nothing.

    Attributes:
        only: stages to keep; empty keeps all.
        values: stage name to its value; a stage seen twice keeps the later one.
    """

    only: frozenset[str] = frozenset()
    values: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted(self.only - STAGES.keys() - CALL_STAGES.keys())
        if unknown:
            raise ValueError(
                f"only must name stages of golden.STAGES, got {', '.join(unknown)}; "
                f"known stages are {', '.join(STAGES)}"
            )

    def __call__(
        self, stage: str, value: Array, accumulation: Accumulation | None = None, /
    ) -> Array:
        if not self.only or stage in self.only:
            self.values[stage] = value.copy()
        return value
