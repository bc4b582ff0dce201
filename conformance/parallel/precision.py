"""What ranks round besides what one rank does: the sum over the ranks of a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from conformance.precision import PrecisionProfile
from conformance.rounding_runs import Dither, Nearest
from golden import Accumulation, Array, Observer
from golden.sharding import Parallelism, RankObserver

REDUCED = "o_reduced"
MERGED = "attn_merged"


def reduction_profile(profile: PrecisionProfile, parallelism: Parallelism) -> PrecisionProfile:
    """Return the profile of an all-reduce: values and partial sums in the reduction's dtype.

    Without a reduction dtype it is what the output projection's product is stored in. Every rank's
    partial sum is rounded, so the sum is one block of as many terms as there are ranks.
    """
    dtype = parallelism.reduce_dtype or profile.stores.get("o_product", profile.accumulation)
    return replace(
        profile,
        stores={**profile.stores, "o_product": dtype},
        accumulation=dtype,
        block_length=max(parallelism.tp_degree, 1),
    )


@dataclass(frozen=True, slots=True)
class OnRanks:
    """Gives every rank an observer of one rank's stages, extended to what ranks exchange.

    Attributes:
        observe: of a single rank, such as `Dither` or `Nearest`.
        reduction: profile of the sum over a row.
    """

    observe: Observer
    reduction: PrecisionProfile

    def __call__(self, rank: int) -> Observer:
        """Return the rank's observer."""
        return self._see

    def _see(self, stage: str, value: Array, accumulation: Accumulation | None = None, /) -> Array:
        if stage == MERGED:
            return self.observe("attn", value)
        if stage != REDUCED or accumulation is None or accumulation.length == 1:
            return self.observe(stage, value, accumulation)
        if isinstance(self.observe, (Dither, Nearest)):
            summed: Observer = replace(self.observe, profile=self.reduction)
            return summed("o_product", value, accumulation)
        return self.observe(stage, value, accumulation)


def on_ranks(
    profile: PrecisionProfile, parallelism: Parallelism
) -> Callable[[Observer], RankObserver]:
    """Return what turns an observer of one rank into one of all."""
    reduction = reduction_profile(profile, parallelism)
    return lambda observe: OnRanks(observe, reduction)
