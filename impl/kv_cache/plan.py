"""From a configuration to the cache of each layer, and what cannot be combined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from impl.config import InferenceConfig
from impl.errors import ConfigError, UnsupportedError, explain
from impl.kv_cache.dense import TILE, DenseCache
from impl.kv_cache.paged import PagedCache, block_tiles
from impl.neuron_config import NeuronConfig
from impl.slot_positions import (
    ChunkSlots,
    ContiguousSlots,
    LeftPaddedSlots,
    RollingSlots,
    ShardGroupSlots,
    ShardSlots,
    SlotLayout,
)

LayerCache: TypeAlias = DenseCache | PagedCache

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


def kernel_cache_slots(slots: int, multiple: int = TILE) -> int:
    """Slots that the cascaded block kernel wants for a ring of `slots`: 11 become 128.

    An exact multiple gets a whole spare bucket: 128 become 256.

    Source: neuronx-distributed-inference, `get_kernel_cache_size_bucket`.
    """
    return (slots // multiple + 1) * multiple


def layer_kinds(config: InferenceConfig) -> tuple[str, ...]:
    """Kind of each layer, as `layer_types` says or as the window or chunk of all of them does.

    Raises:
        ConfigError: an unknown kind, or one without its window or chunk.
    """
    needed = {
        SLIDING: ("sliding_window", config.sliding_window),
        CHUNKED: ("attention_chunk_size", config.attention_chunk_size),
    }
    if config.layer_types is None:
        given = [kind for kind, (_, size) in needed.items() if size is not None]
        if len(given) > 1:
            raise ConfigError(
                explain(
                    "layer_types",
                    "be given with sliding_window and attention_chunk_size",
                    None,
                    "a layer is windowed or chunked",
                )
            )
        return tuple(given or [FULL]) * config.num_hidden_layers
    for kind in config.layer_types:
        if kind not in (FULL, *needed):
            raise ConfigError(explain("layer_types", f"be among {(FULL, *needed)}", kind))
        name, size = needed.get(kind, ("", 1))
        if size is None:
            raise ConfigError(explain(name, f"be given for a layer of {kind}", None))
    return tuple(config.layer_types)


def plan_caches(
    config: InferenceConfig, num_kv_head: int | None, *, core: int | None = None
) -> tuple[LayerCache, ...]:
    """Cache of each layer.

    A full layer gets a contiguous cache (core-sharded under flash decoding, appended to where
    padding is on the left), a windowed one a rolling cache, a chunked one a chunk cache; a block
    layout pages them all.

    Args:
        config: the model and how it is run.
        num_kv_head: KV heads of this rank; None is the model's.
        core: this core's rank in its flash-decoding group; None keeps all its cores' slots.

    Raises:
        ConfigError: a field is missing or does not fit another.
        UnsupportedError: a combination that no cache here keeps.
    """
    run = config.neuron_config
    kinds = layer_kinds(config)
    _check(run, kinds)
    if num_kv_head is None:
        if run.tp_degree > 1:
            raise ConfigError(
                explain("num_kv_head", f"be given when tp_degree is {run.tp_degree}", None)
            )
        num_kv_head = config.kv_heads
    if run.is_block_kv_layout:
        return (_paged(run, num_kv_head, config.head_width),) * len(kinds)
    lines = run.cache_lines // run.attention_dp_degree
    return tuple(_dense(config, kind, lines=lines, heads=num_kv_head, core=core) for kind in kinds)


def _dense(
    config: InferenceConfig, kind: str, *, lines: int, heads: int, core: int | None
) -> DenseCache:
    run = config.neuron_config
    layout = _layout(config, kind, core)
    slots = layout.slots_for(run.cache_slots)
    rolling = isinstance(layout, RollingSlots)
    if rolling and run.attn_block_tkg_nki_kernel_cascaded_attention:
        slots = kernel_cache_slots(slots)
    return DenseCache(
        layout=layout,
        lines=lines,
        heads=heads,
        slots=slots,
        width=config.head_width,
        # A windowed layer keeps its keys as rows, as its attention expects.
        k_transposed=run.k_cache_transposed and not rolling,
        tiled=run.kv_cache_tiling and slots > TILE and slots % TILE == 0,
    )


def _layout(config: InferenceConfig, kind: str, core: int | None) -> SlotLayout:
    run = config.neuron_config
    if kind == SLIDING:
        assert config.sliding_window is not None
        return RollingSlots.of(config.sliding_window, run.speculation_length)
    if kind == CHUNKED:
        assert config.attention_chunk_size is not None
        return ChunkSlots(config.attention_chunk_size)
    if run.flash_decoding_enabled:
        cores = config.num_cores_per_group
        if core is not None:
            return ShardSlots(core, cores)
        return ShardGroupSlots(cores, -(-run.cache_slots // cores))
    return LeftPaddedSlots() if run.padding_side == "left" else ContiguousSlots()


def _paged(run: NeuronConfig, heads: int, width: int) -> PagedCache:
    if run.pa_num_blocks is None or run.pa_block_size is None:
        raise ConfigError(
            explain(
                "pa_num_blocks and pa_block_size",
                "be given when is_block_kv_layout is True",
                f"{run.pa_num_blocks} and {run.pa_block_size}",
            )
        )
    tiles = 1
    kernels = run.attn_tkg_nki_kernel_enabled or run.attn_block_tkg_nki_kernel_enabled
    if run.is_prefix_caching and not kernels:
        tiles = block_tiles(run.pa_block_size, -(-run.cache_slots // run.pa_block_size))
    return PagedCache(
        blocks=run.pa_num_blocks,
        heads=heads,
        block_size=run.pa_block_size,
        width=width,
        heads_first=run.is_chunked_prefill,
        tiles=tiles,
    )


def _check(run: NeuronConfig, kinds: Sequence[str]) -> None:
    drafts = run.speculation_length > 1
    left = run.padding_side == "left"
    refused = (
        (
            drafts and CHUNKED in kinds,
            "speculation_length",
            "be at most 1 with attention chunks",
            run.speculation_length,
            "drafts rejected past a chunk's end have emptied its cache",
        ),
        (
            drafts and left,
            "speculation_length",
            'be at most 1 when padding_side is "left"',
            run.speculation_length,
            "rejected drafts would leave every slot shifted",
        ),
        (
            left and (run.flash_decoding_enabled or run.is_block_kv_layout),
            "padding_side",
            'be "right" in a core-sharded or paged cache',
            "left",
            "its slots follow from positions",
        ),
        (
            run.flash_decoding_enabled and run.is_block_kv_layout,
            "flash_decoding_enabled",
            "be False when is_block_kv_layout is True",
            True,
            "blocks belong to one core",
        ),
        (
            run.is_prefix_caching and run.is_chunked_prefill,
            "is_prefix_caching",
            "be False when is_chunked_prefill is True",
            True,
            "each stores its blocks in a layout of its own",
        ),
        (
            run.kv_cache_tiling and (run.k_cache_transposed or run.is_block_kv_layout),
            "kv_cache_tiling",
            "be False with transposed keys or blocks",
            True,
            "it tiles the rows of a dense cache",
        ),
        (
            run.kv_cache_tiling and (run.cache_slots <= TILE or run.cache_slots % TILE != 0),
            "max_length",
            f"be a multiple of {TILE} above it when kv_cache_tiling is True",
            run.cache_slots,
            "",
        ),
    )
    for wrong, argument, rule, got, hint in refused:
        if wrong:
            raise UnsupportedError(explain(argument, rule, got, hint))
