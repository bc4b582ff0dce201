"""The streamed softmax and its gradient, tile by tile.

Forward (online softmax): with the running maximum `m`, sum `l` and output `a` of the keys so far,
a tile of scores `s` gives

    m' = max(m, max s),   l' = l exp(m - m') + sum exp(s - m'),
    a' = a exp(m - m') + exp(s - m') V,

and the output is `a / l`. A sink is a key without a value: the sums start at `m = sink, l = 1`.

Backward: with `L = m + log l` and `delta = dO . O`, a row's weights are `p = exp(s - L)` again, and

    dV = p^T dO,   ds = p (dO V^T - delta),   dsink = - sum exp(sink - L) delta.

So no row of scores is ever kept: memory is that of inputs, outputs and one tile. Keys and values
are read from where they are, cached ones and the step's own, and only a tile of them is converted.

Source: Milakov and Gimelshein (2018), arXiv:1805.02867 (online softmax); Dao (2023),
arXiv:2307.08691 (the backward pass by tiles).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from impl.kernels.flash_plan import Tile, TilePlan
from impl.kernels.kept import zero_unless
from impl.precision import compute_dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Factor on a dot product, and the cap that follows it, if any."""

    factor: float
    softcap: float | None

    @property
    def of_queries(self) -> float:
        """What queries are multiplied by, so that their products need no pass of their own."""
        return self.factor / self.unit

    @property
    def unit(self) -> float:
        """Score of a product, or of its tanh, that is 1."""
        return 1.0 if self.softcap is None else self.softcap

    def above(self, level: Tensor, scores: Tensor) -> Tensor:
        """How far scores in units are above a level of each row, in their own memory."""
        if self.softcap is None:
            return scores.sub_(level)
        return torch.add(-level, scores, alpha=self.softcap, out=scores)


@dataclass(frozen=True, kw_only=True, slots=True)
class Keys:
    """Keys and values, cached or of the step, and what data hides of them.

    Attributes:
        k: `(batch, kv_heads, length, head_dim)`, BHSD, or its last two axes exchanged.
        v: `(batch, kv_heads, length, head_dim)`, BHSD.
        mask: `(batch or 1, 1, q_len or 1, length)`, bool, or None.
        positions: `(batch, length)`, integer, where data says them, or None.
        transposed: keys are stored as columns.
    """

    k: Tensor
    v: Tensor
    mask: Tensor | None
    positions: Tensor | None
    transposed: bool

    def rows(self, which: str, first: int, stop: int, *, clean: bool) -> Tensor:
        """Some of the keys ("k") or values ("v"), `(batch * kv_heads, stop - first, head_dim)`.

        Args:
            which: "k" or "v".
            first: first key.
            stop: end.
            clean: zero those that no query sees, whose product with 0 could be NaN.
        """
        if which == "k" and self.transposed:
            part = self.k[:, :, :, first:stop].transpose(2, 3)
        else:
            part = (self.k if which == "k" else self.v)[:, :, first:stop]
        if clean and self.mask is not None:
            seen = self.mask[:, :, :, first:stop]
            seen = seen if seen.shape[2] == 1 else seen.any(dim=2, keepdim=True)
            part = zero_unless(part, seen.transpose(2, 3))
        return part.to(compute_dtype(part.dtype)).flatten(0, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Arguments of one call, apart from the sink and gradients.

    Attributes:
        q: `(batch, heads, q_len, head_dim)`, BHSD.
        step: the step's own keys.
        prior: cached keys, or None.
        chunk_origin: `(batch,)`, integer, or None.
        plan: static geometry.
        scale: of the scores.
    """

    q: Tensor
    step: Keys
    prior: Keys | None
    chunk_origin: Tensor | None
    plan: TilePlan
    scale: Scale

    @property
    def shape(self) -> tuple[int, int, int]:
        """Batch, KV heads, and query heads of each."""
        batch, heads = self.q.shape[:2]
        kv_heads = self.step.k.shape[1]
        return batch, kv_heads, heads // kv_heads

    def keys_of(self, tile: Tile) -> Keys:
        """Cached keys or the step's, whichever the tile is of."""
        if tile.of_prior:
            assert self.prior is not None
            return self.prior
        return self.step

    def tile_rows(self, tensor: Tensor, start: int, end: int) -> Tensor:
        """Queries `start` to `end` of BHSD, `(batch * kv_heads, group * queries, *)`."""
        batch, kv_heads, group = self.shape
        part = tensor[:, :, start:end].to(compute_dtype(tensor.dtype))
        return part.reshape(batch * kv_heads, group * (end - start), tensor.shape[-1])

    def scores(self, rows: Tensor, keys: Tensor, tile: Tile) -> Tensor:
        """Masked scores in units of the scale's, `(batch * kv_heads, group * queries, keys)`."""
        scores = torch.bmm(rows, keys.transpose(1, 2))
        if self.scale.softcap is not None:
            scores.tanh_()
        allowed = self._allowed(tile, scores.device)
        if allowed is not None:
            view = scores.view(*self.shape, tile.end - tile.start, tile.stop - tile.first)
            view.masked_fill_(~allowed.unsqueeze(1), -math.inf)
        return scores

    def _allowed(self, tile: Tile, device: torch.device) -> Tensor | None:
        """Mask of a tile, `(batch or 1, 1, queries or 1, keys)`; None if it hides nothing."""
        keys = self.keys_of(tile)
        allowed = None
        if tile.partial:
            allowed = self.plan.mask(tile, keys.positions, self.chunk_origin, device)
        if keys.mask is None:
            return allowed
        given = keys.mask[:, :, :, tile.first : tile.stop]
        if given.shape[2] > 1:
            given = given[:, :, tile.start : tile.end]
        return given if allowed is None else allowed & given


def _sink_rows(sink: Tensor, rows: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """A sink per row of a tile, `(batch * kv_heads, group * queries, 1)`, in its dtype."""
    batch, kv_heads, group = shape
    length = rows.shape[1] // group
    logits = sink.to(rows.dtype).view(1, kv_heads, group, 1)
    return logits.expand(batch, kv_heads, group, length).reshape(*rows.shape[:2], 1)


def _stream(problem: Problem, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Forward.

    Returns:
        Output like `q` in the compute dtype, and the logsumexp of each row, sink included,
        `(batch, heads, q_len, 1)`; 0 for a row that sees nothing.
    """
    outputs, sums = [], []
    for start, end in problem.plan.q_tiles():
        rows = problem.tile_rows(problem.q, start, end) * problem.scale.of_queries
        if sink is not None:
            largest = _sink_rows(sink, rows, problem.shape)
            total = torch.ones_like(largest)
        else:
            # low enough to vanish beside any score, and finite, so that no difference is NaN
            largest = rows.new_full((*rows.shape[:2], 1), torch.finfo(rows.dtype).min / 2)
            total = torch.zeros_like(largest)
        out, begun = torch.zeros_like(rows), sink is not None
        for tile in problem.plan.kv_tiles(start, end):
            keys = problem.keys_of(tile)
            k_tile = keys.rows("k", tile.first, tile.stop, clean=False)
            v_tile = keys.rows("v", tile.first, tile.stop, clean=True)
            scores = problem.scores(rows, k_tile, tile)
            newest = scores.amax(dim=-1, keepdim=True) * problem.scale.unit
            above = torch.maximum(largest, newest)
            weights = problem.scale.above(above, scores).exp_()
            if begun:
                shrink = torch.exp(largest - above)
                total = total * shrink + weights.sum(dim=-1, keepdim=True)
                out = torch.baddbmm(out.mul_(shrink), weights, v_tile)
            else:  # there is nothing yet to be rescaled
                total, out = weights.sum(dim=-1, keepdim=True), torch.bmm(weights, v_tile)
            largest, begun = above, True
        empty = total == 0
        total = total.masked_fill(empty, 1.0)
        logsumexp = (largest + total.log()).masked_fill(empty, 0.0)
        heads = problem.q.shape[:2]
        outputs.append((out / total).view(*heads, end - start, rows.shape[-1]))
        sums.append(logsumexp.view(*heads, end - start, 1))
    return torch.cat(outputs, dim=2), torch.cat(sums, dim=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class _KeyGradients:
    """Gradients of some keys and values while they are summed, in the compute dtype."""

    k: Tensor
    v: Tensor

    @classmethod
    def zeros(cls, keys: Keys) -> _KeyGradients:
        shape, dtype = keys.v.flatten(0, 1).shape, compute_dtype(keys.v.dtype)
        k, v = (keys.v.new_zeros(shape, dtype=dtype) for _ in range(2))
        return cls(k=k, v=v)

    def of(self, keys: Keys) -> tuple[Tensor, Tensor]:
        """Gradients in the layout and dtype of the keys."""
        k = self.k.view(keys.v.shape)
        k = k.transpose(2, 3) if keys.transposed else k
        return k.to(keys.k.dtype), self.v.view(keys.v.shape).to(keys.v.dtype)


def _stream_gradients(
    problem: Problem, upstream: Tensor, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, _KeyGradients, _KeyGradients | None, Tensor]:
    """Backward.

    Returns:
        Gradient of q; sums for the step's keys and for the cached ones; and `delta` of each row,
        `(batch, heads, q_len, 1)`.
    """
    scale = problem.scale
    d_step = _KeyGradients.zeros(problem.step)
    d_prior = None if problem.prior is None else _KeyGradients.zeros(problem.prior)
    d_queries = []
    delta = (upstream.to(out.dtype) * out).sum(dim=-1, keepdim=True)
    for start, end in problem.plan.q_tiles():
        rows = problem.tile_rows(problem.q, start, end) * scale.of_queries
        d_out, row_sum, row_delta = (
            problem.tile_rows(tensor, start, end) for tensor in (upstream, logsumexp, delta)
        )
        d_rows = torch.zeros_like(rows)
        for tile in problem.plan.kv_tiles(start, end):
            keys, here = problem.keys_of(tile), slice(tile.first, tile.stop)
            k_tile, v_tile = (keys.rows(name, tile.first, tile.stop, clean=True) for name in "kv")
            sums = d_prior if tile.of_prior else d_step
            assert sums is not None
            scores = problem.scores(rows, k_tile, tile)
            tanh = None if scale.softcap is None else scores.clone()
            weights = scale.above(row_sum, scores).exp_()
            sums.v[:, here].baddbmm_(weights.transpose(1, 2), d_out)
            d_scores = torch.bmm(d_out, v_tile.transpose(1, 2)).sub_(row_delta).mul_(weights)
            if tanh is not None:
                assert scale.softcap is not None
                slope = 1 - tanh.masked_fill_(weights == 0, 0.0).square_()
                d_scores = d_scores.mul_(slope).mul_(scale.softcap)
            d_rows.baddbmm_(d_scores, k_tile)
            sums.k[:, here].baddbmm_(d_scores.transpose(1, 2), rows)
        d_rows = (d_rows * scale.of_queries).view(*out.shape[:2], end - start, out.shape[-1])
        d_queries.append(d_rows)
    return torch.cat(d_queries, dim=2).to(problem.q.dtype), d_step, d_prior, delta


class FlashAttention(torch.autograd.Function):
    """Streamed attention with a streamed gradient; `flash_attention` is its front."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_prior: Tensor | None,
        v_prior: Tensor | None,
        sink: Tensor | None,
        mask: Tensor | None,
        prior_mask: Tensor | None,
        prior_positions: Tensor | None,
        chunk_origin: Tensor | None,
        plan: TilePlan,
        scale: Scale,
        k_prior_transposed: bool,
    ) -> Tensor:
        """Attend; the tensors of a `Problem` and the sink one by one."""
        tensors = (q, k, v, k_prior, v_prior, sink, mask, prior_mask, prior_positions, chunk_origin)
        static = (plan, scale, k_prior_transposed)
        out, logsumexp = _stream(_problem(tensors, static), sink)
        ctx.save_for_backward(*tensors, out, logsumexp)
        ctx.static = static
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the tensors, None for the rest."""
        *tensors, out, logsumexp = ctx.saved_tensors
        problem = _problem(tuple(tensors), ctx.static)
        d_q, d_step, d_prior, delta = _stream_gradients(problem, upstream, out, logsumexp)
        d_sink = None
        sink = tensors[5]
        if sink is not None:
            logits = sink.to(out.dtype).view(1, -1, 1, 1)
            d_sink = -(torch.exp(logits - logsumexp) * delta).sum(dim=(0, 2, 3)).to(sink.dtype)
        cached: tuple[Tensor | None, Tensor | None] = (None, None)
        if d_prior is not None and problem.prior is not None:
            cached = d_prior.of(problem.prior)
        return (d_q, *d_step.of(problem.step), *cached, d_sink, *(None,) * 7)


def _problem(tensors: tuple[Tensor | None, ...], static: tuple[TilePlan, Scale, bool]) -> Problem:
    """Put the arguments of `FlashAttention` back in their places."""
    q, k, v, k_prior, v_prior, _, mask, prior_mask, prior_positions, chunk_origin = tensors
    plan, scale, transposed = static
    assert q is not None
    assert k is not None
    assert v is not None
    prior = None
    if k_prior is not None and v_prior is not None:
        prior = Keys(
            k=k_prior,
            v=v_prior,
            mask=prior_mask,
            positions=prior_positions,
            transposed=transposed,
        )
    return Problem(
        q=q,
        step=Keys(k=k, v=v, mask=mask, positions=None, transposed=False),
        prior=prior,
        chunk_origin=chunk_origin,
        plan=plan,
        scale=scale,
    )
