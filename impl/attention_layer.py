"""One step of a layer, from its hidden states to its output, by kind of layer."""

from __future__ import annotations

from impl.attention_block import AttentionBlock
from impl.errors import UnsupportedError, explain
from impl.output import NeuronAttentionBaseOutput
from impl.parallel.phases import PrefillPhase
from impl.step import Phase, StepInputs


class AttentionLayer(AttentionBlock):
    """Forwards of the kinds of layer, and the ranks' exchange of tokens."""

    def standard_causal_attention_forward(self, step: StepInputs) -> NeuronAttentionBaseOutput:
        """Forward of a full layer."""
        return self._layer_forward(step)

    def windowed_attention_forward(self, step: StepInputs) -> NeuronAttentionBaseOutput:
        """Forward of a layer with `sliding_window`."""
        return self._layer_forward(step)

    def chunked_attention_forward(self, step: StepInputs) -> NeuronAttentionBaseOutput:
        """Forward of a layer with `attention_chunk_size`; decodes one token a step.

        Raises:
            UnsupportedError: a decode step of several tokens. The module followed refuses it too
                (`compute_for_token_gen`): its chunk cache forgets a chunk at its end, and drafts
                rejected past that end could not be taken back.
        """
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
        if self.uses_block(step):
            return self.block_forward(step)
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
        output = self.project_output(merged, phase, step).to(step.hidden_states.dtype)
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
