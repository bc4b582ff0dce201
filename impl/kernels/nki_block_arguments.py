"""What nki-library's `attention_block_tkg` is called with for a decode step.

The kernel writes the step's keys to the cache itself, or returns them and leaves the cache alone:
it is called the second way, which changes nothing, so that the cache manager writes as it does
after the torch form.

The kernel reads cached keys and the step's own under one mask and puts the step's in the **last**
slots it is shown, which are therefore never read as a cache. A row that would need one of them
comes out as NaN, because to look before the step would wait for the device; `has_free_tail` in
`impl.kernels.nki_block_limits` says which caches never do. Unlike the torch form it multiplies
every value by its weight, so a NaN in an unused slot reaches the output; the cache manager's slots
start as zeros.

Weights are handed over transposed, as the kernel reads them: that is a copy in each step unless the
compiler of the graph keeps it.

Source: aws-neuron/nki-library, `src/nkilib_src/nkilib/experimental/transformer/
attention_block_tkg.py` (commit 0759719), its docstring, and `_attention_tkg_fwd_ref` of
`core/attention/attention_tkg_torch.py` (same commit) for the mask's last slots; the sink's shape as
the later text of the same docstring has it, one logit a query head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from impl.errors import ShapeError, explain
from impl.kernels.token_generation_block import BlockRule, BlockWeights, RMSWeight
from impl.precision import compute_dtype


class BlockCall(NamedTuple):
    """One call of `attention_block_tkg`; the names are the kernel's where it has one.

    Attributes:
        X: `(batch, q_len, hidden_size)`.
        rmsnorm_X_gamma: `(1, hidden_size)`, or None for no norm.
        W_qkv: `(hidden_size, (q_heads + 2) * head_dim)`; columns of q, then k, then v.
        bias_qkv: `(1, (q_heads + 2) * head_dim)`, or None.
        norm_W_Q: `(1, head_dim)`, weight of q's norm, or None for none.
        norm_W_K: likewise of k's.
        cos: `(head_dim / 2, batch, q_len)`, or None for no rotation.
        sin: like `cos`.
        K_cache: `(batch, 1, slots, head_dim)`, or with its last two axes exchanged.
        V_cache: `(batch, 1, slots, head_dim)`.
        attention_mask: `(slots, batch, q_heads, q_len)`, uint8, 1 = attend; the last `q_len` slots
            are the step's tokens.
        sink: `(q_heads, 1)`, or None.
        W_out: `(q_heads * head_dim, hidden_size)`.
        bias_out: `(1, hidden_size)`, or None.
        rmsnorm_X_eps: of the norm of X.
        norm_eps: of the norms of q and k.
        norm_after_rope: these come after the rotation.
        rope_contiguous_layout: channels turn in halves, not as neighbours.
        K_cache_transposed: keys are stored as columns.
        softmax_scale: a factor of the scores.
    """

    X: Tensor
    rmsnorm_X_gamma: Tensor | None
    W_qkv: Tensor
    bias_qkv: Tensor | None
    norm_W_Q: Tensor | None
    norm_W_K: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    K_cache: Tensor
    V_cache: Tensor
    attention_mask: Tensor
    sink: Tensor | None
    W_out: Tensor
    bias_out: Tensor | None
    rmsnorm_X_eps: float
    norm_eps: float
    norm_after_rope: bool
    rope_contiguous_layout: bool
    K_cache_transposed: bool
    softmax_scale: float


def joint_mask(
    prior_mask: Tensor, active_mask: Tensor, slots: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One mask of cached keys and the step's own, these in the last slots.

    The kernel divides by the sum of a token's weights, so one that sees nothing sees itself here.

    Args:
        prior_mask: `(batch or 1, 1, q_len or 1, slots)`, bool, True = attend. Not changed.
        active_mask: `(batch or 1, 1, q_len, q_len)`, bool. Not changed.
        slots: slots of the cache.

    Returns:
        The mask, `(batch or 1, 1, q_len, slots)`, bool; whether each token saw anything,
        `(batch or 1, q_len)`; and whether each row wants a slot that the step's tokens take,
        `(batch or 1,)`.

    Raises:
        ShapeError: the step is longer than the cache.
    """
    q_len = active_mask.shape[2]
    if q_len > slots:
        raise ShapeError(explain("active_mask", f"be of at most {slots} tokens", q_len))
    batch = max(prior_mask.shape[0], active_mask.shape[0])
    cached = prior_mask[..., : slots - q_len].expand(batch, 1, q_len, slots - q_len)
    active = active_mask.expand(batch, 1, q_len, q_len)
    sees = cached.any(dim=3) | active.any(dim=3)
    itself = torch.eye(q_len, dtype=torch.bool, device=active.device)
    mask = torch.cat([cached, active | (itself & ~sees[..., None])], dim=3)
    return mask, sees[:, 0], prior_mask[..., slots - q_len :].flatten(1).any(dim=1)


def attention_block_tkg_call(
    hidden_states: Tensor,
    weights: BlockWeights,
    rule: BlockRule,
    *,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    mask: Tensor,
) -> BlockCall:
    """Arguments of `attention_block_tkg` for a decode step.

    Args:
        hidden_states: as `impl.kernels.token_generation_block` takes it, like the rest.
        weights: see there.
        rule: see there.
        cos: see there.
        sin: see there.
        k_cache: see there.
        v_cache: see there.
        mask: `(batch or 1, 1, q_len, slots)`, bool, from `joint_mask`.
    """
    batch = hidden_states.shape[0]
    half = rule.head_dim // 2
    heads = weights.output.shape[1] // rule.head_dim
    norms = (weights.q_norm, weights.k_norm)
    return BlockCall(
        X=hidden_states.contiguous(),
        rmsnorm_X_gamma=_gamma(weights.input_norm, hidden_states.dtype),
        W_qkv=weights.qkv.t().contiguous(),
        bias_qkv=_line(weights.qkv_bias),
        norm_W_Q=_gamma(weights.q_norm, hidden_states.dtype),
        norm_W_K=_gamma(weights.k_norm, hidden_states.dtype),
        cos=_table(cos, batch, half),
        sin=_table(sin, batch, half),
        K_cache=k_cache.contiguous(),
        V_cache=v_cache.contiguous(),
        attention_mask=mask.expand(batch, heads, -1, -1)
        .permute(3, 0, 1, 2)
        .to(torch.uint8)
        .contiguous(),
        sink=None if weights.sink is None else weights.sink[:, None],
        W_out=weights.output.t().contiguous(),
        bias_out=_line(weights.output_bias),
        rmsnorm_X_eps=0.0 if weights.input_norm is None else weights.input_norm.eps,
        norm_eps=next((norm.eps for norm in norms if norm is not None), 0.0),
        norm_after_rope=rule.norm_after_rope,
        rope_contiguous_layout=not rule.interleaved,
        K_cache_transposed=rule.k_cache_transposed,
        softmax_scale=1.0 / rule.score.divisor,
    )


def _gamma(norm: RMSWeight | None, dtype: torch.dtype) -> Tensor | None:
    """The weight of a norm with its offset in it, which the kernel would not add, `(1, width)`."""
    if norm is None:
        return None
    weight = norm.weight
    if norm.offset:
        weight = weight.to(compute_dtype(dtype)) + norm.offset
    return weight.to(dtype)[None, :]


def _line(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias[None, :]


def _table(values: Tensor | None, batch: int, half: int) -> Tensor | None:
    """Cosines or sines of the turning pairs, `(head_dim / 2, batch, q_len)`."""
    if values is None:
        return None
    return values[..., :half].expand(batch, -1, -1).permute(2, 0, 1).contiguous()
