"""Attention temperature: queries of layers without RoPE grow with the logarithm of the position."""

from __future__ import annotations

import torch
from torch import Tensor

from impl.precision import compute_dtype


def scale_queries(q: Tensor, position_ids: Tensor, floor_scale: float, attn_scale: float) -> Tensor:
    """Multiply each query by `log(floor((position + 1) / floor_scale) + 1) * attn_scale + 1`.

    Args:
        q: `(batch, num_attention_heads, seq_len, head_dim)`, BHSD.
        position_ids: `(batch, seq_len)`, integer; counted from 0.
        floor_scale: positions that share one factor.
        attn_scale: weight of the logarithm.

    Returns:
        Like `q`; computed in float32 (float64 for float64) and rounded once.
    """
    dtype = compute_dtype(q.dtype)
    steps = torch.floor((position_ids.clamp(min=0).to(dtype) + 1.0) / floor_scale)
    factor = torch.log1p(steps) * attn_scale + 1.0
    return (q.to(dtype) * factor[:, None, :, None]).to(q.dtype)
