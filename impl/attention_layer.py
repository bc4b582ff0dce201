"""One step of a layer, from its hidden states to its output, by kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from impl.attention_core import AttentionCore
from impl.attention_inputs import Norm
from impl.config import InferenceConfig
from impl.errors import UnsupportedError, explain
from impl.gqa import GroupQueryAttention_O
from impl.kernels.token_generation_block import (
    BlockRule,
    BlockWeights,
    RMSWeight,
    token_generation_block,
)
from impl.layer_options import LayerOptions
from impl.norms import QKNormPlacement, QKNormScope, RMSNorm
from impl.output import NeuronAttentionBaseOutput
from impl.parallel.layer import PhaseHeads
from impl.parallel.phases import DecodePhase, PrefillPhase
from impl.step import Phase, StepInputs
from impl.strategy import resolve_decode_kernel

Projection = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]


class AttentionLayer(AttentionCore):
    """Projections around attention, and the ranks' exchange of tokens.

    Args:
        config: the model's configuration.
        options: the layer's numeric options.
        o_bias: bias of the output projection.
        o_proj_layer_name: name of the output projection in checkpoints.
        **inputs: as `AttentionInputs`.
    """

    def __init__(
        self,
        config: InferenceConfig,
        options: LayerOptions,
        *,
        o_bias: bool,
        o_proj_layer_name: str,
        **inputs: Any,
    ) -> None:
        super().__init__(config, options, **inputs)
        self.o_bias = o_bias
        self.o_proj_layer_name = o_proj_layer_name
        parallel = self.parallel
        if parallel.shares_weights:
            self.o_proj = self._make_output(parallel.prefill_heads, parallel.prefill)
        else:
            self.cte_o_proj = self._make_output(parallel.prefill_heads, parallel.prefill)
            self.tkg_o_proj = self._make_output(parallel.decode_heads, parallel.decode)

    def _make_output(
        self, heads: PhaseHeads, phase: PrefillPhase | DecodePhase
    ) -> GroupQueryAttention_O:
        return GroupQueryAttention_O(
            self.hidden_size,
            self.head_dim,
            len(heads.query),
            dtype=self.torch_dtype,
            bias=self.o_bias,
            layer_name=self.o_proj_layer_name,
            group=phase.stage.tp,
            reduce_dtype=self.neuron_config.rpl_reduce_dtype,
        )

    def get_o_proj(self, is_prefill_stage: bool) -> GroupQueryAttention_O:
        """Output projection of a phase: one for both, or `cte_o_proj` and `tkg_o_proj`."""
        if self.parallel.shares_weights:
            return self.o_proj
        return self.cte_o_proj if is_prefill_stage else self.tkg_o_proj

    def standard_causal_attention_forward(self, step: StepInputs) -> NeuronAttentionBaseOutput:
        """Forward of a full layer."""
        return self._layer_forward(step)

    def windowed_attention_forward(self, step: StepInputs) -> NeuronAttentionBaseOutput:
        """Forward of a layer with `sliding_window`."""
        return self._layer_forward(step)

    def chunked_attention_forward(self, step: StepInputs) -> NeuronAttentionBaseOutput:
        """Forward of a layer with `attention_chunk_size`; decodes one token a step."""
        q_len = step.hidden_states.shape[1]
        if step.phase is Phase.TOKEN_GENERATION and q_len > 1:
            raise UnsupportedError(
                explain(
                    "hidden_states",
                    "hold one token in a decode step of a chunked layer",
                    q_len,
                    "speculation is not defined across a chunk's end",
                )
            )
        return self._layer_forward(step)

    def chunked_attention_with_context_parallel_forward(
        self, step: StepInputs
    ) -> NeuronAttentionBaseOutput:
        """Forward of a chunked layer under context parallelism, which cuts each chunk."""
        return self.chunked_attention_forward(step)

    def uses_block(self, step: StepInputs) -> bool:
        """Whether the step is one call of `token_generation_block`.

        It is where the configuration asks for the block kernel, in decode on one rank, and the
        layer has nothing that the kernel has no argument for.
        """
        run, options = self.neuron_config, self.options
        stage = self.parallel.decode.stage
        plain = (
            self.lora is None
            and self.clip_qkv is None
            and self.qk_norm is None
            and options.qk_layernorm_scope is QKNormScope.HEAD
            and not options.attn_temperature_tuning
        )
        norms = (self.q_layernorm, self.k_layernorm, step.rmsnorm)
        return (
            run.attn_block_tkg_nki_kernel_enabled
            and run.fused_qkv
            and step.phase is Phase.TOKEN_GENERATION
            and stage.tp.size == stage.split.size == self.parallel.core_group.size == 1
            and plain
            and all(norm is None or isinstance(norm, RMSNorm) for norm in norms)
        )

    def _block_forward(self, step: StepInputs) -> NeuronAttentionBaseOutput:
        hidden_states = step.hidden_states.to(self.torch_dtype)
        polar = step.use_polar_compatible_rope
        cos, sin = self.rotary_tables(
            hidden_states,
            step.position_ids,
            step.cos_cache,
            step.sin_cache,
            polar,
            step.rotary_position_ids,
        )
        assert step.past_key_value is not None
        k_cache, v_cache = step.past_key_value
        slots = v_cache.shape[2]
        self._check_cache(k_cache, v_cache, hidden_states.shape[0], self.num_key_value_heads)
        prior_mask, active_mask = self.decode_masks(
            step.position_ids, slots, step.attention_mask, step.active_mask, step.cache_layout
        )
        rotates = self.rotary_emb is not None or polar
        out = token_generation_block(
            hidden_states,
            self._block_weights(step),
            BlockRule(
                num_key_value_heads=self.num_key_value_heads,
                head_dim=self.head_dim,
                score=self.score_rule,
                norm_after_rope=(self.options.qk_layernorm_placement is QKNormPlacement.POST_ROPE),
                interleaved=polar,
                k_cache_transposed=self.k_cache_transposed,
                implementation=resolve_decode_kernel(slots, hidden_states.device.type),
            ),
            cos=cos if rotates else None,
            sin=sin if rotates else None,
            k_cache=k_cache,
            v_cache=v_cache,
            prior_mask=prior_mask,
            active_mask=active_mask,
        )
        return NeuronAttentionBaseOutput(
            hidden_states=out.hidden_states.to(step.hidden_states.dtype),
            present_key_value=(out.k, out.v),
            cos_cache=cos,
            sin_cache=sin,
            residual=step.residual,
        )

    def _block_weights(self, step: StepInputs) -> BlockWeights:
        def values(norm: Norm | None) -> RMSWeight | None:
            return RMSWeight.of(norm) if isinstance(norm, RMSNorm) else None

        qkv, output = self.get_qkv_proj(False).Wqkv, self.get_o_proj(False).o_proj
        return BlockWeights(
            qkv=qkv.weight,
            output=output.weight,
            qkv_bias=qkv.bias,
            output_bias=output.bias,
            input_norm=values(step.rmsnorm) if self.fuses_input else None,
            q_norm=values(self.q_layernorm),
            k_norm=values(self.k_layernorm),
            sink=self.get_learned_sinks(is_prefill_stage=False),
        )

    def _layer_forward(self, step: StepInputs) -> NeuronAttentionBaseOutput:
        if self.uses_block(step):
            return self._block_forward(step)
        hidden_states = step.hidden_states.to(self.torch_dtype)
        positions, rotary_positions = step.position_ids, step.rotary_position_ids
        encodes = step.phase is Phase.CONTEXT_ENCODING
        phase = self.parallel.prefill if encodes else self.parallel.decode
        if isinstance(phase, PrefillPhase):
            hidden_states = phase.enter(hidden_states)
            positions = phase.tokens(positions, 1)
            if rotary_positions is not None:
                rotary_positions = phase.tokens(rotary_positions, rotary_positions.dim() - 1)
        q, k, v, cos_cache, sin_cache = self.prep_qkv_tensors(
            hidden_states,
            positions,
            cos_cache=step.cos_cache,
            sin_cache=step.sin_cache,
            rmsnorm=step.rmsnorm,
            rotary_position_ids=rotary_positions,
            use_polar_compatible_rope=step.use_polar_compatible_rope,
            is_prefill_stage=encodes,
            adapter_ids=step.adapter_ids,
        )
        if isinstance(phase, PrefillPhase):
            k, v = phase.gather_keys(k, v)
        merged = self.attend(step, q, k, v).transpose(1, 2).flatten(2)
        output = self._project_output(merged, phase, step).to(step.hidden_states.dtype)
        residual = step.residual
        if isinstance(phase, PrefillPhase):
            k, v = self.parallel.for_cache(k), self.parallel.for_cache(v)
            if phase.ends_a_row and residual is not None:
                output, residual = output + residual, None
        return NeuronAttentionBaseOutput(
            hidden_states=phase.leave(output),
            present_key_value=(k, v),
            cos_cache=cos_cache,
            sin_cache=sin_cache,
            residual=residual,
        )

    def _project_output(
        self, merged: Tensor, phase: PrefillPhase | DecodePhase, step: StepInputs
    ) -> Tensor:
        """Project the heads' outputs, with the term of the rows' adapters."""
        encodes = step.phase is Phase.CONTEXT_ENCODING
        project: Projection = self.get_o_proj(encodes)
        if self.lora is None:
            return project(merged, phase.reduce)
        add = partial(self.lora.add, is_prefill_stage=encodes)
        adapt = partial(add, merged, step.adapter_ids, "o_proj")
        if phase.stage.tp.size == 1:
            return adapt(project(merged, phase.reduce))
        return project(merged, lambda product: phase.reduce(adapt(product)))
