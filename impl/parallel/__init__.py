"""One attention layer on many ranks: meshes, groups, collectives, shards of weights, phases.

Start a process per rank with `torchrun`, call `init_process_group`, and make the layers; a layer
finds its groups by its `NeuronConfig`.
"""

from impl.parallel.groups import ProcessGroups, init_process_group, process_groups
from impl.parallel.head_layout import HeadLayout, head_layout
from impl.parallel.meshes import StageMesh, stage_mesh
from impl.parallel.rank_maps import RankMaps, rank_maps
from impl.parallel.token_order import TokenOrder, strided

__all__ = [
    "HeadLayout",
    "ProcessGroups",
    "RankMaps",
    "StageMesh",
    "TokenOrder",
    "head_layout",
    "init_process_group",
    "process_groups",
    "rank_maps",
    "stage_mesh",
    "strided",
]
