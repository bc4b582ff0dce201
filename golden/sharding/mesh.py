"""Meshes: which ranks share one copy of the weights, and which hold the same part of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

from golden.checks import require, require_count

EightByEight = Literal["trn2", "switch", "pds"]
"""Order of ranks where eight groups of eight are formed from 64."""

Groups = tuple[tuple[int, ...], ...]
"""Process groups: global ranks, in the order in which collectives join their values."""


def _trn2_rows() -> Groups:
    """Two rows from every 16 ranks: the outer eight, then the inner eight."""
    rows: list[tuple[int, ...]] = []
    for first in range(0, 64, 16):
        rows.append((*range(first, first + 4), *range(first + 12, first + 16)))
        rows.append(tuple(range(first + 4, first + 12)))
    return tuple(rows)


EIGHT_BY_EIGHT: dict[EightByEight, Groups] = {
    "trn2": _trn2_rows(),
    "switch": tuple(tuple(range(first, first + 8)) for first in range(0, 64, 8)),
    "pds": (
        (0, 8, 18, 26, 32, 40, 50, 58),
        (1, 9, 19, 27, 33, 41, 51, 59),
        (2, 10, 16, 24, 34, 42, 48, 56),
        (3, 11, 17, 25, 35, 43, 49, 57),
        (4, 12, 22, 30, 36, 44, 54, 62),
        (5, 13, 23, 31, 37, 45, 55, 63),
        (6, 14, 20, 28, 38, 46, 52, 60),
        (7, 15, 21, 29, 39, 47, 53, 61),
    ),
}
"""Rows of the 8x8 meshes: the wiring of a Trn2 instance, and two of machines with a switch.

Source: neuronx-distributed-inference, `tp_mesh_8_by_8`; `switch_cc` chooses `switch` in the release
of July 2026 and chose `pds` before.
"""


@dataclass(frozen=True, slots=True)
class Mesh:
    """The ranks of one stage, in rows and columns.

    D1: a row is a tensor-parallel group: between them its ranks hold one copy of the weights.
    D2: a column joins the ranks at one place of each row: the context-parallel group of a prefill,
        the data-parallel group of a decode.

    With 8 ranks and 4 rows, rows and columns are::

        [[0, 1], [2, 3], [4, 5], [6, 7]]        [[0, 2, 4, 6], [1, 3, 5, 7]]

    D3: `inverted` is at once the weights' rank ordering (a rank holds part
        `inverted[rank] % tp_degree`) and the order in which a sequence-parallel input is dealt out
        (a rank gets piece `inverted[rank]`), so that a row's pieces lie side by side.

    Attributes:
        rows: global ranks, a tuple per row; every rank of the world once.
        inverted: place of each rank in the order of the mesh, row by row.

    Raises:
        ConfigError: rows of several lengths, or not every rank once.
    """

    rows: Groups
    inverted: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ranks = self.flattened
        require(
            len(ranks) > 0 and len({len(row) for row in self.rows}) == 1,
            f"rows must be equally long and hold a rank, got {self.rows}",
        )
        require(
            sorted(ranks) == list(range(len(ranks))),
            f"rows must hold every rank from 0 to {len(ranks) - 1} once, got {self.rows}",
        )
        places = [0] * len(ranks)
        for place, rank in enumerate(ranks):
            places[rank] = place
        object.__setattr__(self, "inverted", tuple(places))

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return len(self.inverted)

    @property
    def tp_degree(self) -> int:
        """Ranks of a row."""
        return len(self.rows[0])

    @property
    def columns(self) -> Groups:
        """The groups across rows."""
        return tuple(zip(*self.rows, strict=True))

    @property
    def flattened(self) -> tuple[int, ...]:
        """Ranks in the order of the mesh, row by row."""
        return tuple(chain.from_iterable(self.rows))

    def row_of(self, rank: int) -> int:
        """Return the rank's context-parallel (or data-parallel) rank."""
        return self.inverted[rank] // self.tp_degree

    def column_of(self, rank: int) -> int:
        """Return the rank's place in its row."""
        return self.inverted[rank] % self.tp_degree


def stage_mesh(world_size: int, degree: int, *, eight_by_eight: EightByEight = "trn2") -> Mesh:
    """Return the mesh of a stage: `degree` rows of `world_size / degree` consecutive ranks.

    D4: eight rows of eight follow the machine's wiring instead.

    Args:
        world_size: ranks in all.
        degree: context-parallel degree of a prefill, data-parallel degree of a decode.
        eight_by_eight: which wiring.

    Raises:
        ConfigError: the ranks do not divide into rows, or the wiring is unknown.

    Source: neuronx-distributed-inference, `get_tp_cp_group_mesh`, `get_cp_group_mesh` and
    `get_flattened_inverted_tp_cp_group_mesh`.
    """
    require_count("world_size", world_size)
    require_count("degree", degree)
    require(
        world_size % degree == 0,
        f"world_size must be a multiple of the degree, got {world_size} and {degree}",
    )
    require(
        eight_by_eight in EIGHT_BY_EIGHT,
        f"eight_by_eight must be one of {', '.join(EIGHT_BY_EIGHT)}, got {eight_by_eight!r}",
    )
    if degree == 8 and world_size == 64:
        return Mesh(EIGHT_BY_EIGHT[eight_by_eight])
    width = world_size // degree
    return Mesh(tuple(tuple(range(i, i + width)) for i in range(0, world_size, width)))
