"""Production attention for torch-neuronx, and by the same code for cpu and cuda.

`NeuronAttentionBase` is the attention module of NxD Inference, by its names, on one rank.
"""

from impl.attention import NeuronAttentionBase
from impl.config import InferenceConfig
from impl.errors import (
    AttentionError,
    ConfigError,
    DeviceError,
    ShapeError,
    StateDictError,
    UnsupportedError,
)
from impl.gqa import GQA, GroupQueryAttention_O, GroupQueryAttention_QKV
from impl.kv_cache import KVCacheManager
from impl.neuron_config import NeuronConfig
from impl.norms import L2Norm, QKNormPlacement, QKNormScope, RMSNorm
from impl.output import NeuronAttentionBaseOutput
from impl.rope import (
    PolarRotaryEmbedding,
    RotaryEmbedding,
    apply_rotary_polar_compatible,
    apply_rotary_pos_emb,
)
from impl.rope_frequencies import RotaryFrequencies
from impl.sink import LearnedSink
from impl.strategy import FlashAttentionStrategy, get_flash_attention_strategy

__all__ = [
    "GQA",
    "AttentionError",
    "ConfigError",
    "DeviceError",
    "FlashAttentionStrategy",
    "GroupQueryAttention_O",
    "GroupQueryAttention_QKV",
    "InferenceConfig",
    "KVCacheManager",
    "L2Norm",
    "LearnedSink",
    "NeuronAttentionBase",
    "NeuronAttentionBaseOutput",
    "NeuronConfig",
    "PolarRotaryEmbedding",
    "QKNormPlacement",
    "QKNormScope",
    "RMSNorm",
    "RotaryEmbedding",
    "RotaryFrequencies",
    "ShapeError",
    "StateDictError",
    "UnsupportedError",
    "apply_rotary_polar_compatible",
    "apply_rotary_pos_emb",
    "get_flash_attention_strategy",
]
