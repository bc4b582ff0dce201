"""A layer's decode step as one call, in torch or by nki-library, and which of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from impl.attention_inputs import Norm
from impl.attention_output import AttentionOutput
from impl.decode_strategy import DecodeStep, resolve_block_kernel
from impl.kernels.nki import device_obstacle
from impl.kernels.nki_block import attention_block_tkg
from impl.kernels.nki_block_limits import attention_block_tkg_obstacle, has_free_tail
from impl.kernels.token_generation_block import (
    BlockRule,
    BlockWeights,
    RMSWeight,
    token_generation_block,
)
from impl.kv_cache.token_writes import write_step
from impl.norms import QKNormPlacement, QKNormScope, RMSNorm
from impl.output import NeuronAttentionBaseOutput
from impl.slot_positions import SlotLayout
from impl.step import Phase, StepInputs
from impl.strategy import Implementation, KernelChoice
from impl.training import trains


class AttentionBlock(AttentionOutput):
    """Decode steps that are one call."""

    def uses_block(self, step: StepInputs) -> bool:
        """Whether the step is one call: a decode step that `decode_kernel_choice` gives a block."""
        return step.phase is Phase.TOKEN_GENERATION and self._block_obstacle(step.rmsnorm) is None

    def _block_obstacle(self, rmsnorm: Norm | None) -> str | None:
        """Why decode steps of this layer are not one call, in words; None if they are."""
        run, parallel = self.neuron_config, self.parallel
        norms = (self.q_layernorm, self.k_layernorm, rmsnorm)
        by_projection = self.options.qk_layernorm_scope is not QKNormScope.HEAD
        reasons = (
            (
                not run.attn_block_tkg_nki_kernel_enabled,
                "attn_block_tkg_nki_kernel_enabled is False",
            ),
            (not run.fused_qkv, "fused_qkv is False"),
            (parallel.decode.stage.split.size > 1, "ranks share the rows"),
            (parallel.core_group.size > 1, "ranks share a KV head's tokens"),
            (self.lora is not None, "it has LoRA adapters"),
            (self.clip_qkv is not None, "it clips q, k and v"),
            (self.qk_norm is not None, "it has a weightless norm of q and k"),
            (by_projection, "its norms run over the flat q and k"),
            (self.options.attn_temperature_tuning, "it scales queries by position"),
            (
                not all(norm is None or isinstance(norm, RMSNorm) for norm in norms),
                "a norm is no RMSNorm",
            ),
        )
        return next((why for holds, why in reasons if holds), None)

    def decode_kernel_choice(
        self,
        batch_size: int,
        q_len: int,
        slots: int,
        *,
        rmsnorm: Norm | None = None,
        use_polar_compatible_rope: bool = False,
        rotary_dim: int | None = None,
        cache_layout: SlotLayout | None = None,
        updates: bool = False,
        trains: bool = False,
        device_type: str = "cpu",
    ) -> KernelChoice:
        """What computes a decode step of this layer, and why.

        Args:
            batch_size: rows.
            q_len: tokens of a row.
            slots: slots of the cache.
            rmsnorm: see `forward`.
            use_polar_compatible_rope: see `forward`.
            rotary_dim: channels of a head that turn; None is as the layer's embedding says.
            cache_layout: which position each slot holds; None is the layer's own.
            updates: the step's tokens are written to the cache that it reads, in place.
            trains: whether gradients will be asked for.
            device_type: where it runs.
        """
        rotary = self._rotary(use_polar_compatible_rope)
        if rotary_dim is None and rotary is not None:
            rotary_dim = int(getattr(rotary, "rotary_dim", self.head_dim))
        obstacle = self._block_obstacle(rmsnorm)
        on_neuron, nki_obstacle = device_type == "neuron", None
        if obstacle is None and on_neuron:
            nki_obstacle = attention_block_tkg_obstacle(
                self._block_weights(rmsnorm),
                self._block_rule(use_polar_compatible_rope),
                batch=batch_size,
                q_len=q_len,
                slots=slots,
                rotary_dim=rotary_dim,
                logical_nc_config=self.neuron_config.logical_nc_config,
                free_tail=has_free_tail(cache_layout or self.cache_layout, slots, q_len),
                trains=trains,
            )
        if on_neuron and nki_obstacle is None:
            nki_obstacle = device_obstacle()
        return resolve_block_kernel(
            DecodeStep(
                batch=batch_size,
                num_attention_heads=len(self.parallel.decode_heads.query),
                num_key_value_heads=len(self.parallel.decode_heads.key_value),
                q_len=q_len,
                slots=slots,
                head_dim=self.head_dim,
                dtype=self.torch_dtype,
                updates=updates and obstacle is None and self._reads_in_place,
                trains=trains,
                device_type=device_type,
            ),
            block_obstacle=obstacle,
            nki_obstacle=nki_obstacle,
        )

    @property
    def _reads_in_place(self) -> bool:
        """Whether PyTorch's fused attention could compute a decode step over its cache."""
        sinks = self.get_learned_sinks(is_prefill_stage=False)
        return not self.k_cache_transposed and sinks is None and self.score_rule.softcap is None

    def _block_rule(self, polar: bool) -> BlockRule:
        return BlockRule(
            num_key_value_heads=len(self.parallel.decode_heads.key_value),
            head_dim=self.head_dim,
            score=self.score_rule,
            norm_after_rope=self.options.qk_layernorm_placement is QKNormPlacement.POST_ROPE,
            interleaved=polar,
            k_cache_transposed=self.k_cache_transposed,
        )

    def _block_weights(self, rmsnorm: Norm | None) -> BlockWeights:
        """Weights of this rank; the bias of a sum over ranks is added to the sum."""

        def values(norm: Norm | None) -> RMSWeight | None:
            return RMSWeight.of(norm) if isinstance(norm, RMSNorm) else None

        qkv, output = self.get_qkv_proj(False).Wqkv, self.get_o_proj(False).o_proj
        return BlockWeights(
            qkv=qkv.weight,
            output=output.weight,
            qkv_bias=qkv.bias,
            output_bias=output.bias if output.group.size == 1 else None,
            input_norm=values(rmsnorm) if self.fuses_input else None,
            q_norm=values(self.q_layernorm),
            k_norm=values(self.k_layernorm),
            sink=self.get_learned_sinks(is_prefill_stage=False),
        )

    def block_forward(self, step: StepInputs) -> NeuronAttentionBaseOutput:
        """Forward of a step that `uses_block`.

        Raises:
            ShapeError: a tensor that does not fit.
        """
        hidden_states = step.hidden_states.to(self.torch_dtype)
        polar = step.use_polar_compatible_rope
        tables = self.rotary_tables(
            hidden_states,
            step.position_ids,
            step.cos_cache,
            step.sin_cache,
            polar,
            step.rotary_position_ids,
        )
        cos, sin = tables if self._rotary(polar) is not None else (None, None)
        assert step.past_key_value is not None
        k_cache, v_cache = step.past_key_value
        (batch, q_len, _), slots = hidden_states.shape, v_cache.shape[2]
        rule, weights = self._block_rule(polar), self._block_weights(step.rmsnorm)
        self._check_cache(k_cache, v_cache, batch, rule.num_key_value_heads)
        prior_mask, active_mask = self.decode_masks(
            step.position_ids, slots, step.attention_mask, step.active_mask, step.cache_layout
        )
        choice = self.decode_kernel_choice(
            batch,
            q_len,
            slots,
            rmsnorm=step.rmsnorm,
            use_polar_compatible_rope=polar,
            rotary_dim=None if cos is None else cos.shape[-1] * (2 if polar else 1),
            cache_layout=step.cache_layout,
            # PyTorch's attention over a cache needs values: see impl.kernels.updated
            updates=step.write_slots is not None and not isinstance(hidden_states, FakeTensor),
            trains=trains(hidden_states, k_cache, v_cache, *_tensors(weights)),
            device_type=hidden_states.device.type,
        )
        arguments: dict[str, Any] = {
            "cos": cos,
            "sin": sin,
            "k_cache": k_cache,
            "v_cache": v_cache,
            "prior_mask": prior_mask,
            "active_mask": active_mask,
        }
        if choice.implementation is Implementation.NKI:
            cores = self.neuron_config.logical_nc_config
            out = attention_block_tkg(
                hidden_states, weights, rule, logical_nc_config=cores, **arguments
            )
            if step.write_slots is not None:
                columns = self.k_cache_transposed
                write_step(k_cache, v_cache, out.k, out.v, step.write_slots, k_transposed=columns)
        else:
            rule = replace(rule, implementation=choice.implementation)
            out = token_generation_block(
                hidden_states, weights, rule, write_slots=step.write_slots, **arguments
            )
        output, phase = out.hidden_states, self.parallel.decode
        if phase.stage.tp.size > 1:
            output = self.get_o_proj(False).o_proj.add_up(output, phase.reduce)
        return NeuronAttentionBaseOutput(
            hidden_states=phase.leave(output.to(step.hidden_states.dtype)),
            present_key_value=(out.k, out.v),
            cos_cache=tables[0],
            sin_cache=tables[1],
            residual=step.residual,
        )


def _tensors(weights: BlockWeights) -> list[Tensor | None]:
    """All tensors of the weights, those of the norms among them."""
    norms = (weights.input_norm, weights.q_norm, weights.k_norm)
    given = (weights.qkv, weights.output, weights.qkv_bias, weights.output_bias, weights.sink)
    return [*given, *(None if norm is None else norm.weight for norm in norms)]
