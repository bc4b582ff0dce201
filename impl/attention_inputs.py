"""From hidden states to the queries, keys and values that attention reads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from impl.attention_rotary import AttentionRotary, Rotary
from impl.config import InferenceConfig
from impl.errors import ConfigError, explain
from impl.gqa import GroupQueryAttention_QKV
from impl.layer_options import LayerOptions
from impl.lora import LayerLora
from impl.norms import L2Norm, QKNormPlacement, QKNormScope, check_eps
from impl.parallel.layer import LayerParallel, PhaseHeads

Norm = Callable[[Tensor], Tensor]


class AttentionInputs(AttentionRotary):
    """Projection, norms and rotation of a layer: the part of it before attention.

    Args:
        config: the model's configuration.
        options: the layer's numeric options.
        rotary_emb: `(x, position_ids) -> cos, sin` for the half pairing, or None.
        rope_theta: base of the interleaved pairing, or None.
        use_scaled_rope: scale that pairing as `config.rope_parameters` says; which channels turn
            (`partial_rotary_factor`, `mrope_section`) it says with or without.
        q_layernorm: weighted norm of q; both or neither.
        k_layernorm: weighted norm of k.
        clip_qkv: clamp q, k and v to `[-clip_qkv, clip_qkv]`.
        qkv_bias: bias of q, k and v.
        parallel: this rank's share of the layer.

    Raises:
        ConfigError: a value or a combination that is not defined.
    """

    def __init__(
        self,
        config: InferenceConfig,
        options: LayerOptions,
        *,
        rotary_emb: Rotary | None,
        rope_theta: float | None,
        use_scaled_rope: bool,
        q_layernorm: Norm | None,
        k_layernorm: Norm | None,
        clip_qkv: float | None,
        qkv_bias: bool,
        parallel: LayerParallel,
    ) -> None:
        options.check_against(config.neuron_config)
        super().__init__(
            config,
            options,
            rotary_emb=rotary_emb,
            rope_theta=rope_theta,
            use_scaled_rope=use_scaled_rope,
        )
        self.hidden_size = options.hidden_size
        run = config.neuron_config
        # An EAGLE-3 draft reads the token's embedding beside the target's hidden states.
        self.input_size = options.hidden_size * (2 if run.is_eagle3 and run.is_eagle_draft else 1)
        # Under sequence parallelism the caller's norm runs before the gather.
        self.fuses_input = run.qkv_kernel_enabled and not parallel.prefill.sequence_parallel
        self.num_heads = self.num_attention_heads = options.num_attention_heads
        self.num_key_value_heads = options.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.qkv_bias = qkv_bias
        self._init_norms(q_layernorm, k_layernorm)
        self.lora = self._make_lora(parallel)
        self.parallel = parallel
        self.clip_qkv = clip_qkv
        if parallel.shares_weights:
            self.qkv_proj = self._make_projection(parallel.prefill_heads)
        else:
            self.cte_qkv_proj = self._make_projection(parallel.prefill_heads)
            self.tkg_qkv_proj = self._make_projection(parallel.decode_heads)

    def _make_projection(self, heads: PhaseHeads) -> GroupQueryAttention_QKV:
        return GroupQueryAttention_QKV(
            self.input_size,
            self.head_dim,
            len(heads.query),
            len(heads.key_value),
            dtype=self.torch_dtype,
            bias=self.qkv_bias,
            fused_qkv=self.neuron_config.fused_qkv,
            clip_qkv=self.clip_qkv,
        )

    def _make_lora(self, parallel: LayerParallel) -> LayerLora | None:
        config = self.neuron_config.lora_config
        if config is None:
            return None
        return LayerLora(
            config,
            self.options,
            input_size=self.input_size,
            prefill=parallel.prefill_heads.held,
            decode=None if parallel.shares_weights else parallel.decode_heads.held,
            dtype=self.torch_dtype,
        )

    def get_qkv_proj(self, is_prefill_stage: bool) -> GroupQueryAttention_QKV:
        """Projection of a phase: one for both, or `cte_qkv_proj` and `tkg_qkv_proj`."""
        if self.parallel.shares_weights:
            return self.qkv_proj
        return self.cte_qkv_proj if is_prefill_stage else self.tkg_qkv_proj

    def _init_norms(self, q_layernorm: Norm | None, k_layernorm: Norm | None) -> None:
        if (q_layernorm is None) != (k_layernorm is None):
            alone = "k_layernorm" if q_layernorm is None else "q_layernorm"
            raise ConfigError(
                explain("q_layernorm and k_layernorm", "be given together", f"{alone} alone")
            )
        if q_layernorm is None and self.neuron_config.qk_layernorm:
            q_layernorm, k_layernorm = (
                nn.LayerNorm(self.head_dim, dtype=self.torch_dtype) for _ in range(2)
            )
        self.q_layernorm, self.k_layernorm = q_layernorm, k_layernorm
        options = self.options
        self.qk_norm: L2Norm | None = None
        if options.use_qk_norm:
            self.qk_norm = L2Norm(check_eps(options.rms_norm_eps, "rms_norm_eps"))

    def prep_qkv_tensors(
        self,
        hidden_states: Tensor,
        position_ids: Tensor,
        *,
        cos_cache: Tensor | None = None,
        sin_cache: Tensor | None = None,
        rmsnorm: Norm | None = None,
        rotary_position_ids: Tensor | None = None,
        use_polar_compatible_rope: bool = False,
        is_prefill_stage: bool = True,
        adapter_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Project, norm and rotate.

        Args:
            hidden_states: `(batch, seq_len, hidden_size)`, in the layer's dtype.
            position_ids: `(batch, seq_len)`.
            cos_cache: as in `forward`, like the rest.
            sin_cache: see `forward`.
            rmsnorm: see `forward`.
            rotary_position_ids: see `forward`.
            use_polar_compatible_rope: see `forward`.
            is_prefill_stage: the phase, which says which heads this rank holds.
            adapter_ids: see `forward`.

        Returns:
            q `(batch, num_attention_heads, seq_len, head_dim)`, k and v
            `(batch, num_key_value_heads, seq_len, head_dim)`, BHSD, in the layer's dtype, of this
            rank's heads; and the cos and sin caches.
        """
        if rmsnorm is not None and self.fuses_input:
            hidden_states = rmsnorm(hidden_states).to(self.torch_dtype)
        adapt = None
        if self.lora is not None:
            adapt = partial(
                self.lora.add, hidden_states, adapter_ids, is_prefill_stage=is_prefill_stage
            )
        q, k, v = self.get_qkv_proj(is_prefill_stage)(hidden_states, adapt)
        options = self.options
        scope, weighted = options.qk_layernorm_scope, options.qk_layernorm_placement
        if options.qk_norm_placement is QKNormPlacement.PRE_ROPE:
            q, k = self._flat_normed(q, k, self.qk_norm, self.qk_norm, is_prefill_stage)
        if scope is QKNormScope.PROJECTION:
            q, k = self._flat_normed(q, k, self.q_layernorm, self.k_layernorm, is_prefill_stage)
        q, k, v = (flat.unflatten(-1, (-1, self.head_dim)) for flat in (q, k, v))
        norm_here = scope is QKNormScope.HEAD and weighted is QKNormPlacement.PRE_ROPE
        if norm_here and not options.post_transpose_layernorm:
            q, k = self._normed(q, k, self.q_layernorm, self.k_layernorm)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if norm_here and options.post_transpose_layernorm:
            q, k = self._normed(q, k, self.q_layernorm, self.k_layernorm)
        q, k, cos_cache, sin_cache = self.apply_rotary_embedding(
            q,
            k,
            position_ids,
            cos_cache,
            sin_cache,
            use_polar_compatible_rope,
            rotary_position_ids,
        )
        if weighted is QKNormPlacement.POST_ROPE:
            q, k = self._normed(q, k, self.q_layernorm, self.k_layernorm)
        if options.qk_norm_placement is QKNormPlacement.POST_ROPE:
            q, k = self._normed(q, k, self.qk_norm, self.qk_norm)
        return q, k, v, cos_cache, sin_cache

    def _normed(
        self, q: Tensor, k: Tensor, q_norm: Norm | None, k_norm: Norm | None
    ) -> tuple[Tensor, Tensor]:
        """Apply a pair of norms, if the layer has it, and round to the layer's dtype."""
        if q_norm is None or k_norm is None:
            return q, k
        return q_norm(q).to(self.torch_dtype), k_norm(k).to(self.torch_dtype)

    def _flat_normed(
        self, q: Tensor, k: Tensor, q_norm: Norm | None, k_norm: Norm | None, is_prefill: bool
    ) -> tuple[Tensor, Tensor]:
        """Apply a pair of norms over the heads of all ranks, each head counted once."""
        if q_norm is None or k_norm is None:
            return q, k
        heads = self.parallel.prefill_heads if is_prefill else self.parallel.decode_heads
        width = self.head_dim
        q, k = heads.gather_query(q, width), heads.gather_key(k, width)
        q, k = self._normed(q, k, q_norm, k_norm)
        return heads.own_query(q, width), heads.own_key(k, width)
