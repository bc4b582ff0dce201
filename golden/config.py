"""What an attention layer is: head geometry, projections, norms, mask, softmax, RoPE.

A configuration is frozen, checked once when made, and holds only numbers and names, so it can be
printed, compared, hashed and written into a report as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from golden.checks import require, require_count, require_positive
from golden.rope_config import RopeConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class QKNorm:
    """Normalisation of queries and keys; values are never normalised.

    Attributes:
        kind: `rms` divides by the root mean square, `layer` also subtracts the mean.
        placement: before or after the rotary position embedding.
        scope: `head` normalises each head over `head_dim`; `projection` normalises the flat
            projection `(batch, seq_len, heads * head_dim)` before the split into heads.
        weighted: whether a learned weight (and, for `layer`, a learned bias) follows.
        eps: added to the mean square (or variance) under the root.
        weight_offset: added to the learned weight; Gemma stores `w - 1` and sets this to 1.
    """

    kind: Literal["rms", "layer"] = "rms"
    placement: Literal["pre_rope", "post_rope"] = "pre_rope"
    scope: Literal["head", "projection"] = "head"
    weighted: bool = True
    eps: float = 1e-6
    weight_offset: float = 0.0

    def __post_init__(self) -> None:
        require(self.kind in ("rms", "layer"), f"kind must be 'rms' or 'layer', got {self.kind!r}")
        require(
            self.placement in ("pre_rope", "post_rope"),
            f"placement must be 'pre_rope' or 'post_rope', got {self.placement!r}",
        )
        require(
            self.scope in ("head", "projection"),
            f"scope must be 'head' or 'projection', got {self.scope!r}",
        )
        require(0 <= self.eps < math.inf, f"eps must be non-negative, got {self.eps}")
        require(
            not (self.scope == "projection" and self.placement == "post_rope"),
            "scope 'projection' requires placement 'pre_rope', got 'post_rope'; "
            "RoPE acts on heads, after the flat projection is split",
        )
        require(
            self.weighted or self.weight_offset == 0.0,
            f"weight_offset requires weighted=True, got {self.weight_offset} without a weight",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TemperatureTuning:
    """Llama 4's growth of the query with its position on layers without RoPE.

    The query at position `p` is multiplied by `1 + attn_scale * log(1 + floor((p+1)/floor_scale))`.

    Attributes:
        floor_scale: positions per step; the factor is 1 before the first step.
        attn_scale: weight of the logarithm.
    """

    floor_scale: float = 8192.0
    attn_scale: float = 0.1

    def __post_init__(self) -> None:
        require_positive("floor_scale", self.floor_scale)
        require(math.isfinite(self.attn_scale), f"attn_scale must be finite, got {self.attn_scale}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """One attention layer.

    Attributes:
        hidden_size: width of the layer's input and output.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads; divides `num_attention_heads`.
        head_dim: width of a head; 0 means `hidden_size // num_attention_heads`.
        qkv_bias: whether the query, key and value projections add a bias.
        o_bias: whether the output projection adds a bias.
        fused_qkv: whether the three projections are stored as one matrix, rows q then k then v.
        clip_qkv: bound `c` of the clamp of q, k, v to `[-c, c]` after the bias; None is no clamp.
        qk_norm: normalisation of queries and keys, None for none.
        rope: rotary position embedding, None for none (NoPE).
        softmax_scale: factor on q·k; 0 means `head_dim ** -0.5`. Resolved when made, as is
            `head_dim`: `dataclasses.replace` of either keeps the other as it was.
        softcap: `c` in `c * tanh(score / c)`, applied after the scale and before the mask.
        sliding_window: keys a query may see, its own included; None is unbounded.
        attention_chunk_size: positions `i`, `j` meet only if `i // size == j // size`.
        learned_sinks_size: 1 for one learned sink logit per query head, None for none.
        temperature_tuning: growth of the query with its position, None for none.

    Raises:
        ConfigError: a field, or a combination of fields, that no layer can have.
    """

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 0
    qkv_bias: bool = False
    o_bias: bool = False
    fused_qkv: bool = False
    clip_qkv: float | None = None
    qk_norm: QKNorm | None = None
    rope: RopeConfig | None = None
    softmax_scale: float = 0.0
    softcap: float | None = None
    sliding_window: int | None = None
    attention_chunk_size: int | None = None
    learned_sinks_size: int | None = None
    temperature_tuning: TemperatureTuning | None = None

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"):
            require_count(name, getattr(self, name))
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_attention_heads must be a multiple of num_key_value_heads, got "
            f"{self.num_attention_heads} and {self.num_key_value_heads}",
        )
        if self.head_dim == 0:
            require(
                self.hidden_size % self.num_attention_heads == 0,
                "hidden_size must be a multiple of num_attention_heads when head_dim is not given, "
                f"got {self.hidden_size} and {self.num_attention_heads}; give head_dim",
            )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        require_count("head_dim", self.head_dim)
        if self.softmax_scale == 0.0:
            object.__setattr__(self, "softmax_scale", float(self.head_dim) ** -0.5)
        require(
            0 < self.softmax_scale < math.inf,
            f"softmax_scale must be a positive factor on q·k, got {self.softmax_scale}",
        )
        for name in ("clip_qkv", "softcap"):
            if getattr(self, name) is not None:
                require_positive(name, getattr(self, name), "; use None to switch it off")
        for name in ("sliding_window", "attention_chunk_size"):
            if getattr(self, name) is not None:
                require_count(name, getattr(self, name), "; use None to switch it off")
        require(
            self.learned_sinks_size in (None, 1),
            "learned_sinks_size must be 1 (one sink logit per query head) or None, got "
            f"{self.learned_sinks_size}",
        )
        require(
            self.sliding_window is None or self.attention_chunk_size is None,
            "sliding_window and attention_chunk_size exclude each other, got "
            f"{self.sliding_window} and {self.attention_chunk_size}",
        )
        if self.rope is not None:
            require(
                self.rope.rotary_dim <= self.head_dim,
                f"rope.rotary_dim must be at most head_dim, got {self.rope.rotary_dim} "
                f"and {self.head_dim}",
            )
            require(
                self.rope.rotary_dim > 0 or self.head_dim % 2 == 0,
                f"head_dim must be even to rotate all of it, got {self.head_dim}",
            )
            section = self.rope.mrope_section
            require(
                not section or sum(section) == self.rotary_dim // 2,
                f"rope.mrope_section must sum to the {self.rotary_dim // 2} channel pairs that "
                f"rotate, got {section}",
            )

    @property
    def input_size(self) -> int:
        """Width of the hidden states that the query, key and value projections read."""
        return self.hidden_size

    @property
    def rotary_dim(self) -> int:
        """Leading channels of a head that RoPE rotates; 0 without RoPE."""
        if self.rope is None:
            return 0
        return self.rope.rotary_dim or self.head_dim

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def q_size(self) -> int:
        """Rows of the query projection: `num_attention_heads * head_dim`."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key (and of the value) projection: `num_key_value_heads * head_dim`."""
        return self.num_key_value_heads * self.head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class Eagle3AttentionConfig(AttentionConfig):
    """The attention of an EAGLE-3 draft model: reads twice the width that it writes.

    Its input is the token's embedding next to the target model's hidden states,
    `(batch, q_len, 2 * hidden_size)`; the output projection returns `hidden_size`.

    Source: Li et al. (2025), EAGLE-3, arXiv 2503.01840, section 3.1.
    """

    @property
    def input_size(self) -> int:
        """Width of embedding and target hidden states side by side."""
        return 2 * self.hidden_size
