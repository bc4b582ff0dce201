"""What one attention layer is: the numeric arguments of the module, completed and checked once."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from impl.config import check_chunked_layer, check_head_counts
from impl.errors import ConfigError, explain
from impl.neuron_config import NeuronConfig
from impl.norms import QKNormPlacement, QKNormScope, check_eps

logger = logging.getLogger("impl.layer_options")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerOptions:
    """Options of a layer; `NeuronAttentionBase` says what they mean.

    Attributes:
        hidden_size: width of the residual stream.
        num_attention_heads: query heads.
        num_key_value_heads: KV heads, which divide them.
        head_dim: width of a head; None becomes `hidden_size // num_attention_heads`.
        softmax_scale: divisor of the scores; None becomes `sqrt(head_dim)`.
        attn_logit_softcapping: cap of the scores, or None.
        sliding_window: keys a query may see, its own included, or None.
        attention_chunk_size: size of a chunk, or None; limits by position whatever its size.
        learned_sinks_size: sinks per query head, or None.
        use_qk_norm: weightless norm of q and k.
        rms_norm_eps: its epsilon.
        qk_norm_placement: where it is.
        qk_layernorm_scope: what the weighted norms of q and k run over.
        qk_layernorm_placement: where they are.
        post_transpose_layernorm: they see BHSD instead of BSHD.
        attn_temperature_tuning: scale queries by position.
        floor_scale: positions that share a temperature.
        attn_scale: weight of the temperature's logarithm.

    Raises:
        ConfigError: a value or a combination that is not defined.
    """

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None = None
    softmax_scale: float | None = None
    attn_logit_softcapping: float | None = None
    sliding_window: int | None = None
    attention_chunk_size: int | None = None
    learned_sinks_size: int | None = None
    use_qk_norm: bool = False
    rms_norm_eps: float | None = None
    qk_norm_placement: QKNormPlacement = QKNormPlacement.PRE_ROPE
    qk_layernorm_scope: QKNormScope = QKNormScope.HEAD
    qk_layernorm_placement: QKNormPlacement = QKNormPlacement.PRE_ROPE
    post_transpose_layernorm: bool = False
    attn_temperature_tuning: bool = False
    floor_scale: float = 8192
    attn_scale: float = 0.1

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(explain(name, "be an integer >= 1", getattr(self, name)))
        check_head_counts(self.num_attention_heads, self.num_key_value_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.width < 1:
            raise ConfigError(explain("head_dim", "be an integer >= 1", self.head_dim))
        if self.softmax_scale is None:
            object.__setattr__(self, "softmax_scale", math.sqrt(self.width))
        for name in (
            "softmax_scale",
            "attn_logit_softcapping",
            "sliding_window",
            "attention_chunk_size",
            "floor_scale",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(explain(name, "be positive or None", value))
        if self.sliding_window is not None and self.attention_chunk_size is not None:
            raise ConfigError(
                explain(
                    "sliding_window",
                    "be None when attention_chunk_size is set",
                    f"{self.sliding_window} and {self.attention_chunk_size}",
                    "a layer is windowed or chunked",
                )
            )
        if self.use_qk_norm:
            check_eps(self.rms_norm_eps, "rms_norm_eps")
        flat = self.qk_layernorm_scope is QKNormScope.PROJECTION
        if flat and self.qk_layernorm_placement is QKNormPlacement.POST_ROPE:
            raise ConfigError(
                explain(
                    "qk_layernorm_placement",
                    "be PRE_ROPE when qk_layernorm_scope is PROJECTION",
                    "POST_ROPE",
                    "the flat projection is gone once heads are split and rotated",
                )
            )

    @property
    def width(self) -> int:
        """`head_dim`, as an integer."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def divisor(self) -> float:
        """`softmax_scale`, as a number."""
        assert self.softmax_scale is not None
        return self.softmax_scale

    def check_against(self, run: NeuronConfig) -> None:
        """Refuse what the way the model is run rules out.

        Raises:
            ConfigError: a combination that is not defined.
        """
        early = self.use_qk_norm and self.qk_norm_placement is QKNormPlacement.PRE_ROPE
        if run.qkv_cte_nki_kernel_fuse_rope and early:
            raise ConfigError(
                explain(
                    "qkv_cte_nki_kernel_fuse_rope",
                    "be False when use_qk_norm is placed PRE_ROPE",
                    True,
                    "the kernel rotates before the norm could run",
                )
            )
        if self.attention_chunk_size is None:
            return
        check_chunked_layer(run, self.attention_chunk_size)
        if self.learned_sinks_size is not None and self.attention_chunk_size < run.seq_len:
            raise ConfigError(
                explain(
                    "learned_sinks_size",
                    f"be None when attention_chunk_size is {self.attention_chunk_size}",
                    self.learned_sinks_size,
                    "learned sinks are not supported for chunked attention",
                )
            )

    def routed_chunk_size(self, run: NeuronConfig) -> int | None:
        """`attention_chunk_size`, or None if no sequence reaches a second chunk."""
        chunk = self.attention_chunk_size
        if chunk is not None and chunk >= run.seq_len:
            logger.warning(
                "attention_chunk_size %d is not below seq_len %d: the layer is a full one",
                chunk,
                run.seq_len,
            )
            return None
        return chunk
