"""The streamed softmax and its gradient, tile by tile.

Forward (online softmax): with the running maximum `m`, sum `l` and output `a` of the keys so far,
a tile of scores `s` gives

    m' = max(m, max s),   l' = l exp(m - m') + sum exp(s - m'),
    a' = a exp(m - m') + exp(s - m') V,

and the output is `a / l`. A sink is a key without a value: the sums start at `m = sink, l = 1`.

Backward: with `L = m + log l` and `delta = dO . O`, a row's weights are `p = exp(s - L)` again, and

    dV = p^T dO,   ds = p (dO V^T - delta),   dsink = - sum exp(sink - L) delta.

So no row of scores is ever kept: memory is that of inputs, outputs and one tile.

Source: Milakov and Gimelshein (2018), arXiv:1805.02867 (online softmax); Dao (2023),
arXiv:2307.08691 (the backward pass by tiles).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from impl.kernels.flash_plan import TilePlan
from impl.precision import compute_dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class Hidden:
    """What data hides, besides what `TilePlan` knows.

    Attributes:
        key_valid: `(batch, kv_len)`, bool, or None.
        mask: `(batch or 1, 1, q_len, kv_len)`, bool, or None.
        prior_positions: `(batch, prior_len)`, integer, or None.
        chunk_origin: `(batch,)`, integer, or None.
    """

    key_valid: Tensor | None
    mask: Tensor | None
    prior_positions: Tensor | None
    chunk_origin: Tensor | None

    def hide(
        self,
        scores: Tensor,
        plan: TilePlan,
        queries: tuple[int, int],
        keys: tuple[int, int],
        by_position: bool,
    ) -> None:
        """Set to -inf, in place, the scores `(batch, heads, group, queries, keys)` of one tile."""
        allowed = None
        if by_position:
            allowed = plan.mask(
                queries, keys, self.prior_positions, self.chunk_origin, scores.device
            )
        if self.key_valid is not None:
            valid = self.key_valid[:, None, slice(*keys)]
            allowed = valid if allowed is None else allowed & valid
        if self.mask is not None:
            given = self.mask[:, 0, slice(*queries), slice(*keys)]
            allowed = given if allowed is None else allowed & given
        if allowed is not None:
            scores.masked_fill_(~allowed[:, None, None], -math.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Factor on a dot product, and the cap that follows it, if any."""

    factor: float
    softcap: float | None

    @property
    def of_queries(self) -> float:
        """What queries are multiplied by, so that their products need no pass of their own."""
        return self.factor if self.softcap is None else self.factor / self.softcap


def _tile_scores(
    rows: Tensor,
    keys: Tensor,
    plan: TilePlan,
    hidden: Hidden,
    scale: Scale,
    shape: tuple[int, int, int],
    tile: tuple[int, int, int, int, bool],
) -> tuple[Tensor, Tensor | None]:
    """Scores of a tile `(batch * kv_heads, group * queries, keys)`, and tanh of them if capped."""
    start, end, first, stop, by_position = tile
    scores = torch.bmm(rows, keys.transpose(1, 2))
    tanh = None
    if scale.softcap is not None:
        tanh = scores.tanh_()
        scores = tanh * scale.softcap
    view = scores.view(*shape, end - start, stop - first)
    hidden.hide(view, plan, (start, end), (first, stop), by_position)
    return scores, tanh


def _rows(tensor: Tensor, shape: tuple[int, int, int], start: int, end: int) -> Tensor:
    """Queries `start` to `end` of BHSD, in the compute dtype, a group's stacked along the rows."""
    batch, kv_heads, group = shape
    tile = tensor[:, :, start:end].to(compute_dtype(tensor.dtype))
    return tile.reshape(batch * kv_heads, group * (end - start), tensor.shape[-1])


def _flat(tensor: Tensor) -> Tensor:
    """Keys or values of BHSD as `(batch * kv_heads, kv_len, head_dim)`, in the compute dtype."""
    return tensor.to(compute_dtype(tensor.dtype)).flatten(0, 1)


def _sink_rows(sink: Tensor, shape: tuple[int, int, int], length: int) -> Tensor:
    """A sink per row of a tile, `(batch * kv_heads, group * length, 1)`, compute dtype."""
    batch, kv_heads, group = shape
    logits = sink.to(compute_dtype(sink.dtype)).view(1, kv_heads, group, 1)
    return logits.expand(batch, kv_heads, group, length).reshape(
        batch * kv_heads, group * length, 1
    )


def _stream(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    hidden: Hidden,
    plan: TilePlan,
    scale: Scale,
) -> tuple[Tensor, Tensor]:
    """Forward.

    Returns:
        Output like `q` in the compute dtype, and the logsumexp of each row, sink included,
        `(batch, num_attention_heads, q_len)`; 0 for a row that sees nothing.
    """
    batch, heads, _, width = q.shape
    shape = (batch, k.shape[1], heads // k.shape[1])
    keys, values = _flat(k), _flat(v)
    outputs, sums = [], []
    for start, end in plan.q_tiles():
        length = end - start
        rows = _rows(q, shape, start, end) * scale.of_queries
        if sink is not None:
            largest = _sink_rows(sink.to(rows.dtype), shape, length)
            total = torch.ones_like(largest)
        else:
            # low enough to vanish beside any score, and finite, so that no difference is NaN
            largest = rows.new_full((*rows.shape[:2], 1), torch.finfo(rows.dtype).min / 2)
            total = torch.zeros_like(largest)
        out = torch.zeros_like(rows)
        for first, stop, by_position in plan.kv_tiles(start, end):
            tile = (start, end, first, stop, by_position)
            scores, _ = _tile_scores(rows, keys[:, first:stop], plan, hidden, scale, shape, tile)
            above = torch.maximum(largest, scores.amax(dim=-1, keepdim=True))
            shrink = torch.exp(largest - above)
            weights = scores.sub_(above).exp_()
            total = total * shrink + weights.sum(dim=-1, keepdim=True)
            out = torch.baddbmm(out.mul_(shrink), weights, values[:, first:stop])
            largest = above
        empty = total == 0
        total = total.masked_fill(empty, 1.0)
        logsumexp = (largest + total.log()).masked_fill(empty, 0.0)
        outputs.append((out / total).view(batch, heads, length, width))
        sums.append(logsumexp.view(batch, heads, length))
    return torch.cat(outputs, dim=2), torch.cat(sums, dim=2)


def _stream_gradients(
    upstream: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    hidden: Hidden,
    plan: TilePlan,
    scale: Scale,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Backward: gradients of q, k, v and the sink, in their dtypes."""
    batch, heads, _, width = q.shape
    shape = (batch, k.shape[1], heads // k.shape[1])
    keys, values = _flat(k), _flat(v)
    d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
    d_queries = []
    delta = (upstream.to(out.dtype) * out).sum(dim=-1)
    for start, end in plan.q_tiles():
        rows = _rows(q, shape, start, end) * scale.of_queries
        d_out = _rows(upstream, shape, start, end)
        row_sum = _rows(logsumexp.unsqueeze(-1), shape, start, end)
        row_delta = _rows(delta.unsqueeze(-1), shape, start, end)
        d_rows = torch.zeros_like(rows)
        for first, stop, by_position in plan.kv_tiles(start, end):
            tile = (start, end, first, stop, by_position)
            k_tile, v_tile = keys[:, first:stop], values[:, first:stop]
            scores, tanh = _tile_scores(rows, k_tile, plan, hidden, scale, shape, tile)
            weights = scores.sub_(row_sum).exp_()
            d_values[:, first:stop].baddbmm_(weights.transpose(1, 2), d_out)
            d_scores = torch.bmm(d_out, v_tile.transpose(1, 2)).sub_(row_delta).mul_(weights)
            if tanh is not None:
                assert scale.softcap is not None
                d_scores = d_scores.mul_(1 - tanh * tanh).mul_(scale.softcap)
            d_rows.baddbmm_(d_scores, k_tile)
            d_keys[:, first:stop].baddbmm_(d_scores.transpose(1, 2), rows)
        d_queries.append((d_rows * scale.of_queries).view(batch, heads, end - start, width))
    d_sink = None
    if sink is not None:
        logits = sink.to(out.dtype).view(1, heads, 1)
        d_sink = -(torch.exp(logits - logsumexp) * delta).sum(dim=(0, 2)).to(sink.dtype)
    return (
        torch.cat(d_queries, dim=2).to(q.dtype),
        d_keys.view(k.shape).to(k.dtype),
        d_values.view(v.shape).to(v.dtype),
        d_sink,
    )


class FlashAttention(torch.autograd.Function):
    """Streamed attention with a streamed gradient; `flash_attention` is its front."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        key_valid: Tensor | None,
        mask: Tensor | None,
        prior_positions: Tensor | None,
        chunk_origin: Tensor | None,
        plan: TilePlan,
        scale: Scale,
    ) -> Tensor:
        """Attend; arguments as `_stream`, tensors of `Hidden` one by one."""
        hidden = Hidden(
            key_valid=key_valid,
            mask=mask,
            prior_positions=prior_positions,
            chunk_origin=chunk_origin,
        )
        out, logsumexp = _stream(q, k, v, sink, hidden, plan, scale)
        ctx.save_for_backward(
            q, k, v, sink, key_valid, mask, prior_positions, chunk_origin, out, logsumexp
        )
        ctx.plan, ctx.scale = plan, scale
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the tensors, None for the rest."""
        q, k, v, sink, key_valid, mask, prior_positions, chunk_origin, out, logsumexp = (
            ctx.saved_tensors
        )
        hidden = Hidden(
            key_valid=key_valid,
            mask=mask,
            prior_positions=prior_positions,
            chunk_origin=chunk_origin,
        )
        gradients = _stream_gradients(
            upstream, out, logsumexp, q, k, v, sink, hidden, ctx.plan, ctx.scale
        )
        return (*gradients, None, None, None, None, None, None)
