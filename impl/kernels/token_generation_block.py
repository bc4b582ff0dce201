"""A whole decode step as one function of tensors: hidden states to hidden states.

The torch form of what nki-library's `attention_block_tkg` fuses: RMS norm, QKV projection and bias,
norm and rotation of q and k, attention over the cache and the step's own tokens, writing them to
the cache, output projection. Where values are rounded is listed in `impl.kernels.native`; the layer
computes the same function with modules, and both give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from impl.errors import ShapeError, explain
from impl.kernels import updated
from impl.kernels.decode import decode
from impl.kernels.native import ScoreRule
from impl.kv_cache.token_writes import write_step
from impl.norms import RMSNorm, rms_normalize
from impl.rotation import apply_rotary_polar_compatible, apply_rotary_pos_emb
from impl.strategy import Implementation


@dataclass(frozen=True, kw_only=True, slots=True)
class RMSWeight:
    """A root-mean-square norm as values: `(offset + weight) * x / rms(x)`.

    Attributes:
        weight: `(width,)`.
        eps: added to the mean square, before the root.
        offset: added to the weight.
    """

    weight: Tensor
    eps: float
    offset: float = 0.0

    @classmethod
    def of(cls, norm: RMSNorm) -> RMSWeight:
        """The values of a module."""
        return cls(weight=norm.weight, eps=norm.variance_epsilon, offset=norm.weight_offset)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise `(..., width)`; the result has its dtype."""
        normed = rms_normalize(x, self.eps)
        weight = self.weight.to(normed.dtype)
        if self.offset:
            weight = weight + self.offset
        return (normed * weight).to(x.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockWeights:
    """Weights of a decode step, in the layer's dtype.

    Attributes:
        qkv: `((num_attention_heads + 2 * num_key_value_heads) * head_dim, hidden_size)`; rows of q,
            then k, then v.
        output: `(hidden_size, num_attention_heads * head_dim)`.
        qkv_bias: as many as `qkv` has rows, or None.
        output_bias: `(hidden_size,)`, or None.
        input_norm: of the hidden states, or None.
        q_norm: of each query head, or None.
        k_norm: of each key head, or None.
        sink: `(num_attention_heads,)`, or None.
    """

    qkv: Tensor
    output: Tensor
    qkv_bias: Tensor | None = None
    output_bias: Tensor | None = None
    input_norm: RMSWeight | None = None
    q_norm: RMSWeight | None = None
    k_norm: RMSWeight | None = None
    sink: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockRule:
    """What a decode step computes, apart from its tensors.

    Attributes:
        num_key_value_heads: heads of k and v.
        head_dim: width of a head.
        score: scale and softcap.
        norm_after_rope: q and k are normed after their rotation, not before.
        interleaved: pairing of the rotation: neighbours, not halves.
        k_cache_transposed: cached keys are stored as columns.
        implementation: who computes attention, from `impl.decode_strategy.resolve_decode_kernel`;
            SDPA needs `write_slots`.
    """

    num_key_value_heads: int
    head_dim: int
    score: ScoreRule
    norm_after_rope: bool = False
    interleaved: bool = False
    k_cache_transposed: bool = False
    implementation: Implementation = Implementation.NATIVE


class BlockOutput(NamedTuple):
    """Result of a decode step.

    Attributes:
        hidden_states: `(batch, q_len, hidden_size)`.
        k: the step's keys, `(batch, num_key_value_heads, q_len, head_dim)`.
        v: likewise.
    """

    hidden_states: Tensor
    k: Tensor
    v: Tensor


def token_generation_block(
    hidden_states: Tensor,
    weights: BlockWeights,
    rule: BlockRule,
    *,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    prior_mask: Tensor,
    active_mask: Tensor | None = None,
    write_slots: Tensor | None = None,
) -> BlockOutput:
    """Compute a decode step.

    Args:
        hidden_states: `(batch, q_len, hidden_size)`, in the layer's dtype.
        weights: the layer's weights.
        rule: what is computed.
        cos: as `apply_rotary_pos_emb` takes it, or `apply_rotary_polar_compatible` if interleaved;
            None is no rotation.
        sin: likewise; both or neither.
        k_cache: `(batch, num_key_value_heads, slots, head_dim)`, or with its last two axes
            exchanged if `k_cache_transposed`. Changed only if `write_slots` is given.
        v_cache: `(batch, num_key_value_heads, slots, head_dim)`, likewise.
        prior_mask: `(batch or 1, 1, q_len or 1, slots)`, bool, True = attend: slots to read.
        active_mask: `(batch or 1, 1, q_len, q_len)`, bool: which of the step's tokens see each
            other; None is all of it.
        write_slots: `(batch, q_len)`, integer: slots of the caches to write the step's tokens to,
            in place, negative for nowhere; None leaves that to the caller.

    Returns:
        Hidden states, and the step's keys and values.

    Raises:
        ShapeError: weights do not fit the heads, or only one of cos and sin is given.
    """
    batch, q_len, _ = hidden_states.shape
    width, kv_width = rule.head_dim, rule.num_key_value_heads * rule.head_dim
    q_width = weights.qkv.shape[0] - 2 * kv_width
    if q_width <= 0 or q_width % kv_width:
        raise ShapeError(
            explain(
                "qkv",
                f"have a multiple of {kv_width} rows for q beside {2 * kv_width} for k and v",
                tuple(weights.qkv.shape),
            )
        )
    if (cos is None) != (sin is None):
        raise ShapeError(explain("cos and sin", "be given together", "one of them"))
    if write_slots is not None and tuple(write_slots.shape) != (batch, q_len):
        raise ShapeError(
            explain("write_slots", f"have shape {(batch, q_len)}", tuple(write_slots.shape))
        )
    slots = None if write_slots is None else write_slots.to(torch.int64)
    if weights.input_norm is not None:
        hidden_states = weights.input_norm(hidden_states)
    flat = functional.linear(hidden_states, weights.qkv, weights.qkv_bias)
    q, k, v = (
        part.view(batch, q_len, -1, width).transpose(1, 2)
        for part in torch.split(flat, [q_width, kv_width, kv_width], dim=-1)
    )
    if not rule.norm_after_rope:
        q, k = _normed(q, k, weights)
    if cos is not None and sin is not None:
        rotate = apply_rotary_polar_compatible if rule.interleaved else apply_rotary_pos_emb
        q, k = rotate(q, k, cos, sin)
    if rule.norm_after_rope:
        q, k = _normed(q, k, weights)
    if rule.implementation is Implementation.SDPA and slots is not None:
        heads = updated.token_generation(
            q, k, v, k_cache, v_cache, prior_mask, active_mask, rule.score, slots
        )
    else:
        heads = decode(
            q,
            k,
            v,
            k_cache,
            v_cache,
            prior_mask,
            active_mask,
            weights.sink,
            rule.score,
            implementation=rule.implementation,
            k_prior_transposed=rule.k_cache_transposed,
        )
        if slots is not None:
            write_step(k_cache, v_cache, k, v, slots, k_transposed=rule.k_cache_transposed)
    merged = heads.transpose(1, 2).flatten(2)
    output = functional.linear(merged, weights.output, weights.output_bias)
    return BlockOutput(output, k, v)


def _normed(q: Tensor, k: Tensor, weights: BlockWeights) -> tuple[Tensor, Tensor]:
    """Apply the norms of q and k that there are."""
    q = q if weights.q_norm is None else weights.q_norm(q)
    k = k if weights.k_norm is None else weights.k_norm(k)
    return q, k
