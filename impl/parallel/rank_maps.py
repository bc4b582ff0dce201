"""Which shard of the weights each rank holds in each stage.

Prefill splits heads over `tp / cp` ranks and decode over `tp / dp`. A rank keeps the keys and
values of its prefill heads, so decode hands out its shards in an order in which every rank reads
heads that it wrote. Whole rows of the prefill mesh, `m = cp / dp` of them, make one row of the
decode mesh; the rank in column `t` of the `i`-th of these rows takes shard `t * m + i`. On 8 ranks
with `cp = 2` and `dp = 1` that is `[0, 2, 4, 6, 1, 3, 5, 7]`.

Where only decode is split (`cp = 1`), the order moves to prefill: the rank at `(d, u)` of the
decode mesh takes prefill shard `u * dp + d`, and so each row of decode holds every head.

Source: neuronx-distributed-inference, `attention_process_groups` and `gqa`: `rank_ordering`.
"""

from __future__ import annotations

from dataclasses import dataclass

from impl.errors import ConfigError, explain
from impl.parallel.meshes import StageMesh, stage_mesh


@dataclass(frozen=True, slots=True)
class RankMaps:
    """Meshes of both stages, and the order of weight shards in each.

    Attributes:
        prefill: mesh of context encoding, a row per CP group.
        decode: mesh of token generation, a row per DP group.
        prefill_ordering: per rank, `row * tp_degree + shard` in prefill; the shard of a weight is
            `ordering[rank] % tp_degree`.
        decode_ordering: the same in decode.
    """

    prefill: StageMesh
    decode: StageMesh
    prefill_ordering: tuple[int, ...]
    decode_ordering: tuple[int, ...]

    def prefill_shard(self, rank: int) -> int:
        """Shard of the weights that a rank holds in prefill."""
        return self.prefill_ordering[rank] % self.prefill.tp_degree

    def decode_shard(self, rank: int) -> int:
        """Shard of the weights that a rank holds in decode."""
        return self.decode_ordering[rank] % self.decode.tp_degree


def rank_maps(
    tp_degree: int, cp_degree: int = 1, dp_degree: int = 1, *, switch_cc: bool = False
) -> RankMaps:
    """Lay out both stages.

    Args:
        tp_degree: ranks in all.
        cp_degree: context-parallel groups of prefill.
        dp_degree: data-parallel groups of decode.
        switch_cc: plain rows also on 8 by 8 ranks.

    Returns:
        Meshes and orderings.

    Raises:
        ConfigError: degrees that do not divide each other.
    """
    prefill = stage_mesh(tp_degree, cp_degree, switch_cc=switch_cc)
    decode = stage_mesh(tp_degree, dp_degree, switch_cc=switch_cc)
    if cp_degree == 1:
        swapped = tuple(
            column * dp_degree + row for row, column in map(decode.coordinates, range(tp_degree))
        )
        return RankMaps(prefill, decode, swapped, decode.positions)
    if cp_degree % dp_degree:
        raise ConfigError(
            explain(
                "cp_degree",
                "be a multiple of attention_dp_degree when both exceed 1",
                f"{cp_degree} and {dp_degree}",
            )
        )
    held: dict[int, list[int]] = {row: [] for row in range(dp_degree)}
    for c, ranks in enumerate(prefill.rows):
        held[decode.coordinates(ranks[0])[0]].append(c)
    ordering = []
    for rank in range(tp_degree):
        (c, t), (row, _) = prefill.coordinates(rank), decode.coordinates(rank)
        ordering.append(row * decode.tp_degree + t * len(held[row]) + held[row].index(c))
    return RankMaps(prefill, decode, prefill.positions, tuple(ordering))
