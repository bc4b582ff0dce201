"""Key/value caches: what is kept of earlier tokens, and where.

`KVCacheManager` keeps the caches of all layers. Reads give keys and values as the layer takes them
in `past_key_value`; updates are functional or in place, with static shapes and no host sync.
"""

from impl.kv_cache.codec import CODE_DTYPES, Codec
from impl.kv_cache.dense import DenseCache
from impl.kv_cache.lines import IDLE, cache_lines
from impl.kv_cache.manager import KeyValue, KVCacheManager
from impl.kv_cache.paged import PagedCache, slot_mapping
from impl.kv_cache.plan import LayerCache, kernel_cache_slots, layer_kinds

__all__ = [
    "CODE_DTYPES",
    "IDLE",
    "Codec",
    "DenseCache",
    "KVCacheManager",
    "KeyValue",
    "LayerCache",
    "PagedCache",
    "cache_lines",
    "kernel_cache_slots",
    "layer_kinds",
    "slot_mapping",
]
