"""A layer on many ranks, simulated exactly in one process.

`shard` cuts a layer for the ranks of a mesh; `encode_sharded`, `encode_packed_sharded` and
`generate_sharded` run golden on every rank's part and join the results with simulated collectives.
The result of every rank is that of the whole layer to float64 roundoff, and any stage of any rank
can be asked for.
"""

from golden.sharding.collectives import (
    all_gather,
    all_reduce,
    all_to_all,
    over_groups,
    reduce_scatter,
)
from golden.sharding.core_cache import CoreCache, core_cache
from golden.sharding.decode import generate_sharded
from golden.sharding.head_layout import (
    CONVERT_TO_MHA,
    PADDING,
    REPLICATE_TO_TP_DEGREE,
    HeadLayout,
    head_layout,
    sharding_strategy,
)
from golden.sharding.layer import RankStage, ShardedLayer, ShardedResult, shard
from golden.sharding.mesh import EIGHT_BY_EIGHT, Mesh, stage_mesh
from golden.sharding.observers import (
    COLLECTIVE_STAGES,
    RankCapture,
    RankObserver,
    unobserved_ranks,
)
from golden.sharding.packed import encode_packed_sharded
from golden.sharding.parallelism import Parallelism
from golden.sharding.placement import Placement, heads_written, place_ranks
from golden.sharding.prefill import encode_sharded
from golden.sharding.rank_weights import rank_config, rank_lora, rank_weights
from golden.sharding.tokens import (
    TokenPlan,
    reordered_pieces,
    strided_order,
    token_plan,
    unstrided_order,
)

__all__ = [
    "COLLECTIVE_STAGES",
    "CONVERT_TO_MHA",
    "EIGHT_BY_EIGHT",
    "PADDING",
    "REPLICATE_TO_TP_DEGREE",
    "CoreCache",
    "HeadLayout",
    "Mesh",
    "Parallelism",
    "Placement",
    "RankCapture",
    "RankObserver",
    "RankStage",
    "ShardedLayer",
    "ShardedResult",
    "TokenPlan",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "core_cache",
    "encode_packed_sharded",
    "encode_sharded",
    "generate_sharded",
    "head_layout",
    "heads_written",
    "over_groups",
    "place_ranks",
    "rank_config",
    "rank_lora",
    "rank_weights",
    "reduce_scatter",
    "reordered_pieces",
    "shard",
    "sharding_strategy",
    "stage_mesh",
    "strided_order",
    "token_plan",
    "unobserved_ranks",
    "unstrided_order",
]
