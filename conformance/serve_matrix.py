"""Which schedules a tier holds: every cache with every kind of call, and layers that interact.

Prompts are longer and shorter than windows, chunks and blocks, end on their edges and beside them,
and rows are of unequal length. Windows and chunks are 16, blocks 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from conformance.cases import DTYPES, Case, Workload
from conformance.extras import NO_EXTRAS, Extras
from conformance.schedule_ids import parse_cache, parse_parts
from conformance.schedules import Schedule
from conformance.tiers import checked_tier
from golden import AttentionConfig, QKNorm, RopeConfig

_REGIMES = {
    "smoke": ("gaussian",),
    "standard": ("gaussian", "peaked"),
    "full": ("gaussian", "peaked", "outlier", "large"),
}
_SEEDS = {"smoke": 1, "standard": 1, "full": 3}

_HALF = RopeConfig()
_POLAR = RopeConfig(pairing="interleaved")
_LAYER = AttentionConfig(
    hidden_size=256, num_attention_heads=8, num_key_value_heads=2, head_dim=32, rope=_HALF
)
_WINDOW = replace(_LAYER, sliding_window=16)
_CHUNK = replace(_LAYER, attention_chunk_size=16)
_RICH = replace(_LAYER, rope=_POLAR, learned_sinks_size=1, softcap=20.0, qkv_bias=True, o_bias=True)
_NORMED = replace(_LAYER, qk_norm=QKNorm(), num_key_value_heads=8, fused_qkv=True)


class _Served(NamedTuple):
    layer: AttentionConfig
    cache: str
    parts: str
    cached: tuple[int, ...] = (0, 0)
    extras: Extras = NO_EXTRAS


_CALLS = (
    "prompt33_17.decode3",
    "prompt16_9.prompt8_17.decode2",
    "prompt20_33.draft4keep2_1.decode1.draft4keep4_3.decode2",
)
"""A prompt and decode; a prefill on a cached prefix; drafts, some of them rejected."""

_ON_EVERY_LAYER = ("contiguous", "transposed", "paged8", "sharded2")
"""Caches that take any layer; rolling and chunk caches need theirs."""


def _layouts() -> Iterator[_Served]:
    """Yield every cache with every kind of call."""
    for parts in _CALLS:
        for cache in _ON_EVERY_LAYER:
            yield _Served(_LAYER, cache, parts)
        yield _Served(_WINDOW, "rolling", parts)
    # drafts that cross the end of a chunk and are rejected would have lost it
    yield _Served(_CHUNK, "chunk", _CALLS[0])
    yield _Served(_CHUNK, "chunk", _CALLS[1])
    yield _Served(_CHUNK, "chunk", "prompt20_33.draft4keep2_1.decode1.draft4keep4_3.decode9")


def _layers() -> Iterator[_Served]:
    """Yield layers whose features meet a cache's."""
    for parts in _CALLS:
        for layer in (_RICH, _NORMED, _WINDOW, _CHUNK):
            yield _Served(layer, "contiguous", parts)
        yield _Served(_RICH, "paged8", parts)
        sinks = replace(_WINDOW, learned_sinks_size=1, rope=_POLAR, softcap=20.0)
        yield _Served(sinks, "rolling", parts)
    yield _Served(replace(_CHUNK, rope=_POLAR, qk_norm=QKNorm()), "chunk", _CALLS[0])
    one_group = replace(_LAYER, num_attention_heads=7, num_key_value_heads=1)
    yield _Served(one_group, "contiguous", _CALLS[2])
    # rank-dependent merging counts the sink once
    yield _Served(_RICH, "sharded4", _CALLS[0])


def _ways() -> Iterator[_Served]:
    """Yield other ways of calling: pieces, trees, left padding, packing, joining and leaving."""
    tree = "prompt20_33.tree0_0_1_1to3_2.decode1.tree0_1_0to0_2.decode2"
    joining = "prompt19at2.prompt7_12at0_3.decode2at3_x_2_0.prompt9at2new.decode2at0_2"
    packed = "packed12_3_20.packed1_17_5at2_0_1.decode1"
    pieces = "pieces40_23by16.decode2"
    left = "left33_17.decode3"
    for layer, caches in (
        (_LAYER, ("contiguous", "paged8")),
        (_RICH, ("contiguous",)),
        (_WINDOW, ("contiguous", "rolling")),
    ):
        for cache in caches:
            yield _Served(layer, cache, tree)
            yield _Served(layer, cache, joining, (0, 0, 0, 0))
            yield _Served(layer, cache, pieces)
            yield _Served(layer, cache, left)
    for layer in (_LAYER, _RICH, _WINDOW):
        yield _Served(layer, "paged8", packed, (0, 0, 0))
    yield _Served(_CHUNK, "chunk", joining, (0, 0, 0, 0))
    yield _Served(_CHUNK, "chunk", pieces)
    yield _Served(_LAYER, "transposed", joining, (0, 0, 0, 0))


def _corners() -> Iterator[_Served]:
    """Yield edges of windows, chunks and blocks, empty and long caches."""
    one = replace(_LAYER, sliding_window=1)
    yield _Served(one, "contiguous", "prompt5_3.prompt2.decode2")
    yield _Served(one, "rolling", "prompt5_3.prompt2.draft3keep1_2.decode2")
    yield _Served(replace(_LAYER, sliding_window=2), "rolling", "prompt5_1.decode3")
    yield _Served(_WINDOW, "rolling", "prompt5_3.decode14")
    yield _Served(_WINDOW, "rolling", "prompt15_16.decode2.prompt1_17.decode2")
    yield _Served(_CHUNK, "chunk", "prompt15_16.decode2.prompt17_1.decode2")
    yield _Served(_LAYER, "paged8", "prompt7_8.decode2.prompt7_1.decode2")
    yield _Served(_LAYER, "contiguous", "decode3")
    # from 128 tokens on a prompt behind a cached prefix is served as prefill, not as decode
    yield _Served(_RICH, "paged8", "prompt40_21.prompt130_128.decode1")
    yield _Served(_WINDOW, "contiguous", "prompt40_21.prompt129.decode1")
    yield _Served(_LAYER, "contiguous", "prompt3.decode1", (20, 0))
    small = replace(_LAYER, num_attention_heads=2, num_key_value_heads=1)
    yield _Served(small, "contiguous", "prompt3.decode1", (16400,))
    # long enough for a kernel that streams
    streamed = replace(small, learned_sinks_size=1, sliding_window=96)
    yield _Served(streamed, "contiguous", "prompt19.prompt520.decode1", (0,))
    yield _Served(replace(small, sliding_window=16), "rolling", "prompt3.decode1", (16400,))
    yield _Served(replace(small, attention_chunk_size=16), "chunk", "prompt5.decode1", (16407,))


def _stored() -> Iterator[_Served]:
    """Yield quantised caches."""
    for cache in ("contiguous_e4m3", "contiguous_e5m2", "contiguous_e4m3tensor"):
        yield _Served(_LAYER, cache, _CALLS[0])
    for cache in ("contiguous_int8head", "contiguous_int8channel", "paged8_e4m3head"):
        yield _Served(_LAYER, cache, _CALLS[1])
    yield _Served(_WINDOW, "rolling_e4m3", _CALLS[2])


def _brought() -> Iterator[_Served]:
    """Yield what a call brings, from row to row and from step to step."""
    lora = Extras(adapters=2, rank=4)
    joining = "prompt19at2.prompt7_12at0_3.decode2at3_x_2_0.decode1at0_2"
    yield _Served(_LAYER, "contiguous", joining, (0, 0, 0, 0), lora)
    yield _Served(_LAYER, "contiguous", _CALLS[2], (0, 0), lora)
    for interleaved in (False, True):
        rope = RopeConfig(mrope_section=(4, 6, 6), mrope_interleaved=interleaved)
        yield _Served(replace(_LAYER, rope=rope), "contiguous", _CALLS[1])
    yield _Served(_LAYER, "contiguous", _CALLS[0], (0, 0), Extras(input_norm=True, residual=True))


_SMOKE = {
    "contiguous": _CALLS[2],
    "transposed": _CALLS[0],
    "paged8": _CALLS[1],
    "rolling": _CALLS[2],
    "chunk": _CALLS[0],
    "sharded2": _CALLS[0],
    "contiguous_e4m3": _CALLS[0],
}
"""What the smoke tier serves: a schedule a cache, on the cache's plain layer."""


def _in_smoke(served: _Served) -> bool:
    plain = served.layer in (_LAYER, _WINDOW, _CHUNK) and served.extras == NO_EXTRAS
    return (
        plain
        and _SMOKE.get(served.cache) == served.parts
        and not (served.cache == "contiguous" and served.layer != _LAYER)
    )


def serving_cases(tier: str) -> list[Case]:
    """Return the schedules of a tier."""
    builders = (_layouts, _layers, _ways, _corners, _stored, _brought)
    served = [one for builder in builders for one in builder()]
    if checked_tier(tier) == "smoke":
        served = [one for one in served if _in_smoke(one)]
    return [
        _case(one, dtype=dtype, regime=regime, seed=seed)
        for one in dict.fromkeys(served)
        for dtype in DTYPES
        for regime in _REGIMES[tier]
        for seed in range(_SEEDS[tier])
    ]


def _case(one: _Served, **drawn: Any) -> Case:
    schedule = Schedule(cache=parse_cache(one.cache), parts=parse_parts(one.parts, len(one.cached)))
    work = Workload(phase="serve", lengths=one.cached, schedule=schedule)
    return Case(config=one.layer, workload=work, extras=one.extras, **drawn)
