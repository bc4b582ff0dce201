"""Compares what a subject observed with what golden expects, in units of the predicted error.

With `z = (observed - expected) / sigma`, these have a limit each: the largest `z**2`; the largest
mean of `z**2` over a row, a head, a KV group and a tile of rows (`row_groups`); its mean over the
whole output; and its projection on what a wrong parameter would do (`score_tests`, with limits of
their own). The others' limits come from the Monte Carlo runs of the same case and those that round
to nearest (`spread_limits`).

A row in which no claimed rounding changes anything must be matched exactly: a fully masked row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from conformance.error_model import ErrorScale, Outputs, RowMask
from conformance.false_alarms import STANDARD
from conformance.row_groups import RowGroup, row_groups, whole
from conformance.spread_limits import pooled_limits, tail_limit
from golden import Array
from reports.records import Statistic, Worst

FALSE_ALARM_RATE = STANDARD.per_case
"""Chance that a correct subject fails a case, unless a run says otherwise."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """Outcome of comparing one case's outputs.

    Attributes:
        statistics: every figure with its limit.
        worst: the element furthest from golden in units of its sigma, None if nothing counts.
        power: smallest error of each parameter that the case finds, by parameter and unit.
    """

    statistics: tuple[Statistic, ...]
    worst: Worst | None
    power: Mapping[str, float] = field(default_factory=dict)

    @property
    def conforms(self) -> bool:
        """Whether every statistic is within its limit."""
        return all(statistic.ratio <= 1 for statistic in self.statistics)

    @property
    def reason(self) -> str:
        """One sentence naming the worst excess, empty when it conforms."""
        if self.conforms:
            return ""
        return _reason(max(self.statistics, key=lambda statistic: statistic.ratio))

    def with_statistics(self, further: tuple[Statistic, ...]) -> Judgement:
        """Return the judgement with statistics measured elsewhere."""
        return replace(self, statistics=(*self.statistics, *further))


def judge_outputs(
    observed: Outputs,
    expected: Outputs,
    rows: Mapping[str, RowMask],
    scales: Mapping[str, ErrorScale],
    *,
    alpha: float = FALSE_ALARM_RATE,
    group_size: int = 1,
) -> Judgement:
    """Judge every output of a case.

    Args:
        observed: the subject's outputs, float64, finite, shaped like `expected`.
        expected: golden's outputs.
        rows: per output, which rows (all axes but the last) count.
        scales: predicted errors, by output.
        alpha: chance that a correct subject fails the case, shared equally by its statistics.
        group_size: query heads per KV head.
    """
    share = alpha / statistic_count(rows, scales, group_size)
    statistics: list[Statistic] = []
    worst: list[Worst] = []
    for name, counted in rows.items():
        if not counted.any():
            continue
        size = group_size if name == "output" else 1
        found, element = _judge_output(
            name, observed[name] - expected[name], counted, scales[name], share, size
        )
        statistics += found
        worst.append(_worst(name, observed[name], expected[name], scales[name], element))
    return Judgement(
        statistics=tuple(statistics),
        worst=max(worst, key=lambda w: abs(w.z), default=None),
        power=_power(scales, share),
    )


def zeros_pass(
    expected: Outputs,
    rows: Mapping[str, RowMask],
    scales: Mapping[str, ErrorScale],
    *,
    alpha: float = FALSE_ALARM_RATE,
    group_size: int = 1,
) -> tuple[str, ...]:
    """Return the outputs that zeros would pass for: the case says nothing about them.

    Takes what `judge_outputs` takes, but for a subject's outputs.
    """
    zeros = {name: np.zeros_like(values) for name, values in expected.items()}
    found = judge_outputs(zeros, expected, rows, scales, alpha=alpha, group_size=group_size)
    told = {statistic.output for statistic in found.statistics if statistic.ratio > 1}
    return tuple(name for name in expected if name not in told)


def _power(scales: Mapping[str, ErrorScale], alpha: float) -> dict[str, float]:
    """Return the smallest error found of each parameter, over the outputs that show it."""
    power: dict[str, float] = {}
    for test in (test for scale in scales.values() for test in scale.score_tests):
        key = f"{test.name} [{test.unit}]" if test.unit else test.name
        power[key] = min(power.get(key, math.inf), test.detectable(alpha))
    return power


def statistic_count(
    rows: Mapping[str, RowMask], scales: Mapping[str, ErrorScale], group_size: int
) -> int:
    """Return how many statistics with a chance of false alarm a case has."""
    return sum(
        3
        + len(row_groups(rows[name].shape, group_size if name == "output" else 1))
        + len(scale.score_tests)
        for name, scale in scales.items()
    )


def _judge_output(
    name: str,
    error: Array,
    counted: RowMask,
    scale: ErrorScale,
    alpha: float,
    group_size: int,
) -> tuple[list[Statistic], tuple[int, ...]]:
    noisy = counted & (scale.row_sigma > 0)
    exact = counted & ~noisy
    error = np.where(counted[..., None], error, 0.0)  # padded rows may hold NaN
    z, mean_square = scale.standardised(error, noisy)
    rounded = np.zeros_like(error) if scale.rounded is None else scale.rounded
    z[exact] = np.where(error[exact] == rounded[exact], 0.0, np.inf)
    element = _index(np.argmax(np.abs(z)), z.shape)

    statistics: list[Statistic] = []
    if exact.any():
        wrong = (error != rounded).any(axis=-1) & exact
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
        statistics += _noisy_statistics(name, mean_square, z, noisy, scale, alpha)
        for group in row_groups(noisy.shape, group_size):
            label = f"{group.name} spread"
            statistics.append(_pooled(label, name, group, mean_square, noisy, scale, alpha))
        statistics += [test.statistic(error, alpha) for test in scale.score_tests]
    return statistics, element


def _noisy_statistics(
    name: str, mean_square: Array, z: Array, noisy: RowMask, scale: ErrorScale, alpha: float
) -> list[Statistic]:
    magnitude = np.where(noisy[..., None], np.abs(z), 0.0)
    drawn = noisy if scale.sampled is None else noisy & scale.sampled
    row_runs = scale.row_squares[:, drawn]
    count, seen = int(np.count_nonzero(noisy)), int(np.count_nonzero(drawn))
    runs = scale.runs
    base = float(row_runs[:runs].mean())
    elements = count * z.shape[-1]
    return [
        Statistic(
            output=name,
            name="magnitude",
            value=float(magnitude.max()),
            limit=math.sqrt(
                tail_limit(
                    scale.largest_square, 0.0, elements, alpha, seen * z.shape[-1], runs=runs
                )
            ),
            derivation=f"largest |z| of {runs} Monte Carlo runs x {elements} elements, tail "
            f"continued to {alpha:.1e}",
            where=_index(np.argmax(magnitude), magnitude.shape),
        ),
        Statistic(
            output=name,
            name="row spread",
            value=math.sqrt(float(mean_square.max())),
            limit=math.sqrt(tail_limit(row_runs.max(axis=1), base, count, alpha, seen, runs=runs)),
            derivation=f"largest row RMS of z of {runs} Monte Carlo runs x {count} rows, tail "
            f"continued to {alpha:.1e}",
            where=_index(np.argmax(mean_square), mean_square.shape),
        ),
        _pooled("spread", name, whole(noisy.shape), mean_square, noisy, scale, alpha),
    ]


def _pooled(
    label: str,
    name: str,
    group: RowGroup,
    mean_square: Array,
    noisy: RowMask,
    scale: ErrorScale,
    alpha: float,
) -> Statistic:
    """Hold the mean square of every group of rows to its limit, and tell the nearest to it."""
    found = group.means(mean_square, noisy)
    sampled = noisy if scale.sampled is None else noisy & scale.sampled
    if scale.covariance is not None:
        labels = np.unique(group.labels[noisy], return_inverse=True)[1]
        limits = pooled_limits(scale.row_squares[:, noisy], scale.runs, labels, alpha)
        how = f"gamma distribution of the mean at {alpha:.1e}"
    else:
        drawn = np.stack([group.means(run, sampled) for run in scale.row_squares])
        base = float(scale.row_squares[: scale.runs, sampled].mean())
        squares, seen = drawn.max(axis=1), drawn.shape[1]
        limit = tail_limit(squares, base, len(found), alpha, seen, runs=scale.runs)
        limits = np.full(len(found), limit)
        how = f"tail of the largest continued to {alpha:.1e}"
    worst = int(np.argmax(found / limits))
    return Statistic(
        output=name,
        name=label,
        value=math.sqrt(float(found[worst])),
        limit=math.sqrt(float(limits[worst])),
        derivation=f"RMS of z over {len(found)} groups of rows in {scale.runs} Monte Carlo runs, "
        f"{how}",
        where=group.first(worst, noisy) if len(found) > 1 else (),
    )


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
