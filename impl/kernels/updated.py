"""Decode over a cache that the step's own tokens are written to first, in place.

Once they are there, all keys lie in one tensor and PyTorch's fused attention reads them where they
are, in their own dtype, for all query heads of a KV head at once: nothing is copied or converted,
and processors with matrix units for 16 bits use them. It knows neither learned sinks nor softcap,
and rounds weights before they are divided by their sum, not after, as it does in prefill.

It computes weights of unused slots too, zeros, and a zero times NaN or infinity is NaN. So NaN in
the result says that an unused slot may hold such a value, and the step is computed again, head by
head. Nor is the cache written first where a token has no slot of its own, or takes that of a key
the step still sees. Both need values of the step, so this form is for eager steps on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from impl.kernels import headwise
from impl.kernels.native import ScoreRule
from impl.kv_cache.token_writes import write_step


def token_generation(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prior_mask: Tensor,
    active_mask: Tensor | None,
    rule: ScoreRule,
    write_slots: Tensor,
) -> Tensor:
    """Write a decode step's keys and values, and attend.

    Args:
        q: `(batch, num_attention_heads, q_len, head_dim)`, BHSD.
        k: keys of this step, `(batch, num_key_value_heads, q_len, head_dim)`, BHSD.
        v: like `k`.
        k_cache: `(batch, num_key_value_heads, slots, head_dim)`, BHSD. Written to.
        v_cache: like `k_cache`.
        prior_mask: `(batch or 1, 1, q_len or 1, slots)`, bool, of the cache as it was.
        active_mask: `(batch or 1, 1, q_len, q_len)`, bool; None is all of it.
        rule: scale; a softcap is not served.
        write_slots: `(batch, q_len)`, int64, slots of the step's tokens, negative for nowhere.

    Returns:
        Like `q`, in its dtype.
    """
    mask = _updated_mask(prior_mask, active_mask, write_slots)
    if mask is not None:  # every token has a slot, so none needs the care of `write_step`
        rows = torch.arange(len(write_slots))[:, None]
        for cache, new in ((k_cache, k), (v_cache, v)):
            cache[rows, :, write_slots] = new.transpose(1, 2)
        heads = _attend(q, k_cache, v_cache, mask, rule.divisor)
        if not heads.isnan().any():
            return heads
    heads = headwise.token_generation(
        q, k, v, k_cache, v_cache, prior_mask, active_mask, None, rule
    )
    if mask is None:
        write_step(k_cache, v_cache, k, v, write_slots)
    return heads


def _updated_mask(prior: Tensor, active: Tensor | None, slots: Tensor) -> Tensor | None:
    """Mask of the cache once the step is written, `(batch, 1, q_len, slots)`.

    None if a token has no slot of its own in it, or the slot of a key that the step sees.
    """
    batch, q_len = slots.shape
    count = prior.shape[3]
    least, most = slots.aminmax()
    if least < 0 or most >= count:
        return None
    if q_len > 1 and (slots[:, :, None] == slots[:, None, :]).sum() > slots.numel():
        return None
    at = slots[:, None, None, :].expand(batch, 1, q_len, q_len)
    mask = prior.expand(batch, 1, q_len, count)
    if mask.gather(3, at).any():
        return None
    own = slots.new_ones(1).bool() if active is None else active
    return mask.scatter(3, at, own.expand(at.shape))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, divisor: float) -> Tensor:
    """Attend to all slots that the mask allows; the query heads of a KV head are rows of one."""
    batch, heads, q_len, width = q.shape
    kv_heads, slots = v.shape[1:3]
    group = heads // kv_heads
    hidden = q.new_zeros(mask.shape).masked_fill(~mask, float("-inf"))
    hidden = hidden[:, :, None].expand(batch, 1, group, q_len, slots)
    out = scaled_dot_product_attention(
        q.reshape(batch, kv_heads, group * q_len, width),
        k,
        v,
        attn_mask=hidden.reshape(batch, 1, group * q_len, slots),
        scale=1.0 / divisor,
    )
    return out.reshape(q.shape)
