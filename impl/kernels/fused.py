"""PyTorch's fused attention, which has no argument for learned sinks, with and without them.

A sink is a key without a value whose score does not depend on the query's content. So it can be
written as a key. Queries and keys get a few channels more, zero everywhere except

    in every query of head h: pieces that sum to `sink_h * divisor / ANCHOR`,
    in one more key, before the others: `ANCHOR` as often, zeros in its first `head_dim` channels,

and that key's product with any query of head h, divided by `divisor`, is the logit; its value is
zeros. A query before the others, of zeros, keeps the diagonal where it was and is dropped.

Each piece is what the pieces before it leave, rounded to the dtype of the queries, so three of
them hold the 24 bits of a float32 logit, and the product sums them in float32. `ANCHOR` is 1, and
256 in float16: up to a divisor of 256 the pieces then reach any logit that float16 holds, and
what its subnormals leave of one, `2^-25 * 256 / divisor`, is below 1e-6 at 64 channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from impl.precision import compute_dtype

WIDEST_ON_CUDA = 256
"""Channels of a head beyond which PyTorch's kernel on cuda holds all scores."""

_PIECES = 3
"""Pieces of a logit at most: 24 bits in pieces of 8, what bfloat16 holds, or of 11."""


def sink_fits(head_dim: int, device_type: str) -> bool:
    """Whether a sink costs no more than its channels.

    Args:
        head_dim: width of a head.
        device_type: where it runs.
    """
    return device_type == "cpu" or _width(head_dim) <= WIDEST_ON_CUDA


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, *, divisor: float, causal: bool, sink: Tensor | None = None
) -> Tensor:
    """Attend with `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        q: `(batch, num_attention_heads, q_len, head_dim)`, BHSD.
        k: `(batch, num_key_value_heads, kv_len, head_dim)`, BHSD.
        v: like `k`.
        divisor: `softmax_scale` of the module: scores are `q . k / divisor`.
        causal: query `r` sees keys 0 to `r`; else all of them.
        sink: `(num_attention_heads,)`, or None.

    Returns:
        Like `q`, in its dtype.
    """
    width = q.shape[3]
    if sink is not None:
        q, k, v = _with_sink(q, k, v, sink, divisor)
    heads = scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=1.0 / divisor, enable_gqa=True
    )
    return heads if sink is None else heads[:, :, 1:, :width]


def _with_sink(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor, divisor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with the channels, the query and the key that a sink needs."""
    batch, heads, q_len, width = q.shape
    anchor = 256.0 if q.dtype == torch.float16 else 1.0
    pieces = _pieces(sink, divisor / anchor, q.dtype)
    added = _width(width) - width
    logits = pad(pieces, (0, added - pieces.shape[1])).view(1, heads, 1, added)
    q = torch.cat([q, logits.expand(batch, heads, q_len, added)], dim=3)
    key = pad(k.new_full((pieces.shape[1],), anchor), (width, added - pieces.shape[1]))
    key = key.expand(batch, k.shape[1], 1, width + added)
    k = torch.cat([key, pad(k, (0, added))], dim=2)
    return pad(q, (0, 0, 1, 0)), k, pad(v, (0, added, 1, 0))


def _pieces(sink: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """Numbers of a dtype that sum to `sink * factor`, `(num_attention_heads, 1 or 3)`."""
    # a sink of -inf is none: so is the least finite number, whose remainder is no NaN
    rest = (sink.to(compute_dtype(dtype)) * factor).clamp(min=torch.finfo(dtype).min)
    pieces = []
    for _ in range(_PIECES if dtype.itemsize == 2 else 1):
        pieces.append(rest.to(dtype))
        rest = rest - pieces[-1].to(rest.dtype)
    return torch.stack(pieces, dim=1)


def _width(head_dim: int) -> int:
    """Channels with those of a sink, in eights, as kernels read them."""
    return -(-(head_dim + _PIECES) // 8) * 8
