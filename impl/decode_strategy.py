"""What computes the attention of a decode step, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from impl.strategy import FlashAttentionStrategy, Implementation, KernelChoice

NATIVE_CACHE = 1 << 22
"""Elements of a cache's values up to which decode reads it at once, in copies of 16 MiB at most.

That is 4,096 slots of 8 heads of 128 channels: up to there the operators of the tiles cost more
than the copies do.
"""

HEADWISE_SLOTS, HEADWISE_SCORES = 1 << 17, 1 << 22
"""Elements of one head's cached values from which, and scores of a step up to which, it pays to
convert a 16-bit cache head by head: 1,024 slots of 128 channels, and 16 MiB of scores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeStep:
    """What decides who computes the attention of a decode step.

    Attributes:
        batch: rows.
        num_attention_heads: query heads on this rank.
        num_key_value_heads: KV heads on this rank.
        q_len: tokens of a row.
        slots: cached keys of a row, used or not.
        head_dim: width of a head.
        dtype: of the cache as it is read.
        updates: the step's tokens are written to the cache that is read, and PyTorch's fused
            attention could compute the step: keys are stored as rows, without sinks or softcap.
        trains: whether gradients will be asked for.
        device_type: where it runs.
    """

    batch: int
    num_attention_heads: int
    num_key_value_heads: int
    q_len: int
    slots: int
    head_dim: int
    dtype: torch.dtype
    updates: bool = False
    trains: bool = False
    device_type: str = "cpu"

    @property
    def cache_size(self) -> int:
        """Elements of the cached values."""
        return self.batch * self.num_key_value_heads * self.slots * self.head_dim

    @property
    def eager_on_cpu(self) -> bool:
        """Whether it is an eager step on the CPU, of which no graph is needed."""
        graph = self.trains or torch.compiler.is_compiling()
        return not graph and self.device_type == "cpu"

    @property
    def headwise(self) -> bool:
        """Whether it pays to convert the cache head by head."""
        if self.dtype.itemsize != 2:
            return False
        scores = self.batch * self.num_attention_heads * self.q_len * self.slots
        return self.slots * self.head_dim >= HEADWISE_SLOTS and scores <= HEADWISE_SCORES


def resolve_decode_kernel(step: DecodeStep) -> Implementation:
    """Say what computes the attention of a decode step.

    Args:
        step: which.

    Returns:
        The first that fits:

        | condition | implementation |
        | --- | --- |
        | on neuron, whose compiler tiles the whole itself | NATIVE |
        | eager on the CPU, `updates`, and not float64 | SDPA |
        | eager on the CPU, 16 bits, `HEADWISE_SLOTS`, `HEADWISE_SCORES` | HEADWISE |
        | a cache of at most `NATIVE_CACHE` elements | NATIVE |
        | otherwise: nothing as long as the cache is copied | FLASH |
    """
    if step.eager_on_cpu and step.updates and step.dtype != torch.float64:
        return Implementation.SDPA
    if step.eager_on_cpu and step.headwise:
        return Implementation.HEADWISE
    if step.cache_size <= NATIVE_CACHE or step.device_type == "neuron":
        return Implementation.NATIVE
    return Implementation.FLASH


def resolve_block_kernel(
    step: DecodeStep,
    *,
    block_obstacle: str | None = None,
    nki_obstacle: str | None = "no NKI kernel was asked for",
) -> KernelChoice:
    """Say what computes a decode step, and why.

    Args:
        step: which.
        block_obstacle: why the step is not one call of the block; None if it is.
        nki_obstacle: why nki-library's block cannot compute it, or cannot be had; None if it can.

    Returns:
        The first that fits:

        | condition | who |
        | --- | --- |
        | `block_obstacle` | the layer, its attention by `resolve_decode_kernel` |
        | on neuron, no `nki_obstacle` | NKI |
        | otherwise | the block's torch form, its attention likewise |
    """
    torch_form = resolve_decode_kernel(step)
    if block_obstacle is not None:
        return _choice(torch_form, f"the layer computes the step: {block_obstacle}")
    if step.device_type != "neuron":
        nki_obstacle = f"no NKI kernel runs on {step.device_type}"
    if nki_obstacle is None:
        return _choice(Implementation.NKI, "nki-library's attention_block_tkg serves it")
    return _choice(torch_form, f"the block's torch form serves every case; {nki_obstacle}")


def _choice(implementation: Implementation, reason: str) -> KernelChoice:
    return KernelChoice(
        strategy=FlashAttentionStrategy.NONE, implementation=implementation, reason=reason
    )
