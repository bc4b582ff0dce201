"""Arrays that streamed attention uses again and again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from golden.stages import Array


class Scratch:
    """Arrays that are used again from tile to tile, so that they stay in the processor's cache."""

    def __init__(self) -> None:
        self._flat: dict[str, Array] = {}

    def array(self, name: str, *shape: int) -> Array:
        """Return an array of this shape with arbitrary contents; an older one is overwritten."""
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.size < size:
            flat = self._flat[name] = np.empty(size)
        return flat[:size].reshape(shape)

    def widened(self, name: str, array: NDArray[np.generic]) -> Array:
        """Return the array in float64: itself if it is, a copy otherwise."""
        if array.dtype == np.float64:
            return array.astype(np.float64, copy=False)
        copy = self.array(name, *array.shape)
        np.copyto(copy, array, casting="unsafe")
        return copy


@contextmanager
def borrowed_scratch() -> Iterator[Scratch]:
    """Lend a scratch to one user at a time and keep it for the next; there are few, of a few MB."""
    try:
        scratch = _UNUSED.pop()
    except IndexError:
        scratch = Scratch()
    try:
        yield scratch
    finally:
        _UNUSED.append(scratch)


_UNUSED: list[Scratch] = []
