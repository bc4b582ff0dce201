"""Which prefill kernel, and why.

`get_flash_attention_strategy` is the documented decision of NxD Inference; `resolve_kernel` adds
what really computes the step here.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import Enum

import torch

from impl.errors import ConfigError, explain
from impl.neuron_config import NeuronConfig

logger = logging.getLogger("impl.strategy")

NATIVE_LENGTHS = 512
"""Shorter prefills are computed at once: a tile or two would hold all their scores anyway."""

SDPA_DEVICES = ("cpu", "cuda")
"""Devices on which PyTorch's `scaled_dot_product_attention` is a fused kernel."""

# Fields of NeuronConfig that ask for a kernel, whatever the shapes.
KERNEL_FIELDS = (
    "attn_kernel_enabled",
    "attn_tkg_nki_kernel_enabled",
    "attn_block_tkg_nki_kernel_enabled",
    "qkv_kernel_enabled",
    "qkv_nki_kernel_enabled",
)

# Those of them for which a kernel is bound, in `impl.kernels.nki` and `nki_block`.
BOUND_FIELDS = ("attn_kernel_enabled", "attn_block_tkg_nki_kernel_enabled")


class FlashAttentionStrategy(Enum):
    """Prefill kernels of NxD Inference."""

    NONE = 0
    UNSHARDED_KERNEL = 1
    SHARDED_KERNEL = 2
    CONTEXT_PARALLEL_KERNEL = 3
    STRIDED_CONTEXT_PARALLEL_KERNEL = 4


class Implementation(Enum):
    """Who computes a prefill, or a decode step."""

    NATIVE = "native"
    """The plain torch form: any positions and any mask, all scores at once."""
    SDPA = "sdpa"
    """PyTorch's own fused attention: causal or full, without softcap or limits; in decode, eager on
    the CPU, over a cache that the step is written to first."""
    FLASH = "flash"
    """The streamed torch form: everything, a tile of scores at a time."""
    HEADWISE = "headwise"
    """Decode, a piece of one head's cached keys at a time; eager on the CPU."""
    NKI = "nki"
    """nki-library's `attention_cte` in prefill, its `attention_block_tkg` in decode."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelChoice:
    """What was asked for and what runs.

    Attributes:
        strategy: the prefill kernel that the configuration and the shapes select; NONE in decode.
        implementation: what computes the result.
        reason: why, in words.
    """

    strategy: FlashAttentionStrategy
    implementation: Implementation
    reason: str


def get_flash_attention_strategy(
    *,
    q_len: int,
    has_attention_mask: bool,
    head_dim: int,
    cp_degree: int = 1,
    logical_nc_config: int = 1,
    attn_kernel_enabled: bool | None = None,
    strided_context_parallel_kernel_enabled: bool = False,
    sliding_window: int | None = None,
) -> FlashAttentionStrategy:
    """Select the prefill kernel.

    Args:
        q_len: queries on this rank.
        has_attention_mask: whether the step is masked; prefill over cached prefixes is not.
        head_dim: width of a head.
        cp_degree: context-parallel groups.
        logical_nc_config: physical cores per logical core (LNC).
        attn_kernel_enabled: False never uses a kernel, True uses one wherever it is legal, None
            where it also pays.
        strided_context_parallel_kernel_enabled: the strided kernel was asked for.
        sliding_window: window of the layer, None if it has none.

    Returns:
        The strategy:

        | cp | LNC | condition | strategy |
        | --- | --- | --- | --- |
        | any | any | `attn_kernel_enabled` is False | NONE |
        | > 1 | 2 | strided, q_len > head_dim, no window | STRIDED_CONTEXT_PARALLEL_KERNEL |
        | > 1 | 2 | not strided, q_len > head_dim | CONTEXT_PARALLEL_KERNEL |
        | > 1 | any | not strided, otherwise | NONE |
        | 1 | 2 | no mask | SHARDED_KERNEL |
        | 1 | 2 | q_len >= 1024 and q_len % 512 == 0 | SHARDED_KERNEL |
        | 1 | 2 | q_len < 1024 and q_len % 256 == 0 | SHARDED_KERNEL |
        | 1 | 2 | otherwise | NONE, with a warning |
        | 1 | 1 | q_len >= 4096, or enabled is True and q_len >= 512 | UNSHARDED_KERNEL |
        | 1 | 1 | otherwise | NONE |

    Raises:
        ConfigError: the strided kernel was asked for where it cannot run.
    """
    if attn_kernel_enabled is False:
        return FlashAttentionStrategy.NONE
    if cp_degree > 1:
        return _with_context_parallelism(
            q_len,
            head_dim,
            logical_nc_config,
            strided_context_parallel_kernel_enabled,
            sliding_window,
        )
    if logical_nc_config >= 2:
        multiple = 512 if q_len >= 1024 else 256
        if not has_attention_mask or q_len % multiple == 0:
            return FlashAttentionStrategy.SHARDED_KERNEL
        if not torch.compiler.is_compiling():
            logger.warning("no flash kernel: q_len %d is no multiple of %d", q_len, multiple)
        return FlashAttentionStrategy.NONE
    if q_len >= 4096 or (attn_kernel_enabled is True and q_len >= 512):
        return FlashAttentionStrategy.UNSHARDED_KERNEL
    return FlashAttentionStrategy.NONE


def _with_context_parallelism(
    q_len: int,
    head_dim: int,
    logical_nc_config: int,
    strided: bool,
    sliding_window: int | None,
) -> FlashAttentionStrategy:
    legal = logical_nc_config >= 2 and q_len > head_dim
    if not strided:
        if legal:
            return FlashAttentionStrategy.CONTEXT_PARALLEL_KERNEL
        return FlashAttentionStrategy.NONE
    if not legal or sliding_window is not None:
        raise ConfigError(
            explain(
                "strided_context_parallel_kernel_enabled",
                "be False unless logical_nc_config is 2, q_len exceeds head_dim and there is no "
                "sliding_window",
                f"logical_nc_config {logical_nc_config}, q_len {q_len}, head_dim {head_dim}, "
                f"sliding_window {sliding_window}",
            )
        )
    return FlashAttentionStrategy.STRIDED_CONTEXT_PARALLEL_KERNEL


def warn_of_unbound_kernels(run: NeuronConfig, *, attention_bound: bool = False) -> None:
    """Log which kernels were asked for and are replaced by torch forms of the same function.

    Args:
        run: how the layer is run.
        attention_bound: NKI kernels of prefill and of the decode block can be had here.
    """
    bound = set(BOUND_FIELDS) if attention_bound else set()
    asked = [name for name in KERNEL_FIELDS if getattr(run, name) and name not in bound]
    if asked:
        logger.warning("no NKI kernel is bound: torch forms run for %s", asked)


def resolve_kernel(
    strategy: FlashAttentionStrategy,
    *,
    q_len: int,
    plain: bool,
    device_type: str = "cpu",
    attn_kernel_enabled: bool | None = None,
    nki_obstacle: str | None = "no NKI kernel was asked for",
) -> KernelChoice:
    """Say what computes a prefill for which `strategy` was selected.

    Args:
        strategy: from `get_flash_attention_strategy`.
        q_len: queries on this rank.
        plain: PyTorch's fused attention can compute it (`PrefillRule.plain`).
        device_type: where it runs.
        attn_kernel_enabled: False keeps to the native form.
        nki_obstacle: why nki-library's kernel cannot compute it, or cannot be had; None if it can.

    Returns:
        The first that fits:

        | condition | implementation |
        | --- | --- |
        | `attn_kernel_enabled` is False | NATIVE |
        | no strategy, q_len < NATIVE_LENGTHS | NATIVE |
        | plain, on cpu or cuda | SDPA |
        | a strategy, on neuron, no `nki_obstacle` | NKI |
        | otherwise | FLASH |
    """
    if attn_kernel_enabled is False:
        return _choice(strategy, Implementation.NATIVE, "attn_kernel_enabled is False")
    if strategy is FlashAttentionStrategy.NONE and q_len < NATIVE_LENGTHS:
        return _choice(
            strategy,
            Implementation.NATIVE,
            f"q_len {q_len} is below {NATIVE_LENGTHS}: no kernel pays",
        )
    if plain and device_type in SDPA_DEVICES:
        return _choice(strategy, Implementation.SDPA, "PyTorch's fused attention can express it")
    reason = "the streamed torch form serves every case"
    if device_type == "neuron" and strategy is not FlashAttentionStrategy.NONE:
        if nki_obstacle is None:
            return _choice(strategy, Implementation.NKI, "nki-library's attention_cte serves it")
        reason = f"{reason}; {nki_obstacle}"
    return _choice(strategy, Implementation.FLASH, reason)


def _choice(
    strategy: FlashAttentionStrategy, implementation: Implementation, reason: str
) -> KernelChoice:
    return KernelChoice(strategy=strategy, implementation=implementation, reason=reason)
