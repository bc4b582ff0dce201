"""The native torch form of attention, for prefill and for decode.

Where values are rounded. Let *model dtype* be the layer's (`attention_dtype`) and *compute dtype*
float32, or float64 in a float64 layer. "Rounded" means stored in the model dtype; everything not
listed stays in the compute dtype. Matrix products accumulate in the compute dtype or better.

| stage | rounded | note |
| --- | --- | --- |
| input | yes | `hidden_states` cast to the model dtype |
| residual | yes | only where the QKV kernel would add it; in the caller's dtype |
| fused norm | yes | only where that kernel would apply `rmsnorm` |
| q_proj, k_proj, v_proj | yes | product and bias, one rounding (torch's linear) |
| LoRA | yes | low-rank term in the compute dtype, its sum with the projection rounded |
| clip | no | clamping is exact |
| q_norm, k_norm | yes | statistics and weight in the compute dtype, one rounding |
| cos, sin | yes, half pairing | computed in float32; the interleaved pairing keeps float32 |
| q_rope, k_rope | yes | rotation in the compute dtype, one rounding |
| temperature | yes | q only, NoPE layers only |
| cache | no | holds k_rope and v_proj as they are |
| scores | no | products of rounded q and k; divided by `softmax_scale`; softcap; mask |
| exp, row sum, sink | no | prefill and decode alike |
| probs | yes | normalised weights, as input of the product with V |
| attn | yes | one rounding, in decode after prior and active parts are added |
| o_proj | yes | product and bias, one rounding |
| output | yes | cast back to the dtype of the input of `forward` |

Rows that may see no key are zeros, with a sink or without. Values at keys that no row may see are
replaced by zeros, so whatever an unused cache slot holds, NaN included, cannot reach the output.

Grouped-query attention: query head `h` reads key/value head `h // (n / kv)`. The queries of a group
are stacked along the rows of one product, so K and V are never repeated in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from impl.kernels.kept import zero_unless
from impl.precision import compute_dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRule:
    """How a dot product becomes a score.

    Attributes:
        divisor: `softmax_scale` of the module: scores are `q . k / divisor`.
        softcap: scores become `softcap * tanh(scores / softcap)`; None for no cap.
    """

    divisor: float
    softcap: float | None = None


def attention_scores(
    q: Tensor, k: Tensor, rule: ScoreRule, *, k_transposed: bool = False
) -> Tensor:
    """Scores before masking.

    Args:
        q: `(batch, num_attention_heads, q_len, head_dim)`, BHSD.
        k: `(batch, num_key_value_heads, kv_len, head_dim)`, BHSD, or with its last two axes
            exchanged if `k_transposed`.
        rule: scale and softcap.
        k_transposed: keys are stored as columns.

    Returns:
        `(batch, num_key_value_heads, group, q_len, kv_len)`, compute dtype.
    """
    dtype = compute_dtype(q.dtype)
    batch, heads, q_len, head_dim = q.shape
    kv_heads = k.shape[1]
    rows = q.to(dtype).reshape(batch, kv_heads, heads // kv_heads * q_len, head_dim)
    columns = k.to(dtype) if k_transposed else k.to(dtype).transpose(2, 3)
    scores = torch.matmul(rows, columns) / rule.divisor
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    return scores.reshape(batch, kv_heads, heads // kv_heads, q_len, scores.shape[-1])


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Set scores that are not allowed to -inf; `mask` lacks the axis of the group."""
    if mask is None:
        return scores
    return scores.masked_fill(~mask.unsqueeze(1), float("-inf"))


def _softmax(parts: list[Tensor], sink: Tensor | None) -> list[Tensor]:
    """Softmax over the last axes of all parts together, and over the sink if there is one.

    Args:
        parts: masked scores `(batch, kv_heads, group, q_len, *)`.
        sink: logits `(num_attention_heads,)`, or None.

    Returns:
        Weights, shaped like the parts; a row that allows nothing has weights of zero.
    """
    largest = parts[0].amax(dim=-1, keepdim=True)
    for part in parts[1:]:
        largest = torch.maximum(largest, part.amax(dim=-1, keepdim=True))
    logits = None
    if sink is not None:
        kv_heads, group = parts[0].shape[1:3]
        logits = sink.to(largest.dtype).view(1, kv_heads, group, 1, 1)
        largest = torch.maximum(largest, logits)
    largest = largest.masked_fill(largest == float("-inf"), 0.0)
    exps = [torch.exp(part - largest) for part in parts]
    total = exps[0].sum(dim=-1, keepdim=True)
    for e in exps[1:]:
        total = total + e.sum(dim=-1, keepdim=True)
    if logits is not None:
        total = total + torch.exp(logits - largest)
    total = total.masked_fill(total == 0, 1.0)
    return [e / total for e in exps]


def weighted_values(weights: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Sum values by weight.

    Args:
        weights: `(batch, kv_heads, group, q_len, kv_len)`, compute dtype; rounded to v's here.
        v: `(batch, kv_heads, kv_len, head_dim)`, BHSD.
        mask: `(batch or 1, 1, q_len or 1, kv_len)` or None.

    Returns:
        `(batch, num_attention_heads, q_len, head_dim)`, compute dtype.
    """
    batch, kv_heads, group, q_len, kv_len = weights.shape
    if mask is not None:
        v = zero_unless(v, mask.any(dim=2).unsqueeze(-1))
    rows = weights.to(v.dtype).to(weights.dtype).reshape(batch, kv_heads, group * q_len, kv_len)
    out = torch.matmul(rows, v.to(weights.dtype))
    return out.reshape(batch, kv_heads * group, q_len, v.shape[-1])


def context_encoding(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sink: Tensor | None, rule: ScoreRule
) -> Tensor:
    """Attention of a prefill step.

    Args:
        q: `(batch, num_attention_heads, q_len, head_dim)`, BHSD.
        k: `(batch, num_key_value_heads, kv_len, head_dim)`, BHSD.
        v: like `k`.
        mask: `(batch or 1, 1, q_len, kv_len)`, bool, True = attend; None is all of it.
        sink: `(num_attention_heads,)`, or None.
        rule: scale and softcap.

    Returns:
        Like `q`, in its dtype.
    """
    (weights,) = _softmax([masked(attention_scores(q, k, rule), mask)], sink)
    return weighted_values(weights, v, mask).to(q.dtype)


def token_generation(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prior: Tensor,
    v_prior: Tensor,
    prior_mask: Tensor,
    active_mask: Tensor | None,
    sink: Tensor | None,
    rule: ScoreRule,
    *,
    k_prior_transposed: bool = False,
) -> Tensor:
    """Attention of a decode step: cached (prior) and new (active) keys under one softmax.

    Args:
        q: `(batch, num_attention_heads, q_len, head_dim)`, BHSD.
        k: keys of this step, `(batch, num_key_value_heads, q_len, head_dim)`, BHSD.
        v: like `k`.
        k_prior: cached keys, `(batch, num_key_value_heads, cache_len, head_dim)`, or with its last
            two axes exchanged if `k_prior_transposed`.
        v_prior: `(batch, num_key_value_heads, cache_len, head_dim)`.
        prior_mask: `(batch or 1, 1, q_len or 1, cache_len)`, bool.
        active_mask: `(batch or 1, 1, q_len, q_len)`, bool; None is all of it.
        sink: `(num_attention_heads,)`, or None.
        rule: scale and softcap.
        k_prior_transposed: cached keys are stored as columns.

    Returns:
        Like `q`, in its dtype.
    """
    wide = q.to(compute_dtype(q.dtype))  # once, so that the gradient of q is rounded once
    prior = attention_scores(wide, k_prior, rule, k_transposed=k_prior_transposed)
    active = attention_scores(wide, k, rule)
    w_prior, w_active = _softmax([masked(prior, prior_mask), masked(active, active_mask)], sink)
    out = weighted_values(w_prior, v_prior, prior_mask)
    return (out + weighted_values(w_active, v, active_mask)).to(q.dtype)
