"""Variances of the attention core's stages where they are stored as finely as sums accumulate.

In float32 the errors of sums and functions count as much as roundings, and where a value lies
between its neighbours follows from what moved it before:

F1: a value that errors of its own size have moved may lie anywhere: `ulp(x)**2 / 12`.
F2: the exponential of a row's largest score is 1. What a function errs by carries it above 1 or
    below, where the gap is half: `(1 + 1 / 4) / 2` of F1.
F3: a row sum, or an output, is moved before it is stored by as much as is known: by nothing, and
    its place is golden's; by a third of an ulp, and it is anywhere (`settling_variance`).
F4: the weight of a row's largest score, if above one half, lies where 1 over the stored sum does.

A stage coarser than sums is moved by little before it is stored, and keeps golden's place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from conformance.precision import PrecisionProfile
from conformance.stored_variance import (
    anywhere_variance,
    drawn_variance,
    rounding_variance,
    settling_variance,
)
from conformance.sums import accumulation_variance
from golden import FORMATS, Accumulation, Array, AttentionConfig
from golden.attention import grouped_matmul
from golden.formats import Format

CANCELLED = 2.0**-48
"""Share of a sum of squares below which the square of a difference is roundoff."""
_KEPT = frozenset({"scores", "softcap_tanh", "exp", "denominator", "weights", "attn"})


@dataclass(slots=True)
class FineStages:
    """Observer that follows variances from stage to stage, those of sums and functions included.

    Attributes:
        profile: where to round, and to what.
        config: the layer.
        seen: values of some stages.
        scores: variance of each score.
        exps: variance of each exponential beside that.
        total: variance of the roundings of the row sum, storing it left out.
        weights: variance of storing each weight.
        sums: variance of the roundings of the sum of weights times values.
    """

    profile: PrecisionProfile
    config: AttentionConfig
    seen: dict[str, Array] = field(default_factory=dict)
    scores: Array | float = 0.0
    exps: Array | float = 0.0
    total: Array | float = 0.0
    weights: Array | float = 0.0
    sums: Array | float = 0.0
    _foremost: NDArray[np.intp] = field(default_factory=lambda: np.zeros(0, dtype=np.intp))

    def __call__(
        self, stage: str, value: Array, accumulation: Accumulation | None = None, /
    ) -> Array:
        cap = self.config.softcap
        if stage == "qk":
            self.scores = self._summed(stage, value, accumulation)
            self.scores += self._stored(stage, value)
        elif stage == "scores":
            factor = self.config.softmax_scale
            self.scores *= factor**2
            self.scores += self._times(factor, "qk", stage, value)
        elif stage == "softcap_ratio" and cap is not None:
            self.scores = self.scores / cap**2 + self._times(cap, "scores", stage, value)
        elif stage == "softcap_tanh":
            slope = np.square(1.0 - np.square(value))
            self.scores = self.scores * slope + self._function(stage, value)
        elif stage == "softcap" and cap is not None:
            self.scores = self.scores * cap**2 + self._times(cap, "softcap_tanh", stage, value)
        elif stage == "shifted_scores":
            self._foremost = value.argmax(axis=-1)[..., None]
            self.scores += self._stored(stage, np.where(np.isneginf(value), 0.0, value))
        elif stage == "exp":
            self.exps = self._function(stage, value)
        elif stage == "denominator":
            self.total = self._summed(stage, value, accumulation)
        elif stage == "unnormalised_weights" and not self._holds(stage, "exp"):
            total = self.seen["denominator"]
            self.weights = self._stored(stage, value) / np.square(np.where(total > 0, total, 1.0))
        elif stage == "weights":
            self.weights += self._stored(stage, value)
        elif stage == "attn":
            self.sums = self._summed(stage, value, accumulation)
        if stage in _KEPT:
            self.seen[stage] = value
        return value

    def output_variance(self, v: Array) -> Array:
        """Return the variance of every element of the stored output.

        Args:
            v: values, `(batch, num_key_value_heads, kv_len, head_dim)`.
        """
        p, o, total = (self.seen[name] for name in ("weights", "attn", "denominator"))
        total = np.where(total > 0, total, 1.0)
        moved = np.square(p)
        moved *= self.scores
        if np.ndim(self.exps):
            moved += self.exps * (1.0 / np.square(total))
        of_row = moved.sum(axis=-1, keepdims=True)
        along = grouped_matmul(moved, v)
        by_total = self.total + self._stored_total(moved, of_row, total)
        if np.ndim(self.weights):
            self._place_foremost(total)
            moved += self.weights
        squares = grouped_matmul(moved, np.square(v))
        along *= -2.0 * o
        part = squares + along + np.square(o) * of_row
        variance = np.where(part > CANCELLED * squares, part, 0.0)  # one key: v - o is 0
        variance += by_total / np.square(total) * np.square(o)
        variance += self.sums
        form = self._form("attn")
        return variance if form is None else variance + settling_variance(form, o, variance)

    def _form(self, stage: str) -> Format | None:
        """Return the format of a stage; None where it is not rounded."""
        name = self.profile.stores.get(stage, "float64")
        return None if name == "float64" else FORMATS[name]

    def _is_fine(self, form: Format) -> bool:
        return form.precision >= FORMATS[self.profile.accumulation].precision

    def _holds(self, stage: str, source: str) -> bool:
        """Tell whether a stage's format holds what another one stores."""
        form, stored = self._form(stage), self._form(source)
        return form is None or (stored is not None and stored.precision <= form.precision)

    def _summed(self, stage: str, value: Array, sums: Accumulation | None) -> Array | float:
        """Return the variance of a sum's roundings; a coarser store hides them."""
        if sums is None or self.profile.stores.get(stage) != self.profile.accumulation:
            return 0.0
        return accumulation_variance(self.profile, stage, value, sums)

    def _stored(self, stage: str, value: Array) -> Array | float:
        form = self._form(stage)
        if form is None:
            return 0.0
        return (anywhere_variance if self._is_fine(form) else rounding_variance)(form, value)

    def _times(self, factor: float, source: str, stage: str, value: Array) -> Array | float:
        """Return the variance of storing a stored value times a factor: none for powers of two."""
        exact = math.frexp(factor)[0] == 0.5 and self._holds(stage, source)
        return 0.0 if exact else self._stored(stage, value)

    def _of_foremost(self, values: Array) -> Array:
        """Return the values of every row's largest score."""
        found: Array = np.take_along_axis(values, self._foremost, axis=-1)
        return found

    def _function(self, stage: str, value: Array) -> Array | float:
        """Return the variance of storing a function's value and of its own error, uniform (F2)."""
        form, variance = self._form(stage), self._stored(stage, value)
        if form is None or self.profile.stores[stage] != self.profile.accumulation:
            return variance
        error = 1.0 + 4.0 * self.profile.exp_ulps**2
        found: Array = np.asarray(variance)
        found *= error
        if stage == "exp":
            errs = self._of_foremost(found)
            one = errs * (error - 0.375) / error if self.profile.exp_ulps else 0.0 * errs
            found_one = np.where(self._of_foremost(value) == 1.0, one, errs)
            np.put_along_axis(found, self._foremost, found_one, axis=-1)
        return found

    def _stored_total(self, moved: Array, of_row: Array, total: Array) -> Array | float:
        """Return the variance of storing the row sum (F3).

        Where the largest exponential is 1 the sum is moved by the others, and by that score's
        error as they are relative to it.
        """
        form = self._form("denominator")
        if form is None:
            return 0.0
        first = self._of_foremost(moved)
        others = np.maximum(of_row - first, 0.0) * np.square(total)
        one = self._of_foremost(self.seen["exp"]) == 1.0
        before = others + np.square(np.where(one, total - 1.0, total)) * first + self.total
        return settling_variance(form, self.seen["denominator"], before)

    def _place_foremost(self, total: Array) -> None:
        """Give the weight of a row's largest score the variance of its place (F4)."""
        form, sums = self._form("weights"), self._form("denominator")
        if form is None or sums is None or not self._is_fine(form):
            return
        weights = np.asarray(self.weights)
        quotient = 1.0 / sums.nearest(total)
        gap = form.ulp(quotient)
        placed = drawn_variance(np.mod(quotient / gap, 1.0)) * np.square(gap)
        known = (self._of_foremost(self.seen["exp"]) == 1.0) & (total < 2.0)
        placed = np.where(known, placed, self._of_foremost(weights))
        np.put_along_axis(weights, self._foremost, placed, axis=-1)
