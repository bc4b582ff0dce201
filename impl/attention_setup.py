"""What a layer's attention computes, and by which kernel: score rule, sinks, cache layout."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from impl.attention_inputs import AttentionInputs
from impl.config import InferenceConfig
from impl.flash_decoding import RowSumExchange
from impl.kernels import PrefillRule, native
from impl.kernels.fused import sink_fits
from impl.kernels.nki import device_obstacle
from impl.layer_options import LayerOptions
from impl.sink import LearnedSink
from impl.slot_positions import ContiguousSlots, LeftPaddedSlots, ShardSlots, SlotLayout
from impl.strategy import (
    FlashAttentionStrategy,
    KernelChoice,
    get_flash_attention_strategy,
    resolve_kernel,
    warn_of_unbound_kernels,
)


class AttentionSetup(AttentionInputs):
    """The facts of a layer that its attention needs besides q, k and v.

    Attributes:
        cache_layout: which position each slot of `past_key_value` holds where no cache manager
            says so.

    Args:
        config: the model's configuration.
        options: the layer's numeric options.
        **inputs: as `AttentionInputs`.
    """

    def __init__(self, config: InferenceConfig, options: LayerOptions, **inputs: Any) -> None:
        super().__init__(config, options, **inputs)
        run = config.neuron_config
        self.tp_degree, self.cp_degree = run.tp_degree, run.cp_degree
        self.dp_degree = run.attention_dp_degree
        self.padding_side = run.padding_side
        self.softmax_scale = options.divisor
        self.sliding_window = options.sliding_window
        self.learned_sinks_size = options.learned_sinks_size
        # A windowed layer keeps its keys as rows, as its cache does.
        self.k_cache_transposed = run.k_cache_transposed and options.sliding_window is None
        self.cache_layout = self._default_layout()
        self.row_sum_exchange = RowSumExchange(self.parallel.core_group)
        self.score_rule = native.ScoreRule(
            divisor=options.divisor, softcap=options.attn_logit_softcapping
        )
        self.prefill_rule = PrefillRule(
            score=self.score_rule,
            sliding_window=options.sliding_window,
            attention_chunk_size=options.attention_chunk_size,
            padding_side=run.padding_side,
            logical_nc_config=run.logical_nc_config,
        )
        self._init_sinks()
        warn_of_unbound_kernels(run, attention_bound=device_obstacle() is None)

    def _default_layout(self) -> SlotLayout:
        if self.parallel.core_group.size > 1:
            return ShardSlots(self.parallel.core_group.rank, self.parallel.core_group.size)
        return LeftPaddedSlots() if self.padding_side == "left" else ContiguousSlots()

    def _init_sinks(self) -> None:
        """One sink parameter, and a second one for decode where the two phases shard unlike."""
        self.learned_sinks: LearnedSink | None = None
        self.tkg_learned_sinks: LearnedSink | None = None
        if self.learned_sinks_size is None:
            return
        size, heads, dtype = self.learned_sinks_size, self.num_heads, self.torch_dtype
        self.learned_sinks = LearnedSink(size, heads, dtype, self.tp_degree // self.cp_degree)
        if self.cp_degree != self.dp_degree:
            self.tkg_learned_sinks = LearnedSink(
                size, heads, dtype, self.tp_degree // self.dp_degree
            )

    def get_learned_sinks(self, is_prefill_stage: bool | None = None) -> Tensor | None:
        """Sink logits of a phase.

        Args:
            is_prefill_stage: the phase; None is `neuron_config.is_prefill_stage`.

        Returns:
            One per query head of this rank: those of decode only in decode and where context and
            data parallelism differ, else those of the layer. None if the layer has no sinks.
        """
        if self.learned_sinks is None:
            return None
        if is_prefill_stage is None:
            is_prefill_stage = self.neuron_config.is_prefill_stage
        apart = self.cp_degree != self.dp_degree and self.tkg_learned_sinks is not None
        if apart and is_prefill_stage is False:
            assert self.tkg_learned_sinks is not None
            return self.tkg_learned_sinks.get_sink()
        return self.learned_sinks.get_sink()

    def get_flash_attention_strategy(
        self, q_len: int, has_attention_mask: bool
    ) -> FlashAttentionStrategy:
        """Prefill kernel this layer selects; see `impl.strategy`."""
        run = self.neuron_config
        return get_flash_attention_strategy(
            q_len=q_len,
            has_attention_mask=has_attention_mask,
            head_dim=self.head_dim,
            cp_degree=self.cp_degree,
            logical_nc_config=run.logical_nc_config,
            attn_kernel_enabled=run.attn_kernel_enabled,
            strided_context_parallel_kernel_enabled=run.strided_context_parallel_kernel_enabled,
            sliding_window=self.sliding_window,
        )

    def kernel_choice(
        self,
        q_len: int,
        has_attention_mask: bool = True,
        *,
        explicit_mask: bool = False,
        prior: bool = False,
        prior_in_order: bool = False,
        trains: bool = False,
        device_type: str = "cpu",
    ) -> KernelChoice:
        """Kernel this layer selects for a prefill of `q_len`, and what computes it.

        Args:
            q_len: queries on this rank.
            has_attention_mask: whether the step is masked at all.
            explicit_mask: whether the caller gives a mask `(batch, 1, q_len, kv_len)`.
            prior: whether the step also sees cached keys.
            prior_in_order: whether the cache holds position s in slot s, and all of it is seen.
            trains: whether gradients will be asked for.
            device_type: where it runs.
        """
        plain = self.cp_degree == 1 and self.prefill_rule.plain(
            explicit_mask=explicit_mask, prior=prior
        )
        if trains and device_type == "cpu" and self.torch_dtype.itemsize < 4:
            plain = False  # PyTorch's fused kernel adds gradients of k and v up in the model dtype
        if self.learned_sinks is not None:
            # a sink is trained by the streamed form, whose gradient of it is summed in float32
            plain = plain and not trains and sink_fits(self.head_dim, device_type)
        obstacle = self.prefill_rule.nki_obstacle(
            head_dim=self.head_dim, dtype=self.torch_dtype, explicit_mask=explicit_mask
        )
        if prior and not prior_in_order:
            obstacle = "attention_cte: cached keys are not one run from slot 0"
        elif trains:
            obstacle = "attention_cte: it has no backward here"
        elif device_type == "neuron" and obstacle is None:
            obstacle = device_obstacle()
        return resolve_kernel(
            self.get_flash_attention_strategy(q_len, has_attention_mask),
            q_len=q_len,
            plain=plain,
            device_type=device_type,
            attn_kernel_enabled=self.neuron_config.attn_kernel_enabled,
            nki_obstacle=obstacle,
        )
