"""Every forward path, every kind of layer and of cache, once: the table the proofs run through.

`test_routes.py` fails when `impl` has a route, a cache or an argument that no path here takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from path_layers import LAYERS

import golden
from golden import Quantisation

CACHED, BLOCK = (7, 4), 4
"""Tokens that each row of the batch has cached before a step that reads a cache; a page's slots."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Path:
    """One call of forward.

    Attributes:
        layer: a key of `LAYERS`.
        q_len: tokens of the call.
        cached: whether the cache holds `CACHED` tokens before it.
        among: which of a decode step's own tokens see which, `(q_len, q_len)`, bool; None in
            prefill and for one token.
        mask: of a prefill: `tokens` `(batch, seq_len)`, `square` `(1, 1, seq_len, seq_len)`, or
            `none`.
        padding: tokens at the end of the second row that are none, at its start where
            `padding_side` is left; of a prefill under a mask of `tokens`.
        manager: whether the layer reads and writes its cache itself.
        own_slots: whether that cache is of the kind the layer needs: rolling or chunk.
        slots: of the cache of a sequence, and positions that the layer must reach; 0 is enough.
        seq_ids: cache line of each row, of `LINES`; None takes lines in order.
        stored: how keys and how values are stored; None is as they are.
        cores: that keep a sequence together and are joined (flash decoding), each its own cache;
            1 is none.
        packed: new and cached tokens of each of the sequences packed into one row; None is one
            sequence a row.
        window: `windowed_context_encoding_window_idx`.
        given: further arguments of forward: `norm and residual`, `adapters`, `cos_cache`,
            `rotary_position_ids`, `kvcache_buffer`, `scatter_index`, and with cached keys
            `attention_mask`.
        run: fields of `NeuronConfig`.
    """

    layer: str
    q_len: int = 5
    cached: bool = False
    among: np.ndarray[Any, Any] | None = None
    mask: str = "tokens"
    padding: int = 2
    manager: bool = False
    own_slots: bool = False
    slots: int = 0
    seq_ids: tuple[int, ...] | None = None
    stored: tuple[Quantisation, Quantisation] | None = None
    cores: int = 1
    packed: tuple[tuple[int, int], ...] | None = None
    window: int = -1
    given: tuple[str, ...] = ()
    run: Mapping[str, Any] = field(default_factory=dict)


LINES = 3
"""Lines of a cache that is addressed by `seq_ids`."""


def _pages(size: int = BLOCK, **run: Any) -> dict[str, Any]:
    return {"is_block_kv_layout": True, "pa_num_blocks": 80, "pa_block_size": size, **run}


def _prefill(layer: str, **more: Any) -> Path:
    return Path(layer=layer, **more)


def _decode(layer: str, **more: Any) -> Path:
    return Path(layer=layer, **{"q_len": 1, "cached": True, **more})


def _served(layer: str, **more: Any) -> Path:
    """A decode step that reads its cache and writes it."""
    return _decode(layer, manager=True, **more)


_CHAIN = np.tril(np.ones((3, 3), dtype=bool))
_TREE = golden.tree_mask([-1, 0, 0])
_DRAFT: dict[str, Any] = {"q_len": 3, "among": _CHAIN}
_LEFT = {"padding_side": "left"}
_PREFIX = {"is_prefix_caching": True}
_BLOCK = {"attn_block_tkg_nki_kernel_enabled": True}
_PER_HEAD, _PER_CHANNEL = np.array([0.03125, 0.0625]), np.full((2, 8), 0.015625)
_STORED = {
    "float8_e4m3fn": (Quantisation("float8_e4m3fn"),) * 2,
    "float8_e5m2": (Quantisation("float8_e5m2"),) * 2,
    "float8_e4m3fn, scaled": (
        Quantisation("float8_e4m3fn", 0.5),
        Quantisation("float8_e4m3fn", 2.0),
    ),
    "int8, a scale a head": (Quantisation("int8", _PER_HEAD),) * 2,
    "int8, a scale a channel": (Quantisation("int8", _PER_CHANNEL),) * 2,
}
_DECODED_ALONE = ("longrope", "unit-norm", "deepseek", "axes-mixed", "block")
"""Layers whose prefill is that of another layer: only their rotation differs, or their decode."""

PATHS: dict[str, Path] = {
    **{f"prefill {layer}": _prefill(layer) for layer in LAYERS if layer not in _DECODED_ALONE},
    **{f"decode {layer}": _decode(layer) for layer in LAYERS},
    "prefill full, square mask": _prefill("full", mask="square"),
    "prefill window, no mask": _prefill("window", mask="none"),
    "prefill chunk, no mask": _prefill("chunk", mask="none"),
    "prefill full, fused norm and residual": _prefill("full", given=("norm and residual",)),
    "prefill full, adapters": _prefill("full", given=("adapters",)),
    "decode full, adapters": _decode("full", given=("adapters",)),
    "prefill window, positions for RoPE": _prefill("window", given=("rotary_position_ids",)),
    "prefill full, cos and sin given": _prefill("full", given=("cos_cache", "sin_cache")),
    "decode full, draft": _decode("full", **_DRAFT),
    "decode window, draft": _decode("window", **_DRAFT),
    "decode full, mask of slots": _decode("full", given=("attention_mask",)),
    "decode full, tree": _decode("full", q_len=3, among=_TREE),
    "prefill full, padding on the left": _prefill("full", run=_LEFT),
    # the streamed kernels and PyTorch's own
    "prefill nope, streamed": _prefill("nope", q_len=512, padding=200),
    "prefill window-polar, streamed, padding on the left": _prefill(
        "window-polar", q_len=256, padding=100, run={**_LEFT, "logical_nc_config": 2}
    ),
    "prefill flat-norm, PyTorch's fused attention": _prefill("flat-norm", q_len=512, padding=200),
    "prefill full, PyTorch's fused attention": _prefill("full", q_len=512, padding=200),
    "decode full, streamed": _decode("full", slots=1024),
    "decode fused, tree, transposed keys, streamed": _decode(
        "fused", q_len=3, among=_TREE, slots=1024, run={"k_cache_transposed": True}
    ),
    # a prompt whose start is cached
    "prefill full, first window": _prefill(
        "full", window=0, mask="none", run={"windowed_context_encoding_size": 5}
    ),
    **{
        f"prefill {layer}, second window": _prefill(
            layer, cached=True, window=1, run={"windowed_context_encoding_size": 5}
        )
        for layer in ("full", "window", "chunk", "nope")
    },
    "prefill full, second window, mask of slots": _prefill(
        "full",
        cached=True,
        window=1,
        given=("attention_mask",),
        run={"windowed_context_encoding_size": 5},
    ),
    **{
        f"prefill {layer} after a cached prefix": _prefill(
            layer, q_len=129, cached=True, run=_PREFIX
        )
        for layer in ("full", "window-polar")
    },
    "prefill full after a cached prefix, streamed": _prefill(
        "full", q_len=129, cached=True, run={**_PREFIX, "logical_nc_config": 2}
    ),
    "prefill full after a cached prefix, pages": _prefill(
        "full", q_len=129, cached=True, manager=True, run=_pages(32, **_PREFIX)
    ),
    # each kind of cache, written by a prompt and read and written by a step
    "prefill full, cache written": _prefill("full", manager=True),
    "decode full, cache read and written": _served("full"),
    "decode full, draft, cache read and written": _served("full", **_DRAFT),
    "decode full, cache in a buffer": _served("full", given=("kvcache_buffer",)),
    "prefill full, lines by sequence": _prefill("full", manager=True, seq_ids=(2, 0)),
    "decode full, lines by sequence": _served("full", seq_ids=(2, 0)),
    "decode full, lines by sequence, one unknown": _served("full", seq_ids=(1, -1)),
    **{
        f"prefill {layer}, its own cache written": _prefill(
            layer, q_len=6, manager=True, own_slots=True
        )
        for layer in ("window", "chunk")
    },
    **{
        f"decode {layer}, its own cache": _served(layer, own_slots=True)
        for layer in ("window", "window-polar", "chunk")
    },
    "decode window, draft, its own cache": _served(
        "window", own_slots=True, **_DRAFT, run={"speculation_length": 3}
    ),
    "decode window, its own cache in a kernel's bucket": _served(
        "window", own_slots=True, run={"attn_block_tkg_nki_kernel_cascaded_attention": True}
    ),
    "prefill full, pages written": _prefill("full", manager=True, run=_pages()),
    "decode full, pages": _served("full", run=_pages()),
    "decode full, pages by slot": _served("full", given=("scatter_index",), run=_pages()),
    "decode full, tiled pages": _served("full", slots=128, run=_pages(64, **_PREFIX)),
    "prefill full, tiled cache written": _prefill(
        "full", manager=True, slots=256, run={"kv_cache_tiling": True}
    ),
    "decode full, tiled cache": _served("full", slots=256, run={"kv_cache_tiling": True}),
    "prefill full, left-padded cache written": _prefill("full", manager=True, run=_LEFT),
    "decode full, left-padded cache": _served("full", run=_LEFT),
    "decode fused, transposed keys": _decode("fused", run={"k_cache_transposed": True}),
    "decode fused, transposed keys, cache read and written": _served(
        "fused", run={"k_cache_transposed": True}
    ),
    "decode full, core-sharded cache": _served("full", run={"flash_decoding_enabled": True}),
    "decode full, cores joined": _served("full", cores=2, run={"flash_decoding_enabled": True}),
    **{
        f"prefill full, {kind} cache written": _prefill("full", manager=True, stored=stored)
        for kind, stored in _STORED.items()
    },
    **{
        f"decode full, {kind} cache": _served("full", stored=stored)
        for kind, stored in _STORED.items()
    },
    "decode window, its own float8_e5m2 cache": _served(
        "window", own_slots=True, stored=_STORED["float8_e5m2"]
    ),
    # sequences packed into one row
    "packed full": _prefill(
        "full", q_len=7, packed=((3, 0), (1, 0), (2, 0)), run={"is_chunked_prefill": True}
    ),
    **{
        f"packed {layer}, pages": _prefill(
            layer,
            q_len=8,
            manager=True,
            packed=((3, 4), (1, 7), (0, 2), (2, 0)),
            run=_pages(is_chunked_prefill=True),
        )
        for layer in ("full", "window-polar")
    },
    # a whole decode step as one function
    **{
        f"decode block, one function{more}": Path(
            layer="block",
            q_len=1,
            cached=True,
            manager=manager,
            given=("norm and residual",),
            run={**_BLOCK, "k_cache_transposed": manager},
        )
        for more, manager in (("", False), (", transposed keys, cache read and written", True))
    },
    # a cache that a decode step writes in place
    **{
        f"decode {layer}, {kind} written in place": _served(
            layer,
            q_len=q_len,
            among=_CHAIN if q_len > 1 else None,
            own_slots=layer == "window",
            given=("norm and residual", *given),
            run={**_BLOCK, "attn_block_tkg_nki_kernel_cache_update": True, **run},
        )
        for layer, kind, q_len, given, run in (
            ("block", "buffer", 1, ("kvcache_buffer",), {}),
            ("block", "cache", 3, (), {}),
            ("window", "cache", 1, (), {}),
            ("fused", "pages", 1, (), _pages()),
            ("block", "pages", 1, (), _pages()),
        )
    },
}
