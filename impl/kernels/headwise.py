"""Decode in an eager step on the CPU: the cached keys of one head after another.

The function of `impl.kernels.native`, and as precise: cached keys' weights are not rounded, and are
divided by their sum after the product with the values, as in `impl.kernels.flash`. What it saves is
memory traffic. The native form converts all keys and values of a 16-bit cache to float32, and
values to a clean copy before; here a piece of one head's is converted into memory that the next
piece uses again, so that it is multiplied while it is in the processor's own cache, and what there
is of every score is changed in place.

Memory: that piece, and the step's scores.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from impl.kernels import native
from impl.kernels.kept import zero_unless
from impl.kernels.native import ScoreRule
from impl.precision import compute_dtype

PIECE = 1 << 18
"""Elements of a piece, give or take a half: 1 MiB in float32, half of a core's own cache."""


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
    """Attention of a decode step; arguments and result are those of `native.token_generation`."""
    rows = q.to(compute_dtype(q.dtype)) / rule.divisor
    undivided = ScoreRule(divisor=1.0, softcap=rule.softcap)
    prior = _products(rows, k_prior, k_prior_transposed)
    if rule.softcap is not None:
        prior.div_(rule.softcap).tanh_().mul_(rule.softcap)
    prior.masked_fill_(~prior_mask.unsqueeze(1), float("-inf"))
    active = native.masked(native.attention_scores(rows, k, undivided), active_mask)
    total = _exponentials(prior, active, sink)
    out = native.weighted_values(active, v, active_mask)
    _add_values(out, prior, v_prior, prior_mask)
    return (out / total.reshape(*out.shape[:3], 1)).to(q.dtype)


def _products(rows: Tensor, k: Tensor, transposed: bool) -> Tensor:
    """Products of queries and cached keys.

    Args:
        rows: `(batch, num_attention_heads, q_len, head_dim)`, compute dtype.
        k: `(batch, num_key_value_heads, slots, head_dim)`, or its last two axes exchanged.
        transposed: they are.

    Returns:
        `(batch, num_key_value_heads, group, q_len, slots)`, compute dtype, contiguous.
    """
    batch, heads, q_len, head_dim = rows.shape
    kv_heads, slots = k.shape[1], k.shape[3 if transposed else 2]
    group = heads // kv_heads
    products = rows.new_empty(batch * kv_heads, group * q_len, slots)
    pieces = _Pieces(rows, slots, head_dim)
    queries = rows.reshape(products.shape[0], group * q_len, head_dim)
    for part, here, keys in zip(queries, products, k.flatten(0, 1), strict=True):
        for span, room in pieces:
            if transposed:
                columns = room.view(head_dim, -1).copy_(keys[:, span])
            else:
                columns = room.copy_(keys[span]).t()
            torch.mm(part, columns, out=here[:, span])
    return products.view(batch, kv_heads, group, q_len, slots)


def _exponentials(prior: Tensor, active: Tensor, sink: Tensor | None) -> Tensor:
    """Turn masked scores, in place, into exponentials relative to the largest of their row.

    Args:
        prior: `(batch, num_key_value_heads, group, q_len, slots)`.
        active: `(batch, num_key_value_heads, group, q_len, q_len)`.
        sink: `(num_attention_heads,)`, or None.

    Returns:
        Sum of each row, the sink's included, `(batch, num_key_value_heads, group, q_len, 1)`; 1 of
        a row that sees nothing.
    """
    largest = torch.maximum(prior.amax(dim=-1, keepdim=True), active.amax(dim=-1, keepdim=True))
    if sink is not None:
        logits = sink.to(prior.dtype).view(1, *prior.shape[1:3], 1, 1)
        largest = torch.maximum(largest, logits)
    largest.masked_fill_(largest == float("-inf"), 0.0)
    total = torch.zeros_like(largest)
    for scores in (prior, active):
        total += scores.sub_(largest).exp_().sum(dim=-1, keepdim=True)
    if sink is not None:
        total += torch.exp(logits - largest)
    return total.masked_fill_(total == 0, 1.0)


def _add_values(out: Tensor, weights: Tensor, v: Tensor, mask: Tensor) -> None:
    """Add values by weight to what there is.

    Args:
        out: `(batch, num_attention_heads, q_len, head_dim)`, compute dtype, contiguous; changed.
        weights: `(batch, num_key_value_heads, group, q_len, slots)`, compute dtype, contiguous.
        v: `(batch, num_key_value_heads, slots, head_dim)`.
        mask: `(batch or 1, 1, q_len or 1, slots)`.
    """
    batch, kv_heads, slots, head_dim = v.shape
    seen = mask.any(dim=2).expand(batch, 1, slots)[:, 0, :, None]
    sums = out.view(batch, kv_heads, -1, head_dim)
    pieces = _Pieces(out, slots, head_dim)
    for row in range(batch):
        kept = [seen[row, span] for span, _ in pieces]
        heads = zip(sums[row], weights[row].flatten(1, 2), v[row], strict=True)
        for here, by, values in heads:
            for (span, room), tokens in zip(pieces, kept, strict=True):
                clean = zero_unless(room.copy_(values[span]), tokens, reuse=True)
                here.addmm_(by[:, span], clean)


class _Pieces:
    """Slots of one head in pieces of nearly equal lengths, and room for one in a dtype.

    Args:
        like: of the dtype.
        slots: slots of a row.
        head_dim: width of a head.
    """

    def __init__(self, like: Tensor, slots: int, head_dim: int) -> None:
        count = max(1, round(slots * head_dim / PIECE))
        length = -(-slots // count)
        room = like.new_empty(length, head_dim)
        spans = [slice(first, min(first + length, slots)) for first in range(0, slots, length)]
        self._pieces = [(span, room[: span.stop - span.start]) for span in spans]

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the slots of each piece, and the room, `(length, head_dim)`; it is always one."""
        return iter(self._pieces)
