"""One step of a layer, from its hidden states to its output, by kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from impl.attention_core import AttentionCore
from impl.config import InferenceConfig
from impl.errors import UnsupportedError, explain
from impl.gqa import GroupQueryAttention_O
from impl.layer_options import LayerOptions
from impl.output import NeuronAttentionBaseOutput
from impl.parallel.layer import PhaseHeads
from impl.parallel.phases import DecodePhase, PrefillPhase
from impl.step import Phase, StepInputs

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

    def _layer_forward(self, step: StepInputs) -> NeuronAttentionBaseOutput:
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
        project: Projection = self.get_o_proj(step.phase is Phase.CONTEXT_ENCODING)
        if self.lora is None:
            return project(merged, phase.reduce)
        adapt = partial(self.lora.add, merged, step.adapter_ids, "o_proj")
        if phase.stage.tp.size == 1:
            return adapt(project(merged, phase.reduce))
        return project(merged, lambda product: phase.reduce(adapt(product)))
