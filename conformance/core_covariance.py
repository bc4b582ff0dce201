"""Row covariances of the attention core's errors under a profile, from one evaluation of golden."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from conformance.closed_form import Stages, internal_variance
from conformance.covariance import KEYS, RowCovariance, row_covariance
from conformance.error_model import Evaluate
from conformance.precision import PrecisionProfile
from conformance.stored_variance import unknown_variance
from golden import FORMATS, Array, AttentionConfig
from golden.formats import Format

FIRST_ORDER = 0.1
"""Largest standard deviation of a score for which its exponential is nearly linear: to 5 %."""
_CURVED = 1.1
"""Largest change of an exponential over its first order: (exp(x) - 1) / x at `sqrt(3) / 10`."""
_LEAST = 2.0**-30
"""Standard deviation of a stored element that nothing else moves, at least, in ulps."""
_REPEATED = 0.01
"""Share of weights that occur twice in their row from which values are said to repeat."""
_LOOKED_AT = 64
"""Rows that are looked at for repeated weights."""


@dataclass(frozen=True, slots=True, eq=False)
class CoreCovariance:
    """What one evaluation of golden tells about the errors of a core's output.

    Attributes:
        rows: covariance of every row.
        variance: of every element, shaped like the output.
        noisy: rows whose stored value depends on a rounding of the profile,
            `(batch, num_attention_heads, q_len)`.
        repeats: whether weights of a row repeat, so that their roundings do.
        weights: of the values, `(batch, num_attention_heads, q_len, kv_len)`.
        by_weight: largest variance of each weight under any reference, shaped like `weights`.
        by_score: variance of each weight through that of its score, shaped like `weights`.
        v: the values of each query head, `(batch, num_attention_heads, kv_len, head_dim)`.
        output: exact.
        rounded: error of storing the exact output to nearest.
        stored: `ulp**2 / 12` of the output.
    """

    rows: RowCovariance
    variance: Array
    noisy: NDArray[np.bool_]
    repeats: bool
    weights: Array
    by_weight: Array | None
    by_score: Array | None
    v: Array
    output: Array
    rounded: Array
    stored: Array

    def bound(self, w: Array, part: tuple[slice, ...]) -> float:
        """Return the standard deviation of `<w, error>` from the size of every rounding.

        Args:
            w: shaped like `output[part]`.
            part: leading slices of the output.
        """
        variance = float((np.square(w) * self.stored[part]).sum())
        along = w @ self.v[part[:2]].swapaxes(-1, -2)
        if self.by_weight is not None:
            variance += float((np.square(along) * self.by_weight[part]).sum())
        if self.by_score is not None:
            along = along - (w * self.output[part]).sum(axis=-1, keepdims=True)
            variance += _CURVED**2 * float((np.square(along) * self.by_score[part]).sum())
        return math.sqrt(variance)


def core_covariance(
    evaluate: Evaluate, v: Array, config: AttentionConfig, profile: PrecisionProfile
) -> CoreCovariance | None:
    """Return the covariances, or None where the closed form does not describe the errors.

    That is where the output is stored as finely as sums are, whose errors it leaves out, and where
    roundings move a score by so much that its exponential is not linear.

    Args:
        evaluate: runs golden; called with `observe=`.
        v: values, `(batch, num_key_value_heads, kv_len, head_dim)`.
        config: the layer.
        profile: what the subject claims.
    """
    form = FORMATS[profile.stores.get("attn", "float64")]
    if form.precision >= FORMATS[profile.accumulation].precision:
        return None
    stages = Stages(profile, config, unknown_variance)
    evaluate(observe=stages)
    p, o = stages.seen["weights"], stages.seen["attn"]
    if np.ndim(stages.scores):
        # exponentials of what weighs little may be as wrong as they like
        told = np.where(p > 2.0**-10, stages.scores, 0.0)
        if float(told.max(initial=0.0)) > FIRST_ORDER**2:
            return None
    internal = internal_variance(stages, v)
    stored = _stored(form, o, internal)
    finer = _finer(stages, v, p, o)
    noisy: NDArray[np.bool_] = np.any(internal + stored > 0, axis=-1)
    noisy &= ~_settled(form, o, internal + finer)
    columns = _columns(stages, v, p, o)
    explained = np.square(columns).sum(axis=-2)
    rest = np.maximum(internal - explained, 0.0) + stored + finer
    diagonal = np.where(noisy[..., None], rest, 1.0)
    by_weight = None
    if np.ndim(stages.weights):
        half = _largest_half_ulp(profile) * p
        by_weight = np.where(np.asarray(stages.weights) > 0, np.square(half) / 3, 0.0)
    return CoreCovariance(
        rows=row_covariance(diagonal, np.where(noisy[..., None, None], columns, 0.0)),
        variance=np.where(noisy[..., None], explained + rest, 0.0),
        noisy=noisy,
        repeats=_repeats(stages.seen["exp"]),
        weights=p,
        by_weight=by_weight,
        by_score=np.square(p) * stages.scores if np.ndim(stages.scores) else None,
        v=v.repeat(config.group_size, axis=1),
        output=o,
        rounded=form.nearest(o) - o,
        stored=np.where(noisy[..., None], form.ulp(o) ** 2 / 12, 0.0),
    )


def _largest_half_ulp(profile: PrecisionProfile) -> float:
    """Return half an ulp of a weight, as a share of it, at the low end of a binade."""
    stored = (profile.stores.get(stage) for stage in ("unnormalised_weights", "weights"))
    units = (FORMATS[form].unit_roundoff for form in stored if form is not None)
    return sum(units)


def _settled(form: Format, o: Array, internal: Array) -> NDArray[np.bool_]:
    """Tell which rows are stored as golden's value is, whatever the profile's roundings do.

    No element is so near to a tie that 64 standard deviations, or a few roundings of float32 that
    a subject does besides, would carry it over.
    """
    room = form.ulp(o) / 2 - np.abs(form.nearest(o) - o)
    besides = 2.0**-20 * np.abs(o)
    settled: NDArray[np.bool_] = np.all(room > np.maximum(64 * np.sqrt(internal), besides), axis=-1)
    return settled


def _stored(form: Format, o: Array, internal: Array) -> Array:
    """Return the variance of the output's own rounding, given how far it is moved before.

    Moved by nothing, the output is rounded by a known amount; moved by a third of an ulp, by any
    amount alike. Between the two the first term of the Fourier series of `E r(y + d)**2`, for the
    error `r` of rounding and `d` normal, decays by `exp(-2 pi**2 variance / ulp**2)`.
    """
    ulp = form.ulp(o)
    known = np.square(form.nearest(o) - o)
    share = np.exp(-2 * np.pi**2 * internal / ulp**2)
    variance = share * known + (1 - share) * ulp**2 / 12
    stored: Array = np.where((internal > 0) | (known > 0), np.maximum(variance, 0.0), 0.0)
    return np.where(stored > 0, np.maximum(stored, (_LEAST * ulp) ** 2), 0.0)


def _columns(stages: Stages, v: Array, p: Array, o: Array) -> Array:
    """Return what the roundings of each row's foremost keys do, `(rows..., columns, head_dim)`."""
    group = p.shape[1] // v.shape[1]
    spread = np.square(v).sum(axis=-1).repeat(group, axis=1)[:, :, None]
    by_weight = np.asarray(stages.weights) if np.ndim(stages.weights) else None
    by_score = np.square(p) * stages.scores if np.ndim(stages.scores) else None
    if by_weight is None and by_score is None:
        return np.zeros((*p.shape[:-1], 1, v.shape[-1]))
    energy = sum(part for part in (by_weight, by_score) if part is not None) * spread
    keys = min(KEYS, p.shape[-1])
    foremost = np.argpartition(-energy, keys - 1, axis=-1)[..., :keys]
    heads = np.arange(p.shape[1])[None, :, None, None] // group
    values = v[np.arange(len(v))[:, None, None, None], heads, foremost]
    found = []
    if by_weight is not None:
        weight = np.take_along_axis(by_weight, foremost, axis=-1)
        found.append(values * np.sqrt(weight)[..., None])
    if by_score is not None:
        score = np.take_along_axis(by_score, foremost, axis=-1)
        found.append((values - o[..., None, :]) * np.sqrt(score)[..., None])
    return np.concatenate(found, axis=-2)


def _finer(stages: Stages, v: Array, p: Array, o: Array) -> Array:
    """Return a variance for the float32 roundings that the form leaves out: a few of each score.

    Errors of scores move the output by `sum_j p_j d_j (v_j - o)`, at most by the largest one times
    twice what the largest weight leaves and the spread of the values.
    """
    score = np.where(p > 0, np.abs(stages.seen["scores"]), 0.0).max(axis=-1, keepdims=True)
    left = 2.0 * np.clip(1.0 - p.max(axis=-1, keepdims=True), 0.0, 0.5)
    group = o.shape[1] // v.shape[1]
    largest = np.abs(v).max(axis=(-1, -2)).repeat(group, axis=1)[:, :, None, None]
    unit = FORMATS[stages.profile.accumulation].unit_roundoff
    variance: Array = np.square(unit * (4.0 + score) * left * largest) + 2.0**-252 + 0.0 * o
    return variance


def _repeats(exps: Array) -> bool:
    rows = exps.reshape(-1, exps.shape[-1])
    rows = rows[:: max(len(rows) // _LOOKED_AT, 1)]
    values = [row[(row > 0) & (row < 1)] for row in rows]
    repeated = sum(len(row) - len(np.unique(row)) for row in values)
    return repeated > _REPEATED * max(sum(map(len, values)), 1)
