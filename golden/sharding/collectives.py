"""Collectives over the values of simulated ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from golden.errors import ShapeError
from golden.formats import Format
from golden.sharding.mesh import Groups
from golden.stages import Array


def over_groups(
    groups: Groups, values: Sequence[Array], collective: Callable[[list[Array]], Sequence[Array]]
) -> list[Array]:
    """Run a collective in every group and return what each rank receives, by global rank."""
    received: list[Array] = list(values)
    for group in groups:
        for rank, value in zip(group, collective([values[r] for r in group]), strict=True):
            received[rank] = value
    return received


def all_gather(values: Sequence[Array], axis: int) -> list[Array]:
    """Give every rank all values side by side, in the order of the group."""
    return [np.concatenate(values, axis=axis)] * len(values)


def all_reduce(values: Sequence[Array], dtype: Format | None = None) -> list[Array]:
    """Give every rank the sum of all values."""
    return [reduced(values, dtype)] * len(values)


def reduce_scatter(values: Sequence[Array], axis: int, dtype: Format | None = None) -> list[Array]:
    """Give every rank its piece of the sum, cut along an axis in the order of the group.

    Raises:
        ShapeError: the axis does not divide by the ranks.
    """
    length = values[0].shape[axis]
    if length % len(values) != 0:
        raise ShapeError(
            f"axis {axis} must divide by the {len(values)} ranks of the group, got length {length}"
        )
    return np.split(reduced(values, dtype), len(values), axis=axis)


def all_to_all(values: Sequence[Array], split: int, join: int) -> list[Array]:
    """Cut every rank's value along one axis, send piece `i` to rank `i`, and join along another.

    Raises:
        ShapeError: the axis does not divide by the ranks.
    """
    length = values[0].shape[split]
    if length % len(values) != 0:
        raise ShapeError(
            f"axis {split} must divide by the {len(values)} ranks of the group, got length {length}"
        )
    pieces = [np.split(value, len(values), axis=split) for value in values]
    return [np.concatenate(arrived, axis=join) for arrived in zip(*pieces, strict=True)]


def reduced(values: Sequence[Array], dtype: Format | None) -> Array:
    """Add in the order of the group.

    D9: with a reduction dtype, every value and every partial sum is rounded to it: an error of at
        most `n u` relative to the sum of magnitudes, to first order, for `n` values.
    """
    rounded = (lambda x: x) if dtype is None else dtype.nearest
    total: Array = rounded(values[0])
    for value in values[1:]:
        total = rounded(total + rounded(value))
    return total
