"""Which rank stands where: the ranks of a stage as rows of a mesh, a tensor-parallel group each.

Prefill has one row per context-parallel (CP) group, decode one per data-parallel (DP) group; the
columns are tensor-parallel (TP) ranks. With 8 ranks and 4 rows: `[[0, 1], [2, 3], [4, 5], [6, 7]]`.
On 64 ranks and 8 rows, Trn2's wiring makes other rows the near ones; `switch_cc` keeps them plain.

Source: neuronx-distributed-inference, `attention_process_groups`.
"""

from __future__ import annotations

from dataclasses import dataclass

from impl.errors import ConfigError, explain

_TRN2_SIDE = 8


@dataclass(frozen=True, slots=True)
class StageMesh:
    """Ranks of one stage.

    Attributes:
        rows: ranks of each tensor-parallel group, `(groups, ranks per group)`.
    """

    rows: tuple[tuple[int, ...], ...]

    @property
    def groups(self) -> int:
        """Context- or data-parallel degree."""
        return len(self.rows)

    @property
    def tp_degree(self) -> int:
        """Ranks over which a group splits its heads."""
        return len(self.rows[0])

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.groups * self.tp_degree

    @property
    def columns(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that hold the same heads: the groups across rows."""
        return tuple(zip(*self.rows, strict=True))

    @property
    def positions(self) -> tuple[int, ...]:
        """Place of each rank in the mesh read row by row: the inverted mesh.

        Under sequence parallelism rank `r` holds chunk `positions[r]` of the sequence, so that the
        chunks of a row are neighbours.
        """
        place = {rank: i for i, rank in enumerate(rank for row in self.rows for rank in row)}
        return tuple(place[rank] for rank in range(self.world_size))

    def coordinates(self, rank: int) -> tuple[int, int]:
        """Row and column of a rank."""
        return divmod(self.positions[rank], self.tp_degree)


def stage_mesh(world_size: int, groups: int, *, switch_cc: bool = False) -> StageMesh:
    """Lay the ranks of a stage out.

    Args:
        world_size: ranks in all.
        groups: context- or data-parallel degree; divides `world_size`.
        switch_cc: plain rows also on 8 by 8 ranks.

    Returns:
        The mesh; rows are runs of ranks, but on 8 by 8 ranks `[0-3, 12-15], [4-11], [16-19, ...`.

    Raises:
        ConfigError: `groups` does not divide `world_size`.
    """
    if groups < 1 or world_size % groups:
        raise ConfigError(
            explain("world_size", "be a multiple of groups", f"{world_size} and {groups}")
        )
    width = world_size // groups
    if groups == width == _TRN2_SIDE and not switch_cc:
        return StageMesh(tuple(row for pair in range(4) for row in _trn2_pair(16 * pair)))
    return StageMesh(tuple(tuple(range(g * width, (g + 1) * width)) for g in range(groups)))


def _trn2_pair(first: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two rows of 16 neighbouring ranks: the outer eight, and the inner eight."""
    outer = (*range(first, first + 4), *range(first + 12, first + 16))
    return outer, tuple(range(first + 4, first + 12))
