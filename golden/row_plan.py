"""Which query rows to check when there are too many to check them all, and what that misses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.arrays import Positions, as_positions
from golden.errors import ConfigError
from golden.masks import Mask

TILE_EDGES = (128, 512)
"""Tile sizes of the kernels people write; defects sit at multiples of them."""


@dataclass(frozen=True, slots=True, eq=False)
class RowPlan:
    """Rows to check: corners, where defects are likely, and random ones, for all the others.

    Attributes:
        rows: `(n,)`, int64, sorted and distinct indices of queries.
        q_len: queries there are.
        corners: corner rows and what makes each one.
        random: how many of the others were drawn, uniformly and without repetition.
    """

    rows: NDArray[np.int64]
    q_len: int
    corners: dict[int, str]
    random: int

    def escape_probability(self, fraction: float) -> float:
        """Return the chance that a defect in this fraction of the rows touches none of the plan.

        Of `N` rows, `c` are corners, checked for sure. A defect that touches `m = ceil(fraction
        N)` rows chosen without knowledge of the drawing hides best where it touches no corner.
        Then the `r` random rows, drawn without repetition from the other `M = N - c`, all miss it
        with the hypergeometric probability

            P = C(M - m, r) / C(M, r) = prod_{i < r} (1 - m / (M - i)) <= exp(-r m / M),

        and with 0 where `m > M - r`. A row counts as touched if any head or batch row of it is,
        since a row is checked in all of them.

        Args:
            fraction: of the rows, above 0 and at most 1.

        Raises:
            ConfigError: `fraction` is not above 0 and at most 1.
        """
        if not 0 < fraction <= 1:
            raise ConfigError(f"fraction must be above 0 and at most 1, got {fraction}")
        touched = _rows_in(fraction, self.q_len)
        return _all_missed(self.q_len - len(self.corners), touched, self.random)

    def smallest_fraction(self, probability: float = 1e-6) -> float:
        """Return the smallest fraction of rows whose defect escapes with at most `probability`.

        Raises:
            ConfigError: `probability` is not between 0 and 1.
        """
        _check_probability(probability)
        low, high = 0, self.q_len  # the defect of `low` rows may escape, that of `high` does not
        while high - low > 1:
            middle = (low + high) // 2
            missed = _all_missed(self.q_len - len(self.corners), middle, self.random)
            low, high = (low, middle) if missed <= probability else (middle, high)
        return high / self.q_len

    def summary(self, probability: float = 1e-6) -> str:
        """Say what is checked and what it would miss, in one sentence.

        Raises:
            ConfigError: `probability` is not between 0 and 1.
        """
        least = 100 * self.smallest_fraction(probability)
        return (
            f"{len(self.rows)} of {self.q_len} rows: {len(self.corners)} corners and "
            f"{self.random} random; a defect touching {least:.3g} % of rows or more "
            f"escapes with probability below {probability:g}, one touching 0.1 % with probability "
            f"{self.escape_probability(1e-3):.2g}"
        )


def plan_rows(
    q_positions: Any, mask: Mask, *, count: int, seed: int, tile_edges: tuple[int, ...] = TILE_EDGES
) -> RowPlan:
    """Choose rows to check: every corner that fits into half of them, random rows for the rest.

    Corners are, in this order until half the rows are used up: the first and the last row; rows
    beside padding; rows at positions where the mask changes (`Mask.corners`); both sides of the
    first and last edge of each tile size; then both sides of random edges of each.

    Args:
        q_positions: `(q_len,)` or `(batch, q_len)`, int; -1 marks a padded query.
        mask: the mask of the attention.
        count: rows to choose, at least 2; all rows if there are not more.
        seed: of the drawing.
        tile_edges: tile sizes, in rows.

    Raises:
        ShapeError: positions are not integers.
        ConfigError: there are fewer than 2 rows to choose, a tile size is below 1, or there is no
            query.
    """
    if count < 2:
        raise ConfigError(f"count must be at least 2, the first and the last row, got {count}")
    if min(tile_edges, default=1) < 1:
        raise ConfigError(f"tile_edges must be at least 1, got {tile_edges}")
    array = np.atleast_2d(np.asarray(q_positions))
    positions = as_positions("q_positions", array, (array.shape[0], array.shape[-1]))
    q_len = positions.shape[1]
    if q_len == 0:
        raise ConfigError("q_positions must hold at least one query, got none")
    rng = np.random.default_rng(seed)
    wanted = _corners(positions, mask, tile_edges, rng, max(2, count // 2))
    others = np.setdiff1d(np.arange(q_len), np.fromiter(wanted, dtype=np.int64))
    drawn = rng.choice(others, size=min(count - len(wanted), len(others)), replace=False)
    rows = np.sort(np.concatenate([np.fromiter(wanted, dtype=np.int64), drawn]))
    return RowPlan(rows, q_len, wanted, len(drawn))


def rows_needed(fraction: float, probability: float, q_len: int) -> int:
    """Return how many random rows let a defect in this fraction escape with this probability.

    Args:
        fraction: of the rows that the defect touches, above 0 and at most 1.
        probability: of escaping, between 0 and 1.
        q_len: rows there are.

    Raises:
        ConfigError: an argument is out of range.
    """
    _check_probability(probability)
    if not 0 < fraction <= 1 or q_len < 1:
        raise ConfigError(
            f"fraction must be above 0 and at most 1 of at least one row, got {fraction} of {q_len}"
        )
    touched = _rows_in(fraction, q_len)
    low, high = -1, q_len  # `low` rows are too few, `high` are enough
    while high - low > 1:
        middle = (low + high) // 2
        enough = _all_missed(q_len, touched, middle) <= probability
        low, high = (low, middle) if enough else (middle, high)
    return high


def _check_probability(probability: float) -> None:
    if not 0 < probability < 1:
        raise ConfigError(f"probability must be between 0 and 1, got {probability}")


def _rows_in(fraction: float, q_len: int) -> int:
    """Return `ceil(fraction * q_len)`, without the row that rounding of the product may add."""
    return math.ceil(fraction * q_len * (1.0 - 2.0**-50))


def _all_missed(rows: int, touched: int, drawn: int) -> float:
    """Return `C(rows - touched, drawn) / C(rows, drawn)`."""
    if touched > rows - drawn:
        return 0.0
    return math.exp(float(np.log1p(-touched / (rows - np.arange(drawn))).sum()))


def _corners(
    positions: Positions,
    mask: Mask,
    tile_edges: tuple[int, ...],
    rng: np.random.Generator,
    most: int,
) -> dict[int, str]:
    q_len = positions.shape[1]
    found: dict[int, str] = {}

    def add(row: int, reason: str) -> None:
        if 0 <= row < q_len and len(found) < most:
            found.setdefault(row, reason)

    add(0, "first row")
    add(q_len - 1, "last row")
    padded = positions < 0
    for row in np.flatnonzero((padded[:, 1:] != padded[:, :-1]).any(axis=0)).tolist():
        add(row, "padding border")
        add(row + 1, "padding border")
    at_corner = mask.corners(int(positions.max()))
    for position in sorted(at_corner):
        for row in np.flatnonzero((positions == position).any(axis=0))[:1].tolist():
            add(row, at_corner[position])
    edges = {size: np.arange(size, q_len, size) for size in tile_edges}
    for size, starts in edges.items():
        for start in starts[[0, -1]].tolist() if len(starts) else []:
            add(start - 1, f"end of a tile of {size}")
            add(start, f"start of a tile of {size}")
    for size, starts in edges.items():
        for start in rng.permutation(starts)[: most // (2 * len(edges))].tolist():
            add(start - 1, f"end of a tile of {size}")
            add(start, f"start of a tile of {size}")
    return found
