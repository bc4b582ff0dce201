"""The running sums of streamed softmax, with a shift that seldom moves.

Each row of queries keeps a sum of exponentials, a sum of exponentials times values, and a *shift*
that is subtracted from its scores before `exp`. Any shift gives the same quotient. The usual
choice, the largest score so far, costs three passes over every tile of scores. Here a shift stays
0 as long as the row's scores stay within `+-SPAN`:

S1: a shift moves to the largest visible score of a run of keys when that exceeds the shift by more
    than `SPAN`, or when the row has seen nothing yet and it lies below `-SPAN`. So exponentials
    are at most `exp(SPAN)`, and the sum of a row is at least `exp(-SPAN)` once it has seen a key.
"""

from __future__ import annotations

import numpy as np

from golden.stages import Array

SPAN = 64.0
"""Scores this far from a row's shift are left as they are.

`exp(64)` is `6e27`: values up to `1e280` cannot overflow the running sums, and a score is lost to
underflow only where its weight is below `exp(-745 + 2 * 64)`, `1e-268`, of the row's largest.
"""

ROUNDED = 1.0 - 2.0**-20
"""Allows for the roundings of lengths and products when they are compared with `SPAN`."""


class RowSums:
    """The running sums of neighbouring rows of queries.

    Attributes:
        mixed: `(kv_heads, rows, value_dim)`, sums of exponentials times values.
        total: `(kv_heads, rows)`, sums of exponentials.
        shift: `(kv_heads, rows)`, what is subtracted from scores before `exp`.
    """

    def __init__(self, mixed: Array, total: Array, shift: Array) -> None:
        self.mixed = mixed
        self.total = total
        self.shift = shift

    def part(self, rows: slice) -> RowSums:
        """Return the sums of some of the rows, in the same memory."""
        return RowSums(self.mixed[:, rows], self.total[:, rows], self.shift[:, rows])

    def raise_to(self, top: Array) -> None:
        """Move shifts as S1 says, given the largest visible score of each row."""
        unseen = self.total == 0.0
        move = (top > self.shift + SPAN) | (unseen & (top < -SPAN) & (top > -np.inf))
        if move.any():
            new = np.where(move, top, self.shift)
            factor = np.where(move & ~unseen, np.exp(self.shift - new), 1.0)
            self.total *= factor
            self.mixed *= factor[..., None]
            self.shift[...] = new

    def finish(self, sinks: Array | None) -> tuple[Array, Array]:
        """Return output and log-sum-exp, shaped like `mixed` and `total`; `sinks` like `total`."""
        if sinks is not None:
            self.raise_to(sinks)
            self.total += np.exp(sinks - self.shift)
        total = self.total[..., None]
        self.mixed /= np.where(total == 0.0, 1.0, total)
        return self.mixed, np.log(self.total) + self.shift
