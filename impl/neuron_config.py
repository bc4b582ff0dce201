"""How a model is run: parallelism, dtypes, kernels and cache layout.

Checked once, when made: a combination that no layer could honour raises `ConfigError`. What is
valid but not served by this version is refused later, by `impl.serving`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from impl.errors import ConfigError, explain

SERVED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EP_DISPATCH_OPTIONS = ("AR_AG", "RS_AG", "AG_AR")


def require(condition: bool, argument: str, rule: str, got: object, hint: str = "") -> None:
    """Raise `ConfigError` unless `condition` holds; the words are those of `explain`."""
    if not condition:
        raise ConfigError(explain(argument, rule, got, hint))


def require_positive(owner: object, names: Sequence[str]) -> None:
    """Raise `ConfigError` unless each named attribute is None or an integer of at least 1."""
    for name in names:
        value = getattr(owner, name)
        if value is not None:
            require(isinstance(value, int) and value >= 1, name, "be an integer >= 1", value)


@dataclass(frozen=True, kw_only=True, slots=True)
class NeuronConfig:
    """How a model is run.

    Attributes:
        batch_size: sequences per step.
        max_batch_size: cache lines; None is `batch_size`.
        ctx_batch_size: sequences per context-encoding (CTE) step; None is `batch_size`.
        tkg_batch_size: sequences per token-generation (TKG) step; None is `batch_size`.
        seq_len: longest sequence, prompt and generated tokens together.
        max_context_length: longest prompt; None is `seq_len`.
        max_length: cache slots per sequence; None is `seq_len`.
        padding_side: side of a batch row that holds padding, "right" or "left".
        torch_dtype: dtype of weights, activations and cache.
        attention_dtype: dtype of the attention layers where it differs; None is `torch_dtype`.
        rpl_reduce_dtype: dtype of row-parallel reductions; None is the layer's.
        tp_degree: tensor-parallel ranks, which is the world size.
        cp_degree: context-parallel groups during prefill; divides `tp_degree`.
        attention_dp_degree: data-parallel groups during decode; divides `tp_degree`.
        switch_cc: plain meshes also on 8 by 8 ranks, in place of those of Trn2's wiring.
        sequence_parallel_enabled: activations between layers are split along the sequence.
        logical_nc_config: physical cores per logical core (LNC), 1 or 2.
        fused_qkv: one projection for q, k and v.
        qk_layernorm: `nn.LayerNorm(head_dim)` on q and k where a layer brings no norm of its own.
        is_continuous_batching: cache lines are addressed by sequence id.
        is_prefix_caching: prefill reads cached prefixes.
        is_chunked_prefill: prefill is cut into chunks that share a step with decode.
        is_block_kv_layout: the cache is paged.
        pa_num_blocks: blocks of a paged cache; None without one.
        pa_block_size: slots of a block.
        is_prefill_stage: the phase a submodel is compiled for; None if it serves both.
        flash_decoding_enabled: the cache is split along the sequence within a KV group.
        k_cache_transposed: keys are cached as `(batch, kv_heads, head_dim, slots)`.
        kv_cache_quant: the cache holds a narrower format.
        kv_cache_quant_dtype: that format: float8_e4m3fn, float8_e5m2, or int8, which needs scales.
        kv_cache_quant_bound: largest magnitude of a scaled code; None is the format's.
        kv_cache_tiling: the cache's sequence axis is stored tiled.
        windowed_context_encoding_size: prefill in windows of this many tokens; None is at once.
        speculation_length: draft tokens per step, 0 for none.
        enable_fused_speculation: draft and target model run as one graph.
        is_eagle_draft: the model is the draft of EAGLE speculation.
        is_eagle3: that is EAGLE-3, whose draft reads hidden states of twice the width.
        lora_config: an `impl.lora.LoraServingConfig`; None for no adapters.
        attn_kernel_enabled: prefill flash kernel: True always where legal, False never, None by
            sequence length.
        strided_context_parallel_kernel_enabled: the strided flash kernel; needs `cp_degree > 1`.
        attn_tkg_nki_kernel_enabled: NKI kernel for decode attention.
        attn_block_tkg_nki_kernel_enabled: NKI kernel for the whole decode attention block.
        attn_block_tkg_nki_kernel_cache_update: a decode step with `update_kv_per_layer` writes its
            tokens into the cache in place, in place of returning an updated copy.
        attn_block_tkg_nki_kernel_cascaded_attention: its cascaded form.
        qkv_kernel_enabled: the fused QKV kernel.
        qkv_nki_kernel_enabled: its NKI form.
        qkv_cte_nki_kernel_fuse_rope: RoPE inside the QKV kernel during prefill.
        ep_dispatch_cc_option: collectives around expert parallelism: AR_AG, RS_AG or AG_AR.

    Raises:
        ConfigError: a value out of range, or a combination that is not defined.
    """

    batch_size: int = 1
    max_batch_size: int | None = None
    ctx_batch_size: int | None = None
    tkg_batch_size: int | None = None
    seq_len: int = 128
    max_context_length: int | None = None
    max_length: int | None = None
    padding_side: str = "right"
    torch_dtype: torch.dtype = torch.bfloat16
    attention_dtype: torch.dtype | None = None
    rpl_reduce_dtype: torch.dtype | None = None
    tp_degree: int = 1
    cp_degree: int = 1
    attention_dp_degree: int = 1
    switch_cc: bool = False
    sequence_parallel_enabled: bool = False
    logical_nc_config: int = 1
    fused_qkv: bool = False
    qk_layernorm: bool = False
    is_continuous_batching: bool = False
    is_prefix_caching: bool = False
    is_chunked_prefill: bool = False
    is_block_kv_layout: bool = False
    pa_num_blocks: int | None = None
    pa_block_size: int | None = None
    is_prefill_stage: bool | None = None
    flash_decoding_enabled: bool = False
    k_cache_transposed: bool = False
    kv_cache_quant: bool = False
    kv_cache_quant_dtype: torch.dtype = torch.float8_e4m3fn
    kv_cache_quant_bound: float | None = None
    kv_cache_tiling: bool = False
    windowed_context_encoding_size: int | None = None
    speculation_length: int = 0
    enable_fused_speculation: bool = False
    is_eagle_draft: bool = False
    is_eagle3: bool = False
    lora_config: Any = None
    attn_kernel_enabled: bool | None = None
    strided_context_parallel_kernel_enabled: bool = False
    attn_tkg_nki_kernel_enabled: bool = False
    attn_block_tkg_nki_kernel_enabled: bool = False
    attn_block_tkg_nki_kernel_cache_update: bool = False
    attn_block_tkg_nki_kernel_cascaded_attention: bool = False
    qkv_kernel_enabled: bool = False
    qkv_nki_kernel_enabled: bool = False
    qkv_cte_nki_kernel_fuse_rope: bool = False
    ep_dispatch_cc_option: str = "AR_AG"

    def __post_init__(self) -> None:
        for name, default in (
            ("max_batch_size", self.batch_size),
            ("ctx_batch_size", self.batch_size),
            ("tkg_batch_size", self.batch_size),
            ("max_context_length", self.seq_len),
            ("max_length", self.seq_len),
            ("attention_dtype", self.torch_dtype),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        self._check_values()
        self._check_parallelism()
        self._check_kernels()

    @property
    def cache_lines(self) -> int:
        """`max_batch_size`, as an integer."""
        assert self.max_batch_size is not None
        return self.max_batch_size

    @property
    def cache_slots(self) -> int:
        """`max_length`, as an integer."""
        assert self.max_length is not None
        return self.max_length

    @property
    def layer_dtype(self) -> torch.dtype:
        """`attention_dtype`, as a dtype."""
        assert self.attention_dtype is not None
        return self.attention_dtype

    def _check_values(self) -> None:
        require_positive(
            self,
            (
                "batch_size",
                "max_batch_size",
                "ctx_batch_size",
                "tkg_batch_size",
                "seq_len",
                "max_context_length",
                "max_length",
                "tp_degree",
                "cp_degree",
                "attention_dp_degree",
                "windowed_context_encoding_size",
                "pa_num_blocks",
                "pa_block_size",
            ),
        )
        sides = ("right", "left")
        require(self.padding_side in sides, "padding_side", f"be one of {sides}", self.padding_side)
        require(
            self.logical_nc_config in (1, 2),
            "logical_nc_config",
            "be 1 or 2",
            self.logical_nc_config,
        )
        require(
            self.speculation_length >= 0, "speculation_length", "be >= 0", self.speculation_length
        )
        for name in ("torch_dtype", "attention_dtype"):
            value = getattr(self, name)
            require(value in SERVED_DTYPES, name, f"be one of {SERVED_DTYPES}", value)
        require(
            self.ep_dispatch_cc_option in EP_DISPATCH_OPTIONS,
            "ep_dispatch_cc_option",
            f"be one of {EP_DISPATCH_OPTIONS}",
            self.ep_dispatch_cc_option,
        )

    def _check_parallelism(self) -> None:
        tp, cp, dp = self.tp_degree, self.cp_degree, self.attention_dp_degree
        require(tp % cp == 0, "tp_degree", "be a multiple of cp_degree", f"{tp} and {cp}")
        require(tp % dp == 0, "tp_degree", "be a multiple of attention_dp_degree", f"{tp} and {dp}")
        batch = self.tkg_batch_size
        assert batch is not None
        require(
            batch % dp == 0,
            "tkg_batch_size",
            "be a multiple of attention_dp_degree",
            f"{batch} and {dp}",
        )
        if dp > 1:
            require(
                self.is_continuous_batching,
                "is_continuous_batching",
                f"be True when attention_dp_degree is {dp}",
                False,
                "each data-parallel rank owns a range of sequence ids",
            )
        if cp > 1 and dp > 1:
            require(
                cp >= dp and cp % dp == 0,
                "cp_degree",
                "be a multiple of attention_dp_degree when both exceed 1",
                f"{cp} and {dp}",
            )
        if self.ep_dispatch_cc_option == "RS_AG":
            require(
                tp <= batch,
                "tp_degree",
                "be at most tkg_batch_size when ep_dispatch_cc_option is RS_AG",
                f"{tp} and {batch}",
                "the reduce-scatter splits the batch over all ranks",
            )
            require(
                batch % tp == 0,
                "tkg_batch_size",
                "be a multiple of tp_degree when ep_dispatch_cc_option is RS_AG",
                f"{batch} and {tp}",
            )

    def _check_kernels(self) -> None:
        if self.strided_context_parallel_kernel_enabled:
            require(
                self.cp_degree > 1,
                "cp_degree",
                "exceed 1 when strided_context_parallel_kernel_enabled is True",
                self.cp_degree,
            )
        for name in ("flash_decoding_enabled", "is_chunked_prefill", "is_block_kv_layout"):
            require(
                not (self.k_cache_transposed and getattr(self, name)),
                "k_cache_transposed",
                f"be False when {name} is True",
                True,
            )
        if self.attn_block_tkg_nki_kernel_enabled:
            for name in ("flash_decoding_enabled", "is_chunked_prefill"):
                require(
                    not getattr(self, name),
                    "attn_block_tkg_nki_kernel_enabled",
                    f"be False when {name} is True",
                    True,
                )
            require(
                self.qkv_kernel_enabled,
                "qkv_kernel_enabled",
                "be True when attn_block_tkg_nki_kernel_enabled is True",
                False,
            )
        require(
            self.attn_block_tkg_nki_kernel_enabled
            or not self.attn_block_tkg_nki_kernel_cache_update,
            "attn_block_tkg_nki_kernel_enabled",
            "be True when attn_block_tkg_nki_kernel_cache_update is True",
            False,
        )
