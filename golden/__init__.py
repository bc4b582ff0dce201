"""What attention means: a float64 NumPy model of every stage of an attention layer.

Nothing here knows of the implementation under test, and nothing here loads torch.
"""

from golden.arrays import Positions
from golden.attention import Attended, attend, visible_keys
from golden.blockwise import attend_blockwise
from golden.blockwise_gradients import attend_blockwise_vjp
from golden.cache import ContiguousCache, empty_cache, filled_cache
from golden.caches.chunk import ChunkCache, chunk_cache
from golden.caches.held import Cache, Held
from golden.caches.paged import PagedCache, paged_cache, slot_mapping
from golden.caches.quantised import QuantisedCache
from golden.caches.rolling import RollingCache, kernel_bucket, rolling_cache
from golden.caches.sharded import ShardedCache, sharded_cache
from golden.caches.transposed import TransposedCache, transposed_cache
from golden.config import AttentionConfig, Eagle3AttentionConfig, QKNorm, TemperatureTuning
from golden.encoder_decoder import cross_attention
from golden.errors import ConfigError, GoldenError, ShapeError
from golden.formats import FORMATS, Format, format_named
from golden.gradients import (
    AttendGradients,
    LayerGradients,
    attend_vjp,
    context_encoding_vjp,
    token_generation_vjp,
)
from golden.layer import (
    LayerResult,
    Projected,
    context_encoding,
    encode_projected,
    generate_projected,
    project_qkv,
    token_generation,
)
from golden.lora import Lora, make_lora
from golden.masks import Causal, Chunked, Everything, Explicit, Mask, SlidingWindow, layer_mask
from golden.norms import NormedInput, add_and_normalise
from golden.packing import Packing, packed_forward
from golden.quantisation import Quantisation
from golden.rope import attention_factor, rope_cos_sin, rope_frequencies, rotate
from golden.rope_config import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    RopeConfig,
    YarnScaling,
)
from golden.rope_scalings import deepseek_yarn_scaling, yarn_mscale
from golden.row_plan import RowPlan, plan_rows
from golden.row_sampling import attend_rows
from golden.segments import SameSegment
from golden.serving import ForwardResult, Step, attend_with_cache, forward
from golden.speculation import accept_drafts, tree_depths, tree_mask, verify_tree
from golden.split_kv import attend_parts, cut_keys, merge_attended
from golden.stack import Stack, StackResult, run_stack
from golden.stages import (
    CALL_STAGES,
    GRADIENT_STAGES,
    STAGES,
    Accumulation,
    Array,
    Capture,
    Observer,
    unobserved,
)
from golden.weights import AttentionWeights, fuse_qkv, make_weights, split_qkv, weight_shapes
from golden.windowed import windowed_encoding

__all__ = [
    "CALL_STAGES",
    "FORMATS",
    "GRADIENT_STAGES",
    "STAGES",
    "Accumulation",
    "Array",
    "AttendGradients",
    "Attended",
    "AttentionConfig",
    "AttentionWeights",
    "Cache",
    "Capture",
    "Causal",
    "ChunkCache",
    "Chunked",
    "ConfigError",
    "ContiguousCache",
    "DynamicNTKScaling",
    "Eagle3AttentionConfig",
    "Everything",
    "Explicit",
    "Format",
    "ForwardResult",
    "GoldenError",
    "Held",
    "LayerGradients",
    "LayerResult",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "Lora",
    "Mask",
    "NormedInput",
    "Observer",
    "Packing",
    "PagedCache",
    "Positions",
    "Projected",
    "ProportionalScaling",
    "QKNorm",
    "Quantisation",
    "QuantisedCache",
    "RollingCache",
    "RopeConfig",
    "RowPlan",
    "SameSegment",
    "ShapeError",
    "ShardedCache",
    "SlidingWindow",
    "Stack",
    "StackResult",
    "Step",
    "TemperatureTuning",
    "TransposedCache",
    "YarnScaling",
    "accept_drafts",
    "add_and_normalise",
    "attend",
    "attend_blockwise",
    "attend_blockwise_vjp",
    "attend_parts",
    "attend_rows",
    "attend_vjp",
    "attend_with_cache",
    "attention_factor",
    "chunk_cache",
    "context_encoding",
    "context_encoding_vjp",
    "cross_attention",
    "cut_keys",
    "deepseek_yarn_scaling",
    "empty_cache",
    "encode_projected",
    "filled_cache",
    "format_named",
    "forward",
    "fuse_qkv",
    "generate_projected",
    "kernel_bucket",
    "layer_mask",
    "make_lora",
    "make_weights",
    "merge_attended",
    "packed_forward",
    "paged_cache",
    "plan_rows",
    "project_qkv",
    "rolling_cache",
    "rope_cos_sin",
    "rope_frequencies",
    "rotate",
    "run_stack",
    "sharded_cache",
    "slot_mapping",
    "split_qkv",
    "token_generation",
    "token_generation_vjp",
    "transposed_cache",
    "tree_depths",
    "tree_mask",
    "unobserved",
    "verify_tree",
    "visible_keys",
    "weight_shapes",
    "windowed_encoding",
    "yarn_mscale",
]
