"""Which shard of the weights each rank holds in each stage.

Prefill splits heads over `tp / cp` ranks and decode over `tp / dp`. A rank keeps the keys and
values of its prefill heads, so where the two differ decode hands out its shards in an order in
which every rank reads heads that it wrote: rank by rank, the first shard left whose KV heads the
rank has. On 8 ranks with 8 KV heads, `cp = 2` and `dp = 1` that is `[0, 2, 4, 6, 1, 3, 5, 7]`.

Where only decode is split (`cp = 1`), each of its rows must find every head, so it is prefill whose
shards are handed out, by the same rule.

Source: neuronx-distributed-inference, `attention_process_groups` and `gqa`: `rank_ordering`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from impl.errors import ConfigError, explain
from impl.parallel.head_layout import PADDING, HeadLayout, Slots, head_layout
from impl.parallel.meshes import StageMesh, stage_mesh
from impl.parallel.sharding_strategy import GQA


@dataclass(frozen=True, slots=True)
class StageMap:
    """Who holds what in one stage.

    Attributes:
        mesh: the ranks.
        layout: heads of each shard.
        ordering: per rank, its shard plus the ranks of the rows before its own; the shard of a
            weight is `ordering[rank] % tp_degree`.
    """

    mesh: StageMesh
    layout: HeadLayout
    ordering: tuple[int, ...]

    def shard(self, rank: int) -> int:
        """Shard of the weights that a rank holds."""
        return self.ordering[rank] % self.mesh.tp_degree

    def key_value(self, rank: int) -> Slots:
        """KV heads that a rank holds."""
        return self.layout.shard(self.shard(rank)).key_value


@dataclass(frozen=True, slots=True)
class RankMaps:
    """Both stages.

    Attributes:
        prefill: context encoding, a row of the mesh per CP group.
        decode: token generation, a row per DP group.
    """

    prefill: StageMap
    decode: StageMap


def rank_maps(
    tp_degree: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    *,
    cp_degree: int = 1,
    dp_degree: int = 1,
    switch_cc: bool = False,
    strategy: GQA | None = None,
) -> RankMaps:
    """Lay out both stages of a layer.

    Args:
        tp_degree: ranks in all.
        num_attention_heads: query heads of the model.
        num_key_value_heads: KV heads of the model.
        cp_degree: context-parallel groups of prefill.
        dp_degree: data-parallel groups of decode.
        switch_cc: plain rows also on 8 by 8 ranks.
        strategy: desired sharding of KV heads.

    Raises:
        ConfigError: degrees that do not divide the ranks, or no order lets every rank read heads
            that it wrote.
    """
    heads = (num_attention_heads, num_key_value_heads, strategy)
    before = stage_mesh(tp_degree, cp_degree, switch_cc=switch_cc)
    after = stage_mesh(tp_degree, dp_degree, switch_cc=switch_cc)
    prefill = StageMap(before, head_layout(before.tp_degree, *heads), before.positions)
    decode = StageMap(after, head_layout(after.tp_degree, *heads), after.positions)
    if cp_degree == dp_degree:
        return RankMaps(prefill, decode)
    if cp_degree > 1:

        def reads_its_own(rank: int, shard: int) -> bool:
            return _has(prefill.key_value(rank), decode.layout.shard(shard).key_value)

        ordering = _handed_out(after, reads_its_own)
        return RankMaps(prefill, StageMap(after, decode.layout, ordering))

    def writes_what_it_reads(rank: int, shard: int) -> bool:
        return _has(prefill.layout.shard(shard).key_value, decode.key_value(rank))

    ordering = _handed_out(before, writes_what_it_reads)
    return RankMaps(StageMap(before, prefill.layout, ordering), decode)


def _handed_out(mesh: StageMesh, fits: Callable[[int, int], bool]) -> tuple[int, ...]:
    ordering = [0] * mesh.world_size
    for row, ranks in enumerate(mesh.rows):
        left = list(range(mesh.tp_degree))
        for rank in ranks:
            shard = next((shard for shard in left if fits(rank, shard)), None)
            if shard is None:
                raise ConfigError(
                    explain(
                        "tp_degree, cp_degree and attention_dp_degree",
                        "leave each rank in decode only KV heads that it has in prefill",
                        f"none for rank {rank}",
                        "copies of a head must come out even in both stages",
                    )
                )
            left.remove(shard)
            ordering[rank] = row * mesh.tp_degree + shard
    return tuple(ordering)


def _has(held: Slots, wanted: Slots) -> bool:
    return set(wanted) <= {*held, PADDING}
