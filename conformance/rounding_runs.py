"""Observers that round as a profile says: at random, and to nearest.

Stochastic rounding keeps values of the format exact; over the place of a value between its
neighbours its mean squared error is nearly twice that of rounding to nearest, so all injected noise
is given that much more variance and errors of such runs are divided by `EXCESS`.

Source: Parker (1997), UCLA CSD-970002; Sohier et al. (2021), arXiv 1807.09655, for Monte Carlo
arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from conformance.ordered_sums import Path, claimed, nearest_sums, path_of
from conformance.precision import PrecisionProfile
from conformance.sums import Walk, accumulation_error, walk_of
from golden import FORMATS, Accumulation, Array
from golden.formats import Format

MARGIN = 1 / 16
"""Share of a gap on either side of a value of the format from which nothing is rounded away.

Plain stochastic rounding sends a value that lies 1e-5 gaps from a neighbour to the other one once
in 1e5 draws: an error that rounding to nearest never makes, and that alone would set a limit.
"""
EXCESS = math.sqrt(1.0 + (1.0 - 2.0 * MARGIN) ** 2)
"""Standard deviation of what the runs inject over that of rounding to nearest."""

_FUNCTIONS = frozenset({"exp", "softcap_tanh", "rope_powers", "rope_cos", "rope_sin"})
"""Stages that a library approximates, beyond rounding."""
_SIGNIFICAND_BITS = 52
_EXP_CELLS = 64
"""Intervals of the significand within which an approximation of exp errs alike."""
_ALL = 1 << 62
"""Keys of a tile that holds all."""


@dataclass(slots=True)
class Dither:
    """Observer that rounds each stored stage at random, at `EXCESS` times nearest's error.

    Attributes:
        profile: where to round, and to what.
        rng: source of the randomness.
        left: stages that get the other errors but are not rounded: their caller does that.
        paths: of products of queries and keys in the claimed order, by how many came before in a
            run: all runs share those that the first finds.
        walks: where runs share what is known of sums: the first one leaves here what it finds.
            Products of queries and keys are the same in all runs of a core. Other sums are so to a
            few ulps, and their scale with them, where nothing is stored coarser than it is summed.
            None is for runs that share nothing.
    """

    profile: PrecisionProfile
    rng: np.random.Generator
    left: frozenset[str] = frozenset()
    paths: list[Path] = field(default_factory=list)
    walks: dict[str, Walk] | None = None
    _products: int = 0
    _total: Array | float = 1.0

    def __call__(
        self, stage: str, value: Array, accumulation: Accumulation | None = None, /
    ) -> Array:
        """Return the value with one random draw of the stage's errors."""
        stored = self.profile.stores.get(stage)
        if stored is None:
            return value
        if accumulation is not None and claimed(self.profile, stage, accumulation):
            value = self._in_order(stage, value, accumulation)
            if stage == "qk" or stage == "denominator":
                return value
        elif accumulation is not None and stored == self.profile.accumulation:
            known = self._walk(stage, value, accumulation)
            error = accumulation_error(self.profile, stage, value, accumulation, self.rng, known)
            value = value + EXCESS * error
        # a coarser store hides what a function errs by beyond it
        ulps = self.profile.function_ulps(stage) if stage in _FUNCTIONS else 0.0
        if ulps and stored == self.profile.accumulation:
            width = EXCESS * ulps * FORMATS[stored].ulp(value)
            noise = self.rng.uniform(-1.0, 1.0, size=value.shape) * width
            value = np.where(value == 0.0, 0.0, value + noise)
        if stage in self.left:
            return value
        return FORMATS[stored].stochastic(value, self.rng, margin=MARGIN)

    def _walk(self, stage: str, value: Array, sums: Accumulation) -> Walk | None:
        """Return what other runs know of the sum, or None."""
        if self.walks is None or (stage != "qk" and not _all_fine(self.profile)):
            return None
        if stage not in self.walks:
            walk = walk_of(self.profile, stage, value, sums)
            self.walks[stage] = walk.narrow() if stage == "qk" else walk
        return self.walks[stage]

    def _in_order(self, stage: str, value: Array, sums: Accumulation) -> Array:
        """Return sums of claimed order with their errors, undivided where that comes last."""
        if stage != "qk":
            found = nearest_sums(self.profile, stage, value, sums, self._total)
            value = value + EXCESS * (found - value)
            if stage == "denominator":
                self._total = value
            return value
        if self._products == len(self.paths):
            self.paths.append(path_of(self.profile, stage, value, sums))
        path = self.paths[self._products]
        self._products += 1
        noise = self.rng.standard_normal(value.shape) * np.sqrt(path.variance) - path.lost
        value = value + EXCESS * noise
        stored = FORMATS[self.profile.accumulation].stochastic(value, self.rng, margin=MARGIN)
        return np.where(path.last > 0.0, stored, value)  # the last addition stores it


def _all_fine(profile: PrecisionProfile) -> bool:
    """Tell whether every stage is stored at least as finely as sums accumulate."""
    coarsest = min(FORMATS[form].precision for form in profile.stores.values())
    return coarsest >= FORMATS[profile.accumulation].precision


@dataclass(slots=True)
class Nearest:
    """Observer that rounds each stored stage to nearest: a correct subject of this profile.

    Attributes:
        profile: where to round, and to what.
        tile: keys of a tile. A kernel with tiles stores unnormalised weights relative to the
            largest score so far, and so between other neighbours; None is one relative to the
            row's largest score or sink.
        backwards: whether the last tile comes first.
        rng: source of one function for the error of exp within `exp_ulps`; None is no error.
    """

    profile: PrecisionProfile
    tile: int | None = None
    backwards: bool = False
    rng: np.random.Generator | None = None
    _total: Array | float = 1.0

    def __call__(
        self, stage: str, value: Array, accumulation: Accumulation | None = None, /
    ) -> Array:
        """Return the value rounded as the profile stores it."""
        stored = self.profile.stores.get(stage)
        if stored is None:
            return value
        if self.tile is None and accumulation is not None:
            if claimed(self.profile, stage, accumulation):
                value = nearest_sums(self.profile, stage, value, accumulation, self._total)
            if stage == "denominator":
                self._total = value
        if stage == "exp" and self.rng is not None:
            value = value + self._approximation(value, self.rng) * FORMATS[stored].ulp(value)
        if stage == "unnormalised_weights" and self.tile is not None:
            return self._in_tiles(FORMATS[stored], value, self.tile)
        return FORMATS[stored].nearest(value)

    def _in_tiles(self, form: Format, weights: Array, tile: int) -> Array:
        """Round weights relative to the largest one of their tile and those before it."""
        ordered = weights[..., ::-1] if self.backwards else weights
        rounded = np.empty_like(ordered)
        largest = np.zeros((*weights.shape[:-1], 1))
        for start in range(0, weights.shape[-1], tile):
            part = ordered[..., start : start + tile]
            largest = np.maximum(largest, part.max(axis=-1, keepdims=True))
            reference = np.where(largest > 0, largest, 1.0)
            rounded[..., start : start + tile] = form.nearest(part / reference) * reference
        return rounded[..., ::-1] if self.backwards else rounded

    def _approximation(self, exps: Array, rng: np.random.Generator) -> Array:
        """Return the error of an approximation of exp, in ulps: a function of its argument.

        Range reduction leaves the fractional part of the exponent to base 2, which is the
        significand of the result: equal leading bits err alike, in every row.
        """
        errors = rng.uniform(-1.0, 1.0, size=_EXP_CELLS) * self.profile.exp_ulps
        bits = np.ascontiguousarray(exps).view(np.uint64) >> np.uint64(_SIGNIFICAND_BITS - 6)
        found: Array = errors[(bits & np.uint64(_EXP_CELLS - 1)).astype(np.intp)]
        return np.where(exps == 0.0, 0.0, found)


def nearest_runs(profile: PrecisionProfile, seed: int) -> Iterator[Nearest]:
    """Yield correct subjects that round to nearest: a plain one, then three with a bias of theirs.

    Those store unnormalised weights relative to the largest score so far, in tiles of 16 keys, of
    64 keys from the last, and in one tile that leaves the sink out; and they compute exp by
    approximations of their own.
    """
    yield Nearest(profile)
    for count, (tile, backwards) in enumerate(((16, False), (64, True), (_ALL, False)), 1):
        rng = np.random.Generator(np.random.SFC64([seed, count, 0]))
        yield Nearest(profile, tile, backwards, rng)
