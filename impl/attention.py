"""The attention module: from hidden states to hidden states, on one rank or on many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from impl import state_dict as checkpoints
from impl.attention_inputs import Norm
from impl.attention_layer import AttentionLayer
from impl.attention_rotary import Rotary
from impl.config import InferenceConfig
from impl.errors import ShapeError, explain
from impl.forward_arguments import (
    check_active_mask,
    check_hidden_states,
    check_residual,
    given_positions,
    read_cache,
    require_manager,
)
from impl.kv_cache import KeyValue, KVCacheManager
from impl.layer_options import LayerOptions
from impl.norms import QKNormPlacement, QKNormScope
from impl.output import NeuronAttentionBaseOutput
from impl.packing import check_rotary, packed_sequences, update_arguments
from impl.parallel.layer import LayerParallel
from impl.parallel.sharding_strategy import GQA
from impl.serving import (
    CACHE_KEYWORDS,
    ROW_KEYWORDS,
    check_cores,
    check_group,
    check_keywords,
    check_layer_config,
)
from impl.step import Phase, StepInputs, select_phase


class NeuronAttentionBase(AttentionLayer):
    """Grouped-query attention with everything NxD Inference's module can be configured to do.

    Order of operations: residual and RMS norm where the QKV kernel fuses them, q/k/v projection
    with bias, LoRA, clip, weightless norm of the flat q and k (PRE_ROPE), weighted norm of the flat
    q and k (scope PROJECTION), split into heads, weighted norm per head (PRE_ROPE), RoPE or
    temperature, weighted norm per head (POST_ROPE), weightless norm per head (POST_ROPE),
    attention, output projection with bias and LoRA. V is never normed or rotated, and the cache
    holds K after norms and RoPE. Every path casts the input to the layer's dtype and the output
    back. `impl.kernels.native` lists every rounding.

    Args:
        config: the model's configuration; its `neuron_config` says how the layer is run.
        hidden_size: width of the residual stream.
        num_attention_heads: query heads.
        num_key_value_heads: KV heads, which divide them.
        head_dim: width of a head; None is `hidden_size // num_attention_heads`.
        rotary_emb: `(x, position_ids) -> cos, sin` for the half pairing; None is no RoPE (NoPE).
        rope_theta: base of the interleaved pairing, for `use_polar_compatible_rope`.
        use_scaled_rope: scale that pairing as `config.rope_parameters` says; which channels turn
            (`partial_rotary_factor`, `mrope_section`) it says with or without.
        rms_norm_eps: epsilon of the weightless norm.
        use_qk_norm: weightless RMS norm of q and k.
        qk_norm_placement: where that is: PRE_ROPE over the flat projection, POST_ROPE over a head.
        q_layernorm: weighted norm of q; both or neither. Without them and with
            `neuron_config.qk_layernorm`, an `nn.LayerNorm(head_dim)` each.
        k_layernorm: the same for k.
        qk_layernorm_scope: what they run over: a head, or the flat projection (before RoPE).
        qk_layernorm_placement: before or after RoPE.
        post_transpose_layernorm: apply them after the heads moved in front; the same function.
        clip_qkv: clamp q, k and v to `[-clip_qkv, clip_qkv]`, after the bias.
        qkv_bias: bias of q, k and v.
        o_bias: bias of the output projection.
        softmax_scale: **divisor** of the scores; None is `sqrt(head_dim)`.
        attn_logit_softcapping: scores become `cap * tanh(scores / cap)`, before the mask.
        attn_temperature_tuning: scale queries by position in layers without RoPE.
        floor_scale: positions that share a temperature.
        attn_scale: weight of the temperature's logarithm.
        attention_chunk_size: positions meet only within one chunk. One that is not below
            `neuron_config.seq_len` reads as None, with a warning, and still limits by position.
        sliding_window: keys a query may see, its own included.
        learned_sinks_size: 1 for one sink logit per query head, None for none.
        is_post_global_attn_layer: the layer before this one is a full one.
        is_pre_global_attn_layer: the layer after this one is a full one. Where both hold, neither
            counts.
        optimize_interleave_attn: chunked layers in a row under context parallelism hand each other
            the tokens of each rank: only the first takes, and only the last returns, the sequence,
            the last with `residual` added.
        num_cores_per_group: ranks that keep one KV head's tokens together (flash decoding),
            `tp_degree / num_key_value_heads`; 1 is each its own. A rank's cache manager takes
            `core = rank % num_cores_per_group`.
        sequence_parallel_enabled: None is the configuration's.
        tensor_model_parallel_group: None, or the group of all ranks.
        o_proj_layer_name: name of the output projection in checkpoints.
        desired_sharding_strategy: how KV heads meet ranks; None is replication where it comes out
            even, see `impl.parallel.head_layout`.

    Raises:
        ConfigError: a value or a combination that is not defined.
        UnsupportedError: a configuration that this version does not serve.
    """

    def __init__(
        self,
        config: InferenceConfig,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int | None = None,
        *,
        rotary_emb: Rotary | None = None,
        rope_theta: float | None = None,
        use_scaled_rope: bool = False,
        rms_norm_eps: float | None = None,
        use_qk_norm: bool = False,
        qk_norm_placement: QKNormPlacement = QKNormPlacement.PRE_ROPE,
        q_layernorm: Norm | None = None,
        k_layernorm: Norm | None = None,
        qk_layernorm_scope: QKNormScope = QKNormScope.HEAD,
        qk_layernorm_placement: QKNormPlacement = QKNormPlacement.PRE_ROPE,
        post_transpose_layernorm: bool = False,
        clip_qkv: float | None = None,
        qkv_bias: bool = False,
        o_bias: bool = False,
        softmax_scale: float | None = None,
        attn_logit_softcapping: float | None = None,
        attn_temperature_tuning: bool = False,
        floor_scale: float = 8192,
        attn_scale: float = 0.1,
        attention_chunk_size: int | None = None,
        is_post_global_attn_layer: bool = False,
        is_pre_global_attn_layer: bool = False,
        optimize_interleave_attn: bool = False,
        sliding_window: int | None = None,
        learned_sinks_size: int | None = None,
        num_cores_per_group: int = 1,
        sequence_parallel_enabled: bool | None = None,
        tensor_model_parallel_group: Any = None,
        o_proj_layer_name: str = "o_proj",
        desired_sharding_strategy: GQA | None = None,
    ) -> None:
        run = config.neuron_config
        check_layer_config(run)
        check_group(tensor_model_parallel_group, run.tp_degree)
        options = LayerOptions(
            hidden_size=hidden_size,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            head_dim=head_dim,
            softmax_scale=softmax_scale,
            attn_logit_softcapping=attn_logit_softcapping,
            sliding_window=sliding_window,
            attention_chunk_size=attention_chunk_size,
            learned_sinks_size=learned_sinks_size,
            use_qk_norm=use_qk_norm,
            rms_norm_eps=rms_norm_eps,
            qk_norm_placement=qk_norm_placement,
            qk_layernorm_scope=qk_layernorm_scope,
            qk_layernorm_placement=qk_layernorm_placement,
            post_transpose_layernorm=post_transpose_layernorm,
            attn_temperature_tuning=attn_temperature_tuning,
            floor_scale=floor_scale,
            attn_scale=attn_scale,
        )
        check_cores(run, num_cores_per_group, options)
        chunk = options.routed_chunk_size(run)
        both = is_pre_global_attn_layer and is_post_global_attn_layer
        handed_on = optimize_interleave_attn and not both and chunk is not None
        handed_on = handed_on and run.cp_degree > 1
        super().__init__(
            config,
            options,
            o_bias=o_bias,
            o_proj_layer_name=o_proj_layer_name,
            rotary_emb=rotary_emb,
            rope_theta=rope_theta,
            use_scaled_rope=use_scaled_rope,
            q_layernorm=q_layernorm,
            k_layernorm=k_layernorm,
            clip_qkv=clip_qkv,
            qkv_bias=qkv_bias,
            parallel=LayerParallel(
                run,
                num_attention_heads,
                num_key_value_heads,
                strategy=desired_sharding_strategy,
                attention_chunk_size=chunk,
                sequence_parallel=sequence_parallel_enabled,
                stays_split_before=handed_on and not is_post_global_attn_layer,
                stays_split_after=handed_on and not is_pre_global_attn_layer,
                num_cores_per_group=num_cores_per_group,
            ),
        )
        self.attention_chunk_size = chunk
        self.is_pre_global_attn_layer = is_pre_global_attn_layer and not both
        self.is_post_global_attn_layer = is_post_global_attn_layer and not both
        self.optimize_interleave_attn = optimize_interleave_attn and not both
        self.register_load_state_dict_pre_hook(_adapt_state_dict)  # type: ignore[no-untyped-call]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_value: KeyValue | None = None,
        active_mask: Tensor | None = None,
        adapter_ids: Tensor | None = None,
        cos_cache: Tensor | None = None,
        sin_cache: Tensor | None = None,
        rmsnorm: Norm | None = None,
        rotary_position_ids: Tensor | None = None,
        kv_mgr: KVCacheManager | None = None,
        get_kv_per_layer: bool = False,
        update_kv_per_layer: bool = False,
        residual: Tensor | None = None,
        windowed_context_encoding_window_idx: int = -1,
        **kwargs: Any,
    ) -> NeuronAttentionBaseOutput:
        """Attend.

        Without cached keys the step is context encoding (CTE, prefill): the tokens attend among
        themselves. With them it is token generation (TKG, decode): they attend to the cache and
        to themselves, under one softmax. So it is in prefill where there are cached keys: of a
        prefix (`is_prefix_caching` and at least 128 tokens, `impl.step.PREFIX_LEN_MIN`) or of the
        windows before (`windowed_context_encoding_window_idx`). Decode differs from those in its
        sinks, in needing `active_mask` for several tokens, and in refusing several for chunks.

        On several ranks every rank is given the same arguments, whole sequences and whole batches,
        and returns the same output. A rank's own are its cache (its KV heads of decode and, under
        data parallelism, its rows of the batch), also where prefill reads it, its cos and sin
        caches (its tokens), and under sequence parallelism the hidden states of a prefill and their
        output: `seq_len / tp_degree` tokens, rank `r` holding piece
        `impl.parallel.StageMesh.positions[r]`. Under
        `strided_context_parallel_kernel_enabled` all arguments of a prefill, `scatter_index` too,
        and its output have their tokens in strided order (`impl.parallel.strided`); K and V come
        back in natural order.

        Args:
            hidden_states: `(batch, seq_len, hidden_size)`, any floating dtype; twice as wide for an
                EAGLE-3 draft (`is_eagle_draft` and `is_eagle3`).
            attention_mask: True = attend. Prefill: `(batch, seq_len)`, real tokens, or
                `(batch, 1, seq_len, seq_len)`; None is no mask at all in a full layer, and the
                limit by position in a windowed or chunked one. With cached keys: slots that hold
                a token, `(batch, cache_len)` or `(batch, 1, seq_len or 1, cache_len)`; None is
                every slot before the step. See `impl.masks`.
            position_ids: `(batch, seq_len)`, integer: position of each token, for RoPE, for
                windows, chunks and temperature, and for cache slots. Negative marks padding.
                None is `0, 1, ...` without cached keys, and an error with them. A prefill that is
                not computed by the native form needs them consecutive; see `impl.kernels.prefill`.
            past_key_value: cached K and V, `(batch, kv_heads, cache_len, head_dim)`, positions by
                slot as `kv_mgr` says for layer `idx`, or without it `cache_layout`; K has its last
                axes exchanged if `k_cache_transposed`.
            active_mask: `(batch, 1, seq_len, seq_len)`, which tokens of a step with cached keys see
                each other, besides what positions rule out. Decode needs it for more than one
                token and does not read it for one; in prefill None is by position.
            adapter_ids: `(batch,)`, integer, the LoRA adapter of each row, negative for none;
                None is no adapters. `lora_config` says which there can be, `lora.load_adapter`
                loads one.
            cos_cache: cosines of an earlier layer of the same kind; both caches or neither. They
                are used as they are, so layers of different RoPE must not share them.
            sin_cache: sines, likewise.
            rmsnorm: norm of the hidden states before the projection. It is applied here if the
                QKV kernel would (`qkv_kernel_enabled`, no sequence parallelism); otherwise the
                caller has applied it and it is not read.
            rotary_position_ids: positions for RoPE alone, in place of `position_ids`.
            kv_mgr: cache to read or write inside the layer.
            get_kv_per_layer: take `past_key_value` from `kv_mgr`, layer `idx`.
            update_kv_per_layer: return the whole updated cache of layer `idx` instead of the
                step's K and V: a new one, but in decode under
                `attn_block_tkg_nki_kernel_cache_update` the cache itself, written to in place.
            residual: like `hidden_states`. Where the QKV kernel would fuse the addition, as above,
                the layer reads `hidden_states + residual` and returns that sum as `residual`, the
                stream to which the output is to be added; otherwise it is returned unchanged.
            windowed_context_encoding_window_idx: which window of `windowed_context_encoding_size`
                tokens of the prompt this is, the ones before it cached; negative is the whole
                prompt. Cached keys are not read in window 0.
            **kwargs: `use_polar_compatible_rope` (interleaved RoPE with `rope_theta`, in place of
                `rotary_emb`); arguments for `kv_mgr`: `idx`, `seq_len`, `seq_ids`,
                `kvcache_buffer`, `scatter_index`, `is_for_context_encoding`,
                `active_block_table`; and for packed sequences (chunked prefill, `impl.packing`)
                `num_queries` and `computed_context_lens`, `(sequences,)` each: new and cached
                tokens of every sequence in the one row, `past_key_value` and `seq_ids` having a
                row each. Masks and positions follow from them. Data parallelism divides the
                sequences: each is cached, in blocks of its own pool, where its id says.

        Returns:
            Output, K and V of the step, cos and sin caches, residual.

        Raises:
            ShapeError: a tensor that does not fit.
            UnsupportedError: an argument that this version does not serve.
            AttentionError: an unknown keyword.
        """
        check_keywords(kwargs)
        check_hidden_states(hidden_states, self.input_size)
        check_residual(residual, hidden_states)
        if residual is not None and self.fuses_input:  # Before ranks take their rows or tokens.
            hidden_states = residual = hidden_states + residual
        if adapter_ids is not None and self.lora is None:
            raise ShapeError(
                explain("adapter_ids", "be None in a layer without lora_config", "adapter ids")
            )
        polar = bool(kwargs.pop("use_polar_compatible_rope", False))
        cache_arguments = {name: kwargs[name] for name in CACHE_KEYWORDS if name in kwargs}
        packing = packed_sequences(kwargs, hidden_states.shape[0], self.neuron_config)
        before = self.parallel.prefill
        # of the whole step, whatever this rank was given of it; decode is always given positions
        length = (
            before.sequence_length(hidden_states)
            if position_ids is None
            else position_ids.shape[-1]
        )
        phase, reads = select_phase(
            self.neuron_config,
            length,
            get_kv_per_layer or past_key_value is not None,
            windowed_context_encoding_window_idx,
            packed=packing is not None,
        )
        encodes = phase is Phase.CONTEXT_ENCODING
        if self.dp_degree > 1 and not encodes:
            rows = self.parallel.decode.own_rows
            hidden_states, attention_mask, position_ids, active_mask, adapter_ids, *own = rows(
                hidden_states,
                attention_mask,
                position_ids,
                active_mask,
                adapter_ids,
                *(cache_arguments.get(name) for name in ROW_KEYWORDS),
            )
            cache_arguments.update(zip(ROW_KEYWORDS, own, strict=True))
            if rotary_position_ids is not None:
                rotary_position_ids = self.parallel.decode.rows(
                    rotary_position_ids, rotary_position_ids.dim() - 2
                )
        elif self.dp_degree > 1 and cache_arguments.get("seq_ids") is None:
            # every rank encodes the whole batch and caches its rows of it
            batch = (hidden_states if packing is None else packing.num_queries).shape[0]
            cache_arguments["seq_ids"] = torch.arange(batch, device=hidden_states.device)
        seq_len = before.sequence_length(hidden_states) if encodes else hidden_states.shape[1]
        if packing is not None:
            check_rotary(self.rotary_emb, self.polar_rotary_emb)
            if position_ids is not None:
                position_ids = before.natural(position_ids, 1)
            position_ids = before.given(packing.given_positions(position_ids, seq_len), 1)
        if get_kv_per_layer and past_key_value is not None:
            raise ShapeError(
                explain("past_key_value", "be None when get_kv_per_layer is True", "a cache")
            )
        if get_kv_per_layer:
            lines = hidden_states.shape[0] if packing is None else None
            past_key_value = read_cache(kv_mgr, cache_arguments, self.k_cache_transposed, lines)
        if not reads:
            past_key_value = None
            if position_ids is None:
                position_ids = before.first_positions(hidden_states)
        check_active_mask(active_mask, has_past=reads)
        position_ids = given_positions(position_ids, hidden_states, seq_len)
        cache_layout = owners = None
        if kv_mgr is not None and "idx" in cache_arguments:
            cache_layout = kv_mgr.layout(cache_arguments["idx"])
            ids = cache_arguments.get("seq_ids")
            if encodes and ids is not None:
                sequences = hidden_states if packing is None else packing.num_queries
                owners = kv_mgr.owners(ids, sequences.shape[0])
                idle = owners[:, None] < 0
                if packing is not None:
                    idle = before.given(packing.of_tokens(idle[:, 0], seq_len)[None], 1)
                position_ids = position_ids.to(torch.int64).masked_fill(idle, -1)
            elif packing is None:
                position_ids = kv_mgr.seated(position_ids, ids)
        if windowed_context_encoding_window_idx == 0 and attention_mask is None:
            attention_mask = position_ids >= 0  # A prompt's windows are causal, the first as well.
        step = StepInputs(
            phase=phase,
            hidden_states=hidden_states,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_value=past_key_value,
            cache_layout=cache_layout,
            active_mask=active_mask,
            packing=packing,
            owners=owners if get_kv_per_layer else None,
            adapter_ids=adapter_ids,
            cos_cache=cos_cache,
            sin_cache=sin_cache,
            rmsnorm=rmsnorm,
            rotary_position_ids=rotary_position_ids,
            residual=residual,
            use_polar_compatible_rope=polar,
        )
        manager = require_manager(kv_mgr, cache_arguments) if update_kv_per_layer else None
        in_place = not encodes and self.neuron_config.attn_block_tkg_nki_kernel_cache_update
        if manager is not None and in_place and get_kv_per_layer and self.uses_block(step):
            slots = manager.slots_read(position_ids=position_ids, **cache_arguments)
            step = step._replace(write_slots=slots)
        if self.attention_chunk_size and self.cp_degree == 1:
            output = self.chunked_attention_forward(step)
        elif self.attention_chunk_size:
            output = self.chunked_attention_with_context_parallel_forward(step)
        elif self.sliding_window:
            output = self.windowed_attention_forward(step)
        else:
            output = self.standard_causal_attention_forward(step)

        if manager is None:
            return output
        if encodes:
            position_ids = before.natural(position_ids, 1)
            slots = cache_arguments.get("scatter_index")
            if slots is not None and slots.shape == position_ids.shape:  # else the cache refuses it
                cache_arguments["scatter_index"] = before.natural(slots, 1)
        if packing is not None:
            kept = None if owners is None else owners == manager.dp_rank
            cache_arguments = update_arguments(
                cache_arguments, packing, position_ids, self.neuron_config, kept
            )
        if step.write_slots is not None:
            updated = manager.stored_kv(
                cache_arguments["idx"], cache_arguments.get("kvcache_buffer")
            )
        else:
            update = manager.write_kv_by_layer_id if in_place else manager.update_kv_by_layer_id
            updated = update(
                position_ids=position_ids, kv_per_layer=output.present_key_value, **cache_arguments
            )
        return NeuronAttentionBaseOutput(
            hidden_states=output.hidden_states,
            present_key_value=updated,
            cos_cache=output.cos_cache,
            sin_cache=output.sin_cache,
            residual=output.residual,
        )

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a checkpoint by this layer's names or Hugging Face's; see `impl.state_dict`.

        Args:
            state_dict: the checkpoint; it is not changed.
            strict: refuse missing and unexpected entries.
            assign: keep the checkpoint's tensors instead of copying them.

        Returns:
            Missing and unexpected keys.

        Raises:
            StateDictError: the checkpoint does not fit.
        """
        report = super().load_state_dict(state_dict, strict=False, assign=assign)
        if strict:
            checkpoints.check_keys(report.missing_keys, report.unexpected_keys)
        return report


def _adapt_state_dict(
    module: nn.Module, state: dict[str, Tensor], prefix: str, *_reports: object
) -> None:
    assert isinstance(module, NeuronAttentionBase)
    checkpoints.adapt(module, state, prefix)
