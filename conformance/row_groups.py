"""Groups of rows over which errors are pooled: a head, a KV group, a tile.

A defect often sits in one head or one tile of a kernel. Pooled over all rows it drowns; in one row
it may be too small to tell.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from golden import Array

TILES = (128, 512)
"""Rows of a tile: the partitions of a NeuronCore's PSUM, and its free size in float32."""


@dataclass(frozen=True, slots=True, eq=False)
class RowGroup:
    """One way to cut an output's rows into groups.

    Attributes:
        name: what a group is, such as `head`.
        labels: group of each row, shaped like the rows, from 0.
    """

    name: str
    labels: NDArray[np.intp]

    def means(self, values: Array, counted: NDArray[np.bool_]) -> Array:
        """Average values of the counted rows by group; groups without any are left out."""
        labels = self.labels[counted]
        size = np.bincount(labels)
        sums = np.bincount(labels, weights=values[counted])
        means: Array = sums[size > 0] / size[size > 0]
        return means

    def first(self, position: int, counted: NDArray[np.bool_]) -> tuple[int, ...]:
        """Return the index of the first counted row of the group at this place of `means`."""
        label = np.unique(self.labels[counted])[position]
        index = np.argwhere((self.labels == label) & counted)[0]
        return tuple(int(i) for i in index)


def whole(shape: tuple[int, ...]) -> RowGroup:
    """Return the group of all rows of an output."""
    return RowGroup("whole", np.zeros(shape, dtype=np.intp))


def row_groups(shape: tuple[int, ...], group_size: int) -> tuple[RowGroup, ...]:
    """Return the groups of an output, without those that say the same as a coarser one.

    Args:
        shape: of its rows: `(batch, heads, length)`, or `(batch, length)` without heads.
        group_size: query heads per KV head; 1 where heads have no groups.
    """
    length = shape[-1]
    outer = np.arange(int(np.prod(shape[:-1]))).reshape(*shape[:-1], 1)
    steps = np.arange(length)
    found = []
    if len(shape) == 3 and outer.size > 1:
        found.append(("head", np.broadcast_to(outer, shape)))
        if 1 < group_size < shape[1]:
            found.append(("KV group", np.broadcast_to(outer // group_size, shape)))
    for tile in TILES:
        if length > tile:
            found.append((f"tile of {tile}", outer * -(-length // tile) + steps // tile))
    return tuple(RowGroup(name, labels) for name, labels in found)
