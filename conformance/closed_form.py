"""The error variance of the attention core in closed form, to first order in its roundings.

With `p` the weights, `o` the output, `var_s` the variance of a score (with the relative variance of
its exponential), `var_p` that of a weight as the product with the values reads it, `var_l` that of
the denominator and `var_o` that of storing the output::

    sigma**2 = sum_j p_j**2 var_s_j (v_j - o)**2 + sum_j var_p_j v_j**2 + var_l / l**2 o**2 + var_o

A stage adds the variance that the Monte Carlo runs give it: half that of stochastic rounding; for
the covariance of a row, which has to serve kernels that store weights relative to other scores,
that of a value anywhere between its neighbours. Errors of sums are left out, and so are stages
stored as precisely as sums are accumulated: below the roundings of a coarser output by 2**-13 and
more. Where the output is as fine as sums, `conformance.fine_stages` counts them all. From the same
stages come the derivatives of the output with respect to what moves scores,
`do = sum_j p_j h_j (v_j - o)`, and to a sink.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from conformance.cases import Case
from conformance.error_model import Evaluate
from conformance.fine_stages import CANCELLED, FineStages, Operands, operands_of
from conformance.inputs import CoreInputs
from conformance.pieces import Piece
from conformance.precision import PrecisionProfile
from conformance.stored_variance import rounding_variance
from conformance.sums import narrow
from golden import FORMATS, Accumulation, Array, AttentionConfig
from golden.attention import grouped_matmul
from golden.formats import Format

LONG = 1 << 24
"""Scores from which on a case is long: 4 heads of 2,048 tokens."""


class ClosedForm(NamedTuple):
    """What one evaluation of golden tells about every element.

    Attributes:
        variance: of each element's error, shaped like the output.
        scale: derivative of the output with respect to the logarithm of the softmax scale.
        softcap: likewise the soft cap; zero without.
        sink: with respect to a common shift of all sinks; zero without.
        output: golden's, which comes of the same evaluation.
    """

    variance: Array
    scale: Array
    softcap: Array
    sink: Array
    output: Array


@dataclass(slots=True)
class Stages:
    """Observer that follows the variance of scores and weights from stage to stage.

    Attributes:
        profile: where to round, and to what.
        config: the layer.
        variance: of storing values in a format.
        seen: values of some stages.
        scores: variance of each score, in units of the shifted score.
        weights: variance of each weight as the product with the values reads it.
    """

    profile: PrecisionProfile
    config: AttentionConfig
    variance: Callable[[str, Format, Array], Array]
    seen: dict[str, Array] = field(default_factory=dict)
    scores: Array | float = 0.0
    weights: Array | float = 0.0

    def __call__(
        self, stage: str, value: Array, accumulation: Accumulation | None = None, /
    ) -> Array:
        added, cap = self.stored(stage, value), self.config.softcap
        if stage == "qk":
            self.scores = added * self.config.softmax_scale**2
        elif stage == "shifted_scores" or (stage == "scores" and not self._scales_exactly):
            self.scores = self.scores + added
        elif stage == "softcap_ratio" and cap is not None:
            self.scores = self.scores / cap**2 + added
        elif stage == "softcap_tanh":
            self.scores = self.scores * np.square(1.0 - np.square(value)) + added
        elif stage == "softcap" and cap is not None:
            self.scores = self.scores * cap**2 + added
        elif stage == "exp" and np.ndim(added):
            added = added + np.square(self.profile.exp_ulps * self._ulp(stage, value)) / 3
            relative = np.divide(added, np.square(value), out=np.zeros_like(value), where=value > 0)
            self.scores = self.scores + relative
        elif stage == "unnormalised_weights":
            self.weights = added / np.square(np.where(self._total > 0, self._total, 1.0))
        elif stage == "weights":
            self.weights = self.weights + added
        if stage in ("scores", "softcap_tanh", "exp", "denominator", "weights", "attn"):
            self.seen[stage] = value
        return value

    @property
    def _scales_exactly(self) -> bool:
        """Whether scores are stored products times a power of two, which rounds nothing again."""
        products, scores = (self.profile.stores.get(s, "float64") for s in ("qk", "scores"))
        exact = math.frexp(self.config.softmax_scale)[0] == 0.5
        return exact and FORMATS[scores].precision >= FORMATS[products].precision

    @property
    def _total(self) -> Array:
        return self.seen["denominator"]

    def _ulp(self, stage: str, value: Array) -> Array:
        return FORMATS[self.profile.stores[stage]].ulp(value)

    def stored(self, stage: str, value: Array) -> Array | float:
        """Return the variance of storing a stage; 0 where it is as fine as sums are."""
        stored = self.profile.stores.get(stage, self.profile.accumulation)
        if FORMATS[stored].precision >= FORMATS[self.profile.accumulation].precision:
            return 0.0
        return self.variance(stage, FORMATS[stored], value)


def internal_variance(stages: Stages, v: Array) -> Array:
    """Return the variance of the output before it is stored."""
    p, o, total = (stages.seen[name] for name in ("weights", "attn", "denominator"))
    squared, variance = np.square(v), np.zeros_like(o)
    if np.ndim(stages.scores):
        moved = np.square(p) * stages.scores
        raw = grouped_matmul(moved, squared)
        part = raw - 2 * o * grouped_matmul(moved, v)
        part += np.square(o) * moved.sum(axis=-1, keepdims=True)
        variance += np.where(part > CANCELLED * raw, part, 0.0)  # one key: v - o is 0
    if np.ndim(stages.weights):
        variance += grouped_matmul(np.asarray(stages.weights), squared)
    stored_total = stages.stored("denominator", total)
    if np.ndim(stored_total):
        variance += stored_total / np.square(np.where(total > 0, total, 1.0)) * np.square(o)
    return variance


def is_fine(profile: PrecisionProfile) -> bool:
    """Tell whether outputs are stored as finely as sums, whose errors then show."""
    stored = FORMATS[profile.stores.get("attn", "float64")]
    return stored.precision >= FORMATS[profile.accumulation].precision


def is_long(case: Case, inputs: CoreInputs, profile: PrecisionProfile) -> bool:
    """Tell whether a case is judged by the closed form and sampled rows.

    Not where values repeat, since the bias of rounding to nearest needs all rows to be seen; nor
    where sums show in the output and have a claimed order, which the closed form does not know.
    """
    if case.regime == "integers" or (is_fine(profile) and profile.order):
        return False
    batch, heads, q_len = inputs.q.shape[:3]
    return int(batch * heads * q_len * inputs.k.shape[2]) >= LONG


def closed_form(
    evaluate: Evaluate,
    inputs: CoreInputs,
    config: AttentionConfig,
    profile: PrecisionProfile,
    pieces: Iterable[Piece] = (Piece(),),
) -> ClosedForm:
    """Evaluate the closed form on a case of scope `core`.

    Args:
        evaluate: runs golden; called with `observe=`, `queries=` and `keys=`.
        inputs: of the case.
        config: the layer.
        profile: what the subject claims.
        pieces: all queries in order, with the keys they see.
    """
    operands = operands_of(inputs)
    parts = [
        _piece(evaluate, inputs.v, operands.piece(piece), config, profile, piece)
        for piece in pieces
    ]
    return ClosedForm(*(np.concatenate(part, axis=2) for part in zip(*parts, strict=True)))


def _piece(
    evaluate: Evaluate,
    v: Array,
    operands: Operands,
    config: AttentionConfig,
    profile: PrecisionProfile,
    piece: Piece,
) -> tuple[Array, ...]:
    """Return the fields of the closed form for some queries."""
    stages: Stages | FineStages
    if is_fine(profile):
        stages = FineStages(profile, config, operands)
        evaluate(observe=stages, queries=piece.queries, keys=piece.keys)
        variance = stages.output_variance()
    else:
        stages = Stages(profile, config, lambda stage, form, x: rounding_variance(form, x))
        evaluate(observe=stages, queries=piece.queries, keys=piece.keys)
        internal = internal_variance(stages, v[:, :, piece.keys])
        variance = stages.stored("attn", stages.seen["attn"]) + internal
    p, o = stages.seen["weights"], stages.seen["attn"]
    foremost = p.argmax(axis=-1)[..., None]
    of_sink: Array | float = 0.0
    if config.learned_sinks_size is not None:
        of_sink = 1.0 - p.sum(axis=-1, keepdims=True)

    def moved_by(h: Array) -> Array:
        # All move by as much as the largest weight's score does, which a sink alone withstands, and
        # by what is left, in which the largest weight has no part: float32 then cancels nothing.
        most = np.take_along_axis(h, foremost, axis=-1)
        weighted = narrow(p * (h - most))
        moved = grouped_matmul(weighted, operands.v).astype(np.float64)
        moved -= o * weighted.sum(axis=-1, keepdims=True)
        moved += most * of_sink * o
        return moved

    x, cap = stages.seen["scores"], config.softcap
    by_cap, slope = np.zeros_like(o), x
    if cap is not None:
        ratio = stages.seen["softcap_tanh"]
        slope = x * (1.0 - np.square(ratio))
        by_cap = moved_by(cap * ratio - slope)
    return np.maximum(variance, 0.0), moved_by(slope), by_cap, -o * of_sink, o
