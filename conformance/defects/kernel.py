"""A correct flash-style kernel in NumPy, cut into the steps that defects override.

Scores, sums and the running output are float32, weights are stored in the case's dtype before
their product with the values, unnormalised, and the output is divided once and stored. It keeps
to the `flash` profile. With `Problem.dtype` float64 nothing is rounded, so the same rewrite of it
says what the defect computes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from conformance.defects.problem import Problem, Values, rounded


class Partial(NamedTuple):
    """Attention over some of the keys, before its division.

    Attributes:
        mixed: weights times values, `(batch, num_attention_heads, q_len, head_dim)`.
        total: sum of weights, `(batch, num_attention_heads, q_len, 1)`.
        top: largest score, whose exponential both are relative to; -inf if nothing was seen.
    """

    mixed: Values
    total: Values
    top: Values


class Kernel:
    """Attends over tiles of keys; a correct kernel of the `flash` profile."""

    tile = 64

    def __call__(self, problem: Problem) -> Values:
        """Return the output, float64, exact in the problem's dtype, BHSD."""
        with np.errstate(invalid="ignore", over="ignore"):
            whole = self.attended(problem)
            output = self.finished(problem, whole)
            return self.stored(problem, output).astype(np.float64)

    def attended(self, problem: Problem) -> Partial:
        """Attend to all keys."""
        return self.partial(problem, 0, problem.kv_len)

    def partial(self, problem: Problem, first: int, last: int) -> Partial:
        """Attend to the keys from `first` to before `last`, tile by tile."""
        rows = (*problem.q.shape[:-1], 1)
        real = problem.q.dtype
        top = np.full(rows, -np.inf, dtype=real)
        total = np.zeros(rows, dtype=real)
        mixed = np.zeros(problem.q.shape, dtype=real)
        for start in range(first, last, self.tile):
            keys = slice(start, min(start + self.tile, last))
            scores = self.scores(problem, keys)
            new_top = np.maximum(top, scores.max(axis=-1, keepdims=True))
            base = finite(new_top)
            weights = exp(scores - base)
            shrink = exp(top - base)
            total = total * shrink + weights.sum(axis=-1, keepdims=True)
            product = self.cast_weights(problem, weights) @ problem.v[:, :, keys]
            mixed = self.accumulated(problem, mixed * shrink + product)
            top = new_top
        return Partial(mixed, total, top)

    def scores(self, problem: Problem, keys: slice) -> Values:
        """Return scores, scaled, soft-capped, then -inf where masked."""
        products: Values = problem.q @ problem.k[:, :, keys].swapaxes(-1, -2)
        scores = self.capped(problem, products * problem.q.dtype.type(problem.softmax_scale))
        return np.where(problem.visible[..., keys], scores, scores.dtype.type(-np.inf))

    def capped(self, problem: Problem, scores: Values) -> Values:
        """Apply the soft cap, if there is one."""
        if problem.softcap is None:
            return scores
        cap = scores.dtype.type(problem.softcap)
        capped: Values = np.tanh(scores / cap) * cap
        return capped

    def cast_weights(self, problem: Problem, weights: Values) -> Values:
        """Store unnormalised weights for their product with the values."""
        return rounded(weights, problem.dtype)

    def accumulated(self, problem: Problem, mixed: Values) -> Values:
        """Store the running output after a tile."""
        return mixed

    def finished(self, problem: Problem, whole: Partial) -> Values:
        """Add the sink to the sum of weights and divide; zeros where nothing was seen."""
        mixed, total, top = whole
        if problem.sinks is not None:
            base = finite(np.maximum(top, problem.sinks))
            shrink = exp(top - base)
            mixed, total = mixed * shrink, total * shrink + exp(problem.sinks - base)
        divided: Values = mixed / np.where(total == 0, total.dtype.type(1), total)
        return divided

    def stored(self, problem: Problem, output: Values) -> Values:
        """Store the output."""
        return rounded(output, problem.dtype)


def finite(top: Values) -> Values:
    """Return the largest scores, 0 in rows that saw nothing."""
    return np.where(np.isneginf(top), top.dtype.type(0), top)


def exp(values: Values) -> Values:
    """Return the exponential, rounded once; NumPy's own float32 form errs by up to 2 ulps."""
    rounded_once: Values = np.exp(values.astype(np.float64)).astype(values.dtype)
    return rounded_once
