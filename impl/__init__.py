"""Production attention for torch-neuronx, and by the same code for cpu and cuda.

`NeuronAttentionBase` is the attention module of NxD Inference, by its names; `impl.parallel` runs
it on many ranks.
"""

from impl.attention import NeuronAttentionBase
from impl.config import InferenceConfig
from impl.devices import EnvironmentReport, Runtime, environment_report, get_runtime
from impl.errors import (
    AttentionError,
    ConfigError,
    DeviceError,
    ShapeError,
    StateDictError,
    UnsupportedError,
)
from impl.gqa import GroupQueryAttention_O, GroupQueryAttention_QKV
from impl.kv_cache import KVCacheManager
from impl.lora import LoraServingConfig
from impl.neuron_config import NeuronConfig
from impl.norms import L2Norm, QKNormPlacement, QKNormScope, RMSNorm
from impl.output import NeuronAttentionBaseOutput
from impl.parallel.sharding_strategy import GQA
from impl.rope import PolarRotaryEmbedding, RotaryEmbedding
from impl.rope_frequencies import RotaryFrequencies
from impl.rotation import apply_rotary_polar_compatible, apply_rotary_pos_emb
from impl.sink import LearnedSink
from impl.strategy import FlashAttentionStrategy, get_flash_attention_strategy

__all__ = [
    "GQA",
    "AttentionError",
    "ConfigError",
    "DeviceError",
    "EnvironmentReport",
    "FlashAttentionStrategy",
    "GroupQueryAttention_O",
    "GroupQueryAttention_QKV",
    "InferenceConfig",
    "KVCacheManager",
    "L2Norm",
    "LearnedSink",
    "LoraServingConfig",
    "NeuronAttentionBase",
    "NeuronAttentionBaseOutput",
    "NeuronConfig",
    "PolarRotaryEmbedding",
    "QKNormPlacement",
    "QKNormScope",
    "RMSNorm",
    "RotaryEmbedding",
    "RotaryFrequencies",
    "Runtime",
    "ShapeError",
    "StateDictError",
    "UnsupportedError",
    "apply_rotary_polar_compatible",
    "apply_rotary_pos_emb",
    "environment_report",
    "get_flash_attention_strategy",
    "get_runtime",
]
