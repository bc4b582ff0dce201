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

What there is of every score is held in float32, at half the time of float64: variances are sums
of positive terms, of which float32 keeps 6 digits, and a scale needs 2. Three things keep it so.

* Weights are relative to the row's largest, times `LIFT`, so that no square that counts is below
  the range of float32: one that vanishes is below `2**-150` of the largest.
* The term of the largest weight is kept apart, in float64, since in `v - o` it cancels.
* `(v - o)**2` of all others is multiplied out. That errs by `2**-22` of the variance that scores
  give to `o` itself, and shows only where all values are alike: scores as wrong as 100 ulps of 1
  then add 3 % of storing `o`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from conformance.inputs import CoreInputs
from conformance.pieces import Piece
from conformance.precision import PrecisionProfile
from conformance.stored_variance import (
    anywhere_variance,
    drawn_variance,
    relative_variance,
    rounding_variance,
    settling_variance,
)
from conformance.sums import accumulation_variance, narrow
from golden import FORMATS, Accumulation, Array, AttentionConfig
from golden.attention import grouped_matmul
from golden.formats import Format

CANCELLED = 2.0**-48
"""Share of a sum of squares below which the square of a difference is roundoff."""
LIFT = 2.0**40
"""Factor on weights whose squares are summed in float32: `LIFT**2` is half its range."""
_NOTHING = -1024.0
"""A score so far below the row's largest that its exponential is 0, in float64 too."""
_KEPT = frozenset({"scores", "softcap_tanh", "exp", "denominator", "weights", "attn"})


class Operands(NamedTuple):
    """What products read, in float32: squares of queries, keys and values, and the values.

    Attributes:
        q_squared: `(batch, num_attention_heads, q_len, head_dim)`.
        k_squared: `(batch, num_key_value_heads, kv_len, head_dim)`.
        v_squared: likewise.
        v: likewise.
    """

    q_squared: Array
    k_squared: Array
    v_squared: Array
    v: Array

    def piece(self, piece: Piece) -> Operands:
        """Return what some queries read."""
        rest = (array[:, :, piece.keys] for array in self[1:])
        return Operands(self.q_squared[:, :, piece.queries], *rest)


def operands_of(inputs: CoreInputs) -> Operands:
    """Return what the products of a case read."""
    q, k, v = (narrow(array) for array in (inputs.q, inputs.k, inputs.v))
    return Operands(np.square(q), np.square(k), np.square(v), v)


@dataclass(slots=True)
class FineStages:
    """Observer that follows variances from stage to stage, those of sums and functions included.

    Attributes:
        profile: where to round, and to what.
        config: the layer.
        operands: what the products read.
        seen: values of some stages.
        scores: variance of each score, with the relative one of its exponential.
        squares: of each weight over the row's largest, times `LIFT**2`; that one's own is 0.
        total: variance of the roundings of the row sum, storing it left out.
        weights: variance of storing each weight, over its square.
        sums: variance of the roundings of the sum of weights times values.
    """

    profile: PrecisionProfile
    config: AttentionConfig
    operands: Operands
    seen: dict[str, Array] = field(default_factory=dict)
    scores: Array | float = 0.0
    squares: Array = field(default_factory=lambda: np.zeros(0))
    total: Array | float = 0.0
    weights: Array | float = 0.0
    sums: Array | float = 0.0
    _foremost: NDArray[np.intp] = field(default_factory=lambda: np.zeros(0, dtype=np.intp))

    def __call__(
        self, stage: str, value: Array, accumulation: Accumulation | None = None, /
    ) -> Array:
        cap = self.config.softcap
        if stage == "qk":
            self.scores = self._summed(stage, value, self._products(accumulation))
            self.scores += self._stored(stage, value)
        elif stage == "scores":
            factor = self.config.softmax_scale
            self.scores *= factor**2
            self.scores += self._times(factor, "qk", stage, value)
        elif stage == "softcap_ratio" and cap is not None:
            self.scores = self.scores / cap**2 + self._times(cap, "scores", stage, value)
        elif stage == "softcap_tanh":
            slope = narrow(np.square(1.0 - np.square(value)))
            errs = self._stored(stage, value) * self._function(stage)
            self.scores = self.scores * slope + errs
        elif stage == "softcap" and cap is not None:
            self.scores = self.scores * cap**2 + self._times(cap, "softcap_tanh", stage, value)
        elif stage == "shifted_scores":
            self._foremost = value.argmax(axis=-1)[..., None]
            self.scores += self._stored(stage, np.maximum(value, _NOTHING))
        elif stage == "exp":
            self._exponentials(value)
        elif stage == "denominator":
            self.total = self._summed(stage, value, accumulation)
        elif stage == "unnormalised_weights" and not self._holds(stage, "exp"):
            self.weights = self._relative(stage, value)
        elif stage == "weights":
            self.weights += self._relative(stage, value)
        elif stage == "attn":
            self.sums = self._mixed(value, accumulation)
        if stage in _KEPT:
            self.seen[stage] = value
        return value

    def output_variance(self) -> Array:
        """Return the variance of every element of the stored output."""
        o, total = self.seen["attn"], self.seen["denominator"]
        total = np.where(total > 0, total, 1.0)
        of_foremost = self._of_foremost(self.scores)
        moved = self.squares * self.scores
        of_others = moved.sum(axis=-1, keepdims=True) / LIFT**2
        along = grouped_matmul(moved, self.operands.v) / LIFT**2
        placed = self._place_foremost(total)
        if np.ndim(self.weights):
            moved += self.squares * self.weights
        squares = grouped_matmul(moved, self.operands.v_squared) / LIFT**2
        variance = np.maximum(squares - 2.0 * o * along + np.square(o) * of_others, 0.0)
        value = self._foremost_value()
        apart = np.square(value - o)
        apart = np.where(apart > CANCELLED * np.square(value), apart, 0.0)  # one key: v - o is 0
        variance += of_foremost * apart + placed * np.square(value)
        variance *= np.square(self._of_foremost(self.seen["weights"]))
        by_total = self.total + self._stored_total(of_foremost, of_others, total)
        variance += by_total / np.square(total) * np.square(o)
        variance += self.sums
        form = self._form("attn")
        stored = 0.0 if form is None else settling_variance(form, o, variance)
        found: Array = variance + stored
        return found

    def _products(self, sums: Accumulation | None) -> Accumulation | None:
        """Return sums of queries times keys whose squares are summed in float32."""
        q, k = self.operands.q_squared, self.operands.k_squared.swapaxes(-1, -2)
        return None if sums is None else replace(sums, squares=lambda: grouped_matmul(q, k))

    def _exponentials(self, value: Array) -> None:
        """Take exponentials: their squares, and the variance that they add to scores' (F2)."""
        largest = self._of_foremost(value)
        found = self._relative("exp", value)
        if np.ndim(found):
            error = self._function("exp")
            first = self._of_foremost(found)
            one = first * (error - 0.375) if error > 1.0 else 0.0 * first
            found *= error
            found_one = np.where(largest == 1.0, one, first * error)
            np.put_along_axis(np.asarray(found), self._foremost, found_one, axis=-1)
        self.scores = found + self.scores
        squares = narrow(value * (LIFT / np.where(largest > 0, largest, 1.0)))
        squares *= squares
        np.put_along_axis(squares, self._foremost, 0.0, axis=-1)
        self.squares = squares

    def _mixed(self, value: Array, sums: Accumulation | None) -> Array | float:
        """Return the variance of the roundings of weights times values."""
        if sums is None:
            return 0.0
        largest = np.square(self._of_foremost(self.seen["weights"]))
        others = largest * grouped_matmul(self.squares, self.operands.v_squared) / LIFT**2
        squares = others + largest * np.square(self._foremost_value())
        sums = replace(sums, squares=lambda: squares, rest=lambda: np.sqrt(others))
        return self._summed("attn", value, sums)

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
        if self._is_fine(form):
            return anywhere_variance(form, narrow(value))
        return rounding_variance(form, value)

    def _relative(self, stage: str, value: Array) -> Array | float:
        """Return the variance of storing values over their squares; anything for zeros."""
        form = self._form(stage)
        if form is None:
            return 0.0
        if self._is_fine(form):
            return relative_variance(form, narrow(value))
        squares = np.where(value > 0, np.square(value), 1.0)
        return narrow(rounding_variance(form, value) / squares)

    def _times(self, factor: float, source: str, stage: str, value: Array) -> Array | float:
        """Return the variance of storing a stored value times a factor: none for powers of two."""
        exact = math.frexp(factor)[0] == 0.5 and self._holds(stage, source)
        return 0.0 if exact else self._stored(stage, value)

    def _of_foremost(self, values: Array | float) -> Array:
        """Return the values of every row's largest score, in float64."""
        values = np.broadcast_to(values, (*self._foremost.shape[:-1], np.shape(values)[-1]))
        found: Array = np.take_along_axis(values, self._foremost, axis=-1)
        return found.astype(np.float64)

    def _foremost_value(self) -> Array:
        """Return what every row's largest score weighs, `(batch, heads, q_len, head_dim)`."""
        v, rows = self.operands.v, self._foremost[..., 0]
        kv_heads = np.arange(rows.shape[1])[:, None] // (rows.shape[1] // v.shape[1])
        found: Array = v[np.arange(len(v))[:, None, None], kv_heads, rows]
        return found.astype(np.float64)

    def _function(self, stage: str) -> float:
        """Return the variance of a function's value, with its own uniform error, over F1."""
        as_sums = self.profile.stores.get(stage) == self.profile.accumulation
        return 1.0 + 4.0 * self.profile.function_ulps(stage) ** 2 if as_sums else 1.0

    def _stored_total(self, first: Array, others: Array, total: Array) -> Array | float:
        """Return the variance of storing the row sum (F3).

        Where the largest exponential is 1 the sum is moved by the others, and by that score's
        error as they are relative to it.

        Args:
            first: variance of the row's largest score.
            others: that of all others, times squares of exponentials over the largest.
            total: the row sum.
        """
        form = self._form("denominator")
        if form is None:
            return 0.0
        largest = self._of_foremost(self.seen["exp"])
        by_first = np.where(largest == 1.0, total - 1.0, total) / total
        before = np.square(largest) * (others + np.square(by_first) * first) + self.total
        return settling_variance(form, self.seen["denominator"], before)

    def _place_foremost(self, total: Array) -> Array | float:
        """Return the variance of the weight of a row's largest score, over its square (F4)."""
        if not np.ndim(self.weights):
            return 0.0
        anywhere = self._of_foremost(self.weights)
        form, sums = self._form("weights"), self._form("denominator")
        if form is None or sums is None or not self._is_fine(form):
            return anywhere
        quotient = 1.0 / sums.nearest(total)
        gap = form.ulp(quotient)
        placed = drawn_variance(np.mod(quotient / gap, 1.0)) * np.square(gap / quotient)
        known = (self._of_foremost(self.seen["exp"]) == 1.0) & (total < 2.0)
        return np.where(known, placed, anywhere)
