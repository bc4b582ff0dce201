"""Compares what a subject observed with what golden expects, in units of the predicted error.

With `z = (observed - expected) / sigma`, three statistics have a limit each: the largest `z**2`,
the largest mean of `z**2` over a row, and its mean over the whole output. Their limits come from
the Monte Carlo runs of the same case and the run that rounds to nearest: if `m` is the largest
value that `n` draws in each of `K` runs gave, the limit is ::

    base + (m - base) * (1 + log(K / alpha) / log(K n))

which continues an exponential tail from the level `1 / (K n)`, where the runs have seen it, to
`alpha / n`, where one case in `1 / alpha` would pass it by chance. `z**2` of a Gaussian has just
such a tail and rounding errors, being bounded, a shorter one. The base is 0 for a single square,
and for means of squares their mean over the runs.

A row in which every run made no error at all must be matched exactly: a fully masked row, say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from conformance.error_model import ErrorScale, Outputs, RowMask
from golden import Array
from reports.records import Statistic, Worst

FALSE_ALARM_RATE = 1e-6
"""Chance that a correct subject fails a case; a run of 1,000 cases alarms once in 1,000 runs."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """Outcome of comparing one case's outputs.

    Attributes:
        conforms: whether every statistic is within its limit.
        reason: one sentence naming the worst excess, empty when it conforms.
        statistics: every figure with its limit.
        worst: the element furthest from golden in units of its sigma, None if nothing counts.
    """

    conforms: bool
    reason: str
    statistics: tuple[Statistic, ...]
    worst: Worst | None


def judge_outputs(
    observed: Outputs,
    expected: Outputs,
    rows: Mapping[str, RowMask],
    scales: Mapping[str, ErrorScale],
    *,
    extra: tuple[Statistic, ...] = (),
) -> Judgement:
    """Judge every output of a case.

    Args:
        observed: the subject's outputs, float64, finite, shaped like `expected`.
        expected: golden's outputs.
        rows: per output, which rows (all axes but the last) count.
        scales: predicted errors, by output.
        extra: further statistics of the case, measured elsewhere.
    """
    alpha = FALSE_ALARM_RATE / (3 * len(rows))
    statistics = list(extra)
    worst: list[Worst] = []
    for name, counted in rows.items():
        if not counted.any():
            continue
        found, element = _judge_output(
            name, observed[name] - expected[name], counted, scales[name], alpha
        )
        statistics += found
        worst.append(_worst(name, observed[name], expected[name], scales[name], element))
    failed = [statistic for statistic in statistics if statistic.ratio > 1]
    return Judgement(
        conforms=not failed,
        reason=_reason(max(failed, key=lambda s: s.ratio)) if failed else "",
        statistics=tuple(statistics),
        worst=max(worst, key=lambda w: abs(w.z), default=None),
    )


def _judge_output(
    name: str, error: Array, counted: RowMask, scale: ErrorScale, alpha: float
) -> tuple[list[Statistic], tuple[int, ...]]:
    noisy = counted & (scale.row_sigma > 0)
    exact = counted & ~noisy
    z = np.zeros_like(error)
    np.divide(error, scale.sigma, out=z, where=noisy[..., None] & (scale.sigma > 0))
    z[exact] = np.where(error[exact] == 0, 0.0, np.inf)
    element = _index(np.argmax(np.abs(z)), z.shape)

    statistics: list[Statistic] = []
    if exact.any():
        wrong = (error != 0).any(axis=-1) & exact
        statistics.append(
            Statistic(
                output=name,
                name="exact rows",
                value=float(np.count_nonzero(wrong)),
                limit=0.0,
                derivation="rows where no rounding of the profile changes anything match exactly",
                where=_index(np.argmax(wrong), wrong.shape) if wrong.any() else (),
            )
        )
    if noisy.any():
        statistics += _noisy_statistics(name, error, z, noisy, scale, alpha)
    return statistics, element


def _noisy_statistics(
    name: str, error: Array, z: Array, noisy: RowMask, scale: ErrorScale, alpha: float
) -> list[Statistic]:
    mean_square = np.zeros(noisy.shape)
    np.divide(np.square(error).mean(axis=-1), np.square(scale.row_sigma), mean_square, where=noisy)
    magnitude = np.where(noisy[..., None], np.abs(z), 0.0)
    row_runs = scale.row_squares[:, noisy]
    count = int(np.count_nonzero(noisy))
    runs = len(row_runs) - 1
    elements = count * error.shape[-1]
    centre = float(row_runs[:-1].mean())
    return [
        Statistic(
            output=name,
            name="magnitude",
            value=float(magnitude.max()),
            limit=math.sqrt(tail_limit(scale.largest_square, 0.0, elements, alpha)),
            derivation=f"largest |z| of {runs} Monte Carlo runs x {elements} elements, tail "
            f"continued to {alpha:.1e}",
            where=_index(np.argmax(magnitude), magnitude.shape),
        ),
        Statistic(
            output=name,
            name="row spread",
            value=math.sqrt(float(mean_square.max())),
            limit=math.sqrt(tail_limit(row_runs.max(axis=1), centre, count, alpha)),
            derivation=f"largest row RMS of z of {runs} Monte Carlo runs x {count} rows, tail "
            f"continued to {alpha:.1e}",
            where=_index(np.argmax(mean_square), mean_square.shape),
        ),
        Statistic(
            output=name,
            name="spread",
            value=math.sqrt(float(mean_square[noisy].mean())),
            limit=math.sqrt(tail_limit(row_runs.mean(axis=1), centre, 1, alpha)),
            derivation=f"largest overall RMS of z of {runs} Monte Carlo runs, tail continued to "
            f"{alpha:.1e}",
        ),
    ]


def tail_limit(squares: Array, base: float, count: int, alpha: float) -> float:
    """Continue the tail of a squared statistic from what the runs have seen to level `alpha`.

    Args:
        squares: the statistic's largest square of each Monte Carlo run, and of the run that
            rounds to nearest.
        base: its expectation under the model, from which the tail is measured.
        count: values each run drew it from.
        alpha: chance with which a correct subject may exceed the limit.
    """
    runs = len(squares) - 1
    reach = 1.0 + math.log(runs / alpha) / math.log(max(runs * count, 2))
    return base + max(float(squares.max()) - base, 0.0) * reach


def _worst(
    name: str, observed: Array, expected: Array, scale: ErrorScale, index: tuple[int, ...]
) -> Worst:
    error = float(observed[index] - expected[index])
    sigma = float(scale.sigma[index])
    exceeds = math.copysign(math.inf, error) if error else 0.0
    return Worst(
        output=name,
        index=index,
        observed=float(observed[index]),
        expected=float(expected[index]),
        error=error,
        sigma=sigma,
        z=error / sigma if sigma > 0 else exceeds,
    )


def _index(flat: np.intp, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(flat, shape))


def _reason(statistic: Statistic) -> str:
    place = f" at {list(statistic.where)}" if statistic.where else ""
    return (
        f"{statistic.output}: {statistic.name} {statistic.value:.3g}{place} exceeds its limit "
        f"{statistic.limit:.3g} ({statistic.ratio:.3g} times)"
    )
