"""A layer's output projection: from the heads of this rank to hidden states."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from impl.attention_core import AttentionCore
from impl.config import InferenceConfig
from impl.gqa import GroupQueryAttention_O
from impl.layer_options import LayerOptions
from impl.parallel.layer import PhaseHeads
from impl.parallel.phases import DecodePhase, PrefillPhase
from impl.step import Phase, StepInputs

Projection = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]


class AttentionOutput(AttentionCore):
    """Attention and the projection of its output.

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

    def project_output(
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
