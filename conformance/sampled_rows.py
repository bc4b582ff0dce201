"""The error scale of long cases of scope `core`: closed form, limits from some of the rows.

Monte Carlo runs of all rows cost a dozen evaluations of golden. Rows of the core err independently,
so the closed form gives every row's variance, the runs evaluate every `STRIDE`-th query alone, and
what they give over the closed form's variance is the null distribution of the statistics, its tail
continued to all rows. Should the two disagree on the sampled rows, the long way is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

import golden
from conformance.cases import Case
from conformance.closed_form import ClosedForm, closed_form, is_fine
from conformance.directions import output_shifts
from conformance.error_model import FEW_RUNS, ErrorScale, ratio, weighing
from conformance.expected import Reference
from conformance.inputs import CoreInputs
from conformance.pieces import Piece, core_pieces
from conformance.precision import PrecisionProfile
from conformance.rounding_runs import EXCESS, Dither, nearest_runs
from conformance.score_tests import Direction, sampled_score_tests
from conformance.sums import Walk
from golden import FORMATS, Array, AttentionConfig, Observer

STRIDE = 16
"""Queries of which one is evaluated by the Monte Carlo runs."""
AGREEMENT = 0.05
"""Share by which the runs' variance may differ from the closed form's, rows pooled."""


def predict_sampled(
    case: Case, inputs: CoreInputs, expected: Reference, profile: PrecisionProfile, *, seed: int
) -> dict[str, ErrorScale] | None:
    """Predict the error scale of a long case, or None if the closed form does not describe it.

    Args:
        case: that `is_long`.
        inputs: of the case.
        expected: golden's answer; if it has a closed form, then that of this profile.
        profile: what the subject claims.
        seed: of the runs.
    """
    exact, counted = expected.outputs["output"], expected.rows["output"]
    mask = golden.layer_mask(case.config)
    form = expected.form
    if form is None:
        everything = core_pieces(inputs, mask)
        form = closed_form(expected.evaluate, inputs, case.config, profile, everything)
    some = slice(STRIDE // 2, None, STRIDE)
    pieces = core_pieces(inputs, mask, some)
    errors = _errors(expected, case.config, profile, pieces, exact[:, :, some], seed)
    row_variance = form.variance.mean(axis=-1)
    variance = (row_variance[..., None] + form.variance) / 2
    rows = counted & (row_variance > 0)
    chosen = rows[:, :, some]
    drawn = np.square(errors).mean(axis=-1)
    squares = ratio(drawn, row_variance[:, :, some], chosen)
    if not chosen.any() or abs(squares[:FEW_RUNS, chosen].mean() - 1) > AGREEMENT:
        return None
    row_squares = np.zeros((FEW_RUNS + 1, *rows.shape))
    row_squares[:, :, :, some] = squares[: FEW_RUNS + 1]
    sampled = np.zeros(rows.shape, dtype=np.bool_)
    sampled[:, :, some] = True
    largest = [
        ratio(square, variance[:, :, some], chosen[..., None]).max(initial=0.0)
        for square in np.square(errors[: FEW_RUNS + 1])
    ]
    row_sigma = np.sqrt(row_variance)
    tests = sampled_score_tests(
        _directions(case, form, exact),
        errors,
        weighing(row_sigma, exact),
        rows,
        some,
        FEW_RUNS,
        common=is_fine(profile) and profile.exp_ulps > 0,
    )
    scale = ErrorScale(
        row_sigma=row_sigma,
        sigma=np.sqrt(variance),
        row_squares=row_squares,
        largest_square=np.array(largest),
        runs=FEW_RUNS,
        score_tests=tests,
        sampled=sampled,
    )
    return {"output": scale}


def _errors(
    expected: Reference,
    config: AttentionConfig,
    profile: PrecisionProfile,
    pieces: tuple[Piece, ...],
    exact: Array,
    seed: int,
) -> Array:
    """Return errors of the Monte Carlo runs and of those to nearest, piece by piece."""
    fine = is_fine(profile)
    claims = _without_copies(profile, config) if fine else _coarse(profile)
    dithers = [
        Dither(claims, np.random.Generator(np.random.SFC64([seed, run]))) for run in range(FEW_RUNS)
    ]
    found = []
    for piece in pieces:
        walks: dict[str, Walk] = {}
        drawn = [replace(dither, walks=walks) for dither in dithers]
        nearest = nearest_runs(profile, seed)  # these begin anew: alike in every piece
        observers: tuple[Observer, ...] = (*drawn, *nearest)
        runs = [
            expected.evaluate(observe=observer, queries=piece.queries, keys=piece.keys)["output"]
            for observer in observers
        ]
        found.append(np.stack(runs) - exact[:, :, piece.place])
    errors = np.concatenate(found, axis=3)
    errors[:FEW_RUNS] /= EXCESS
    return errors


def _without_copies(profile: PrecisionProfile, config: AttentionConfig) -> PrecisionProfile:
    """Return the profile without storing values again in a format that they have.

    So are exponentials, and stored products times a power of two.
    """
    stores = dict(profile.stores)
    copies = [("exp", "unnormalised_weights")]
    if math.frexp(config.softmax_scale)[0] == 0.5:
        copies.append(("qk", "scores"))
    for first, again in copies:
        if stores.get(first) is not None and stores.get(again) == stores[first]:
            del stores[again]
    return replace(profile, stores=stores)


def _coarse(profile: PrecisionProfile) -> PrecisionProfile:
    """Return the profile without what it stores as finely as it sums.

    The closed form leaves those stages out too: of an output with a significand of 11 bits they
    are 2**-26 of the variance each, times the square of the scores where they round those.
    """
    if profile.operands:  # products then err by more than their format says
        return profile
    finest = FORMATS[profile.accumulation].precision
    stores = {s: name for s, name in profile.stores.items() if FORMATS[name].precision < finest}
    return replace(profile, stores=stores)


def _directions(case: Case, form: ClosedForm, exact: Array) -> Iterator[Direction]:
    constant = 200.0 * FORMATS["float32"].unit_roundoff
    yield Direction("softmax scale", "%", "output", form.scale / 100, slack=constant)
    if case.config.softcap is not None:
        yield Direction("softcap", "%", "output", form.softcap / 100, slack=constant)
    if case.config.learned_sinks_size is not None:
        for head in range(case.config.num_attention_heads):
            part = (slice(None), slice(head, head + 1))
            yield Direction(f"sink of head {head}", "logit", "output", form.sink[part], part)
    yield from output_shifts(case.dtype, "output", exact)
