"""Score tests: is there a parameter whose small change explains part of the error?

With `g` the derivative of an output with respect to a parameter and `sigma` the error scale of its
rows, the statistic is ::

    T = <e / sigma, g / sigma> / ||g / sigma||  =  <w, e>,    w = g / sigma**2 / ||g / sigma||

and `T / ||g / sigma||` is the weighted least-squares estimate of how far the parameter is off. A
correct subject's `T` has mean 0. Its variance is not 1, since roundings of shared values move many
elements at once, but the Monte Carlo runs are draws of the same errors, so their `T_k` tell it:

* in general by `s**2 = mean T_k**2`, with as many degrees of freedom as runs;
* where rows err independently, `T_k` is a sum of independent parts `t_kr`, one a row, and
  `s**2 = mean_k sum_r t_kr**2` has Satterthwaite's `(sum_r v_r)**2 / sum_r v_r**2` times as many,
  `v_r = mean_k t_kr**2`: some thousands. It is taken back where the `T_k` themselves contradict it.

Where the covariance `Sigma` of a row's errors is known, `w = Sigma**-1 g / sqrt(g^T Sigma**-1 g)`,
which no other weights beat in power, and `T` of variance 1 but for what `Sigma` leaves out.

The limit is `t s + bias + slack ||g / sigma||`: Student's quantile for a new draw of mean 0; a bias
as told by the runs that round to nearest; and what a constant held in float32 may be off by. Where
many values are equal their roundings are, and the bias has a size of its own: twice the largest
`|T_n|` of those runs. Else those `T_n` are draws like all others, and no limit is below 1.25 of
one. `t s` rests on few rows where few err; then a bound from the size of every rounding may be
lower: of variance `b**2` and each bounded and uniform, their sum exceeds `b sqrt(2 log(2 / alpha))`
with chance `alpha` at most (Hoeffding 1963).

Source: Rao (1948), Proc. Camb. Phil. Soc. 44, for score tests; Satterthwaite (1946), Biometrics
Bulletin 2(6), for the degrees of freedom; Hoeffding (1963), J. Am. Stat. Assoc. 58, for the bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtri, stdtrit

from conformance.covariance import RowCovariance
from golden import Array
from reports.records import Statistic

_NEAREST = 1.25
"""How far a limit lies above what correct subjects were seen to reach, at least."""
_FEW = 200.0
"""Degrees of freedom from which on Student's tail is near the normal one, and bounds are not."""
_CONTRADICTED = 1e-3
"""Chance of independent rows to be taken for dependent ones, which costs power alone."""


@dataclass(frozen=True, slots=True, eq=False)
class Direction:
    """How one parameter moves one output.

    Attributes:
        name: of the parameter, such as `softmax scale` or `sink of head 3`.
        unit: in which its error is told: `%`, `logit`, `position`, `ulp`, or empty.
        output: name of the output.
        slope: change of that output per unit, shaped like `output[part]`.
        part: leading slices that cut out where the slope is not zero; empty is everywhere.
        slack: units by which a correct subject's own constant may be off.
    """

    name: str
    unit: str
    output: str
    slope: Array
    part: tuple[slice, ...] = ()
    slack: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class ScoreTest:
    """One direction, ready to project errors on.

    Attributes:
        name: of the parameter.
        unit: of its error.
        output: name of the output.
        part: leading slices of the output that `weights` covers.
        weights: `g / sigma / ||g / sigma||`, float32, zero in rows that do not count.
        inverse: `1 / sigma` of each row.
        norm: `||g / sigma||`: `T` per unit of the parameter.
        spread: `s` above.
        freedom: its degrees of freedom.
        nearest: the largest `|T|` of the runs that round to nearest.
        slack: units by which a correct subject's constant may be off.
        runs: Monte Carlo runs behind it.
        repeats: whether values repeat, so that the runs to nearest have a bias of their own.
        bound: standard deviation of `T` from the size of every rounding; infinite if unknown.
    """

    name: str
    unit: str
    output: str
    part: tuple[slice, ...]
    weights: NDArray[np.float32]
    inverse: Array
    norm: float
    spread: float
    freedom: float
    nearest: float
    slack: float
    runs: int
    repeats: bool = True
    bound: float = math.inf

    def limit(self, alpha: float) -> float:
        """Return what `|T|` of a correct subject exceeds with chance `alpha`."""
        reach = -float(stdtrit(self.freedom, alpha / 2)) * self.spread
        if self.repeats:
            reach += 2 * self.nearest
        else:
            reach = min(reach, self.bound * math.sqrt(2 * math.log(2 / alpha)))
            reach = max(reach, _NEAREST * self.nearest)
        return reach + self.slack * self.norm

    def detectable(self, alpha: float) -> float:
        """Return the error of the parameter, in its unit, that is found in half of all draws."""
        return self.limit(alpha) / self.norm

    def statistic(self, error: Array, alpha: float) -> Statistic:
        """Hold a subject's error, shaped like the output, to the limit."""
        projected = float(row_parts(self.weights, self.inverse, error[self.part]).sum())
        unit = f" {self.unit}" if self.unit and self.unit != "%" else self.unit
        return Statistic(
            output=self.output,
            name=f"score: {self.name}",
            value=abs(projected),
            limit=self.limit(alpha),
            derivation=f"estimated off by {projected / self.norm:+.3g}{unit}, found from "
            f"{self.detectable(alpha):.2g}{unit}; {self.runs} Monte Carlo runs spread by "
            f"{self.spread:.3g} ({self.freedom:.0f} degrees of freedom), to nearest "
            f"{self.nearest:.2g}, Student's tail at {alpha:.1e}",
        )


def score_tests(
    directions: Iterable[Direction],
    errors: Mapping[str, Array],
    row_sigma: Mapping[str, Array],
    rows: Mapping[str, NDArray[np.bool_]],
    *,
    runs: int,
    independent_rows: bool,
    covariance: RowCovariance | None = None,
    repeats: bool = True,
    bound: Callable[[Array, tuple[slice, ...]], float] | None = None,
) -> tuple[ScoreTest, ...]:
    """Prepare the score tests of a case.

    Args:
        directions: what to project on.
        errors: per output, errors of the Monte Carlo runs and then of those that round to
            nearest, `(all runs, rows..., elements)`.
        row_sigma: per output, standard deviation of each row's errors, `(rows...)`.
        rows: per output, which rows count.
        runs: how many are Monte Carlo runs.
        independent_rows: whether no rounding is shared between rows.
        covariance: of every row, where it is known; then there is one output.
        repeats: whether values repeat.
        bound: gives the standard deviation of `T` from the size of every rounding, for weights
            that cover a part of the output.
    """
    found = []
    for direction in directions:
        name, part = direction.output, direction.part
        sigma = row_sigma[name][part]
        counted = rows[name][part] & (sigma > 0)
        inverse = np.divide(1.0, sigma, out=np.zeros_like(sigma), where=counted)
        scaled = direction.slope * inverse[..., None]
        norm = float(np.linalg.norm(scaled))
        if covariance is not None:
            slope = np.where(counted[..., None], direction.slope, 0.0)
            weighed = covariance.part(part).weighed(slope)
            norm = math.sqrt(max(float((slope * weighed).sum()), 0.0))
            scaled = weighed * sigma[..., None]
        if norm == 0:
            continue
        weights = (scaled / norm).astype(np.float32)
        parts = np.stack([row_parts(weights, inverse, error[part]) for error in errors[name]])
        spread, freedom = null_spread(parts[:runs], independent=independent_rows)
        if repeats and covariance is not None:
            spread = max(spread, 1.0)  # what repeats may do otherwise than the runs
        known = math.inf
        if bound is not None and freedom < _FEW:
            known = bound(np.asarray(weights * inverse[..., None], dtype=np.float64), part)
        found.append(
            ScoreTest(
                name=direction.name,
                unit=direction.unit,
                output=name,
                part=part,
                weights=weights,
                inverse=inverse,
                norm=norm,
                spread=spread,
                freedom=freedom,
                nearest=float(np.abs(parts[runs:].sum(axis=1)).max()),
                slack=direction.slack,
                runs=runs,
                repeats=repeats,
                bound=known,
            )
        )
    return tuple(found)


def sampled_score_tests(
    directions: Iterable[Direction],
    errors: Array,
    row_sigma: Array,
    rows: NDArray[np.bool_],
    some: slice,
    runs: int,
    *,
    common: bool,
) -> tuple[ScoreTest, ...]:
    """Prepare score tests over all rows of a core's output from the errors of some queries.

    Rows err independently, so the sampled rows' variance over their share of `||g / sigma||**2`
    is the variance of `T`. The bias of rounding to nearest is scaled as an error of independent
    rows, with the root of that share; where rows have errors in common, as that of a function, they
    add up, and it is scaled by the share itself.

    Args:
        directions: what to project on.
        errors: of the Monte Carlo runs and then of those to nearest,
            `(all runs, batch, heads, sampled queries, head_dim)`.
        row_sigma: standard deviation of each row's errors, `(batch, heads, q_len)`.
        rows: which rows count.
        some: the sampled queries.
        runs: how many are Monte Carlo runs.
        common: whether rows of a subject have errors in common that the runs draw apart: those of
            a function. Degrees of freedom are then the runs'.
    """
    found = []
    for direction in directions:
        part = direction.part or (slice(None), slice(None))
        sigma = row_sigma[part]
        counted = rows[part] & (sigma > 0)
        inverse = np.divide(1.0, sigma, out=np.zeros_like(sigma), where=counted)
        scaled = direction.slope * inverse[..., None]
        norm = float(np.linalg.norm(scaled))
        if norm == 0:
            continue
        weights = (scaled / norm).astype(np.float32)
        within, scales = weights[:, :, some], inverse[:, :, some]
        parts = np.stack([row_parts(within, scales, error[part]) for error in errors])
        share = float(np.square(within, dtype=np.float64).sum())
        biased = share if common else math.sqrt(share)
        spread, freedom = null_spread(parts[:runs], independent=not common)
        if share == 0 or spread == 0:
            continue
        found.append(
            ScoreTest(
                name=direction.name,
                unit=direction.unit,
                output=direction.output,
                part=part,
                weights=weights,
                inverse=inverse,
                norm=norm,
                spread=spread / math.sqrt(share),
                freedom=freedom,
                nearest=float(np.abs(parts[runs:].sum(axis=1)).max()) / biased,
                slack=direction.slack,
                runs=runs,
            )
        )
    return tuple(found)


def row_parts(weights: NDArray[np.float32], inverse: Array, error: Array) -> Array:
    """Return each row's part of `T`, flat."""
    parts: Array = (np.einsum("...d,...d->...", weights, error) * inverse).ravel()
    return parts


def null_spread(parts: Array, *, independent: bool) -> tuple[float, float]:
    """Return the standard deviation of `T` and its degrees of freedom.

    Args:
        parts: `t_kr`, `(runs, rows)`.
        independent: whether rows err independently.
    """
    runs = len(parts)
    together = float(np.square(parts.sum(axis=1)).mean())
    if independent:
        variances = np.square(parts).mean(axis=0)
        total = float(variances.sum())
        if total > 0 and runs * together / total <= chdtri(runs, _CONTRADICTED):
            # mean squares of `runs` draws: E v_r**2 exceeds its square, which lowers the figure
            return math.sqrt(total), runs * total**2 / float(np.square(variances).sum())
    return math.sqrt(together), float(runs)
