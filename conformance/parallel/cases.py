"""Layers on meshes: which combinations are judged.

Every pair of values of two of these is in some case, as far as a layer may have both: mesh (world
size, context and data parallel degrees), heads, mask, form of the QKV projection, biases, sinks,
norms, sequence parallelism, order of dispatch, dtype, and how the prompt comes: whole, in pieces
over the cache, or packed.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from conformance.errors import UsageError
from conformance.extras import Extras
from conformance.parallel.workloads import ParallelWorkload
from golden import AttentionConfig, GoldenError, QKNorm, RopeConfig
from golden.sharding import Parallelism

HEAD_DIM = 8
HIDDEN = 48
LENGTHS = (48, 31, 1, 40, 48, 17, 48, 5)
"""Tokens of each prompt; rows are padded to the longest."""
PACKED_LENGTHS = (19, 12, 1, 16, 23, 7, 13, 5)
"""Those of prompts that are packed into `PACKED_ROWS` rows."""
PACKED_ROWS = 2
PIECE = 24
"""Tokens of a call of a prompt in pieces."""
CHUNK = 16
WINDOW = 5


def _meshes() -> Iterator[tuple[int, int, int]]:
    for world, cp, dp in itertools.product((1, 2, 4, 8), (1, 2, 4), (1, 2)):
        if world % cp == 0 and world % dp == 0 and (cp == 1 or cp % dp == 0):
            yield world, cp, dp


AXES: Mapping[str, tuple[Any, ...]] = {
    "mesh": tuple(_meshes()),
    "heads": ((8, 8), (8, 2), (8, 1), (7, 1), (14, 2), (6, 2), (4, 4)),
    "mask": ("full", "window", "chunk"),
    "qkv": ("separate", "fused"),
    "bias": ("none", "qkv", "qkvo"),
    "sinks": (False, True),
    "norm": ("none", "head", "flat"),
    "sequence": ("whole", "pieces", "strided"),
    "dispatch": ("AR_AG", "RS_AG", "AG_AR"),
    "dtype": ("float32", "bfloat16"),
    "reduce": ("float32", "own"),
    "prompt": ("whole", "pieces", "packed"),
}
"""What varies, and its values."""


def build_case(values: Mapping[str, Any], steps: int = 2) -> ParallelWorkload:
    """Make the case of a value for each of `AXES`.

    Raises:
        UsageError: no layer may have them together.
    """
    (world, cp, dp), (heads, kv) = values["mesh"], values["heads"]
    chunk = CHUNK if values["mask"] == "chunk" else None
    norm = values["norm"]
    config = AttentionConfig(
        hidden_size=HIDDEN,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=HEAD_DIM,
        qkv_bias=values["bias"] != "none",
        o_bias=values["bias"] == "qkvo",
        fused_qkv=values["qkv"] == "fused",
        qk_norm=None
        if norm == "none"
        else QKNorm(scope="head" if norm == "head" else "projection"),
        rope=RopeConfig(theta=10000.0),
        sliding_window=WINDOW if values["mask"] == "window" else None,
        attention_chunk_size=chunk,
        learned_sinks_size=1 if values["sinks"] else None,
    )
    spread = Parallelism(
        tp_degree=world,
        cp_degree=cp,
        attention_dp_degree=dp,
        sequence_parallel=values["sequence"] == "pieces",
        strided=values["sequence"] == "strided",
        ep_dispatch=values["dispatch"],
        reduce_dtype=None if values["reduce"] == "own" else "float32",
    )
    if chunk is not None and config.learned_sinks_size is not None:
        raise UsageError("learned sinks are not supported for chunked attention")
    packed, pieces = values["prompt"] == "packed", values["prompt"] == "pieces"
    if packed and chunk is not None:
        raise UsageError("packed rows are not supported for chunked attention")
    if pieces and spread.strided and PIECE // cp <= HEAD_DIM:
        raise UsageError("the strided kernel needs more queries than head_dim")
    return ParallelWorkload(
        config=config,
        parallelism=spread,
        lengths=PACKED_LENGTHS if packed else LENGTHS,
        steps=steps,
        piece=PIECE if pieces else 0,
        packed=PACKED_ROWS if packed else 0,
        dtype=values["dtype"],
        stages=("attn",),
    )


def transitions() -> list[ParallelWorkload]:
    """Eight decode steps after a prefill, for each mesh whose decode is cut otherwise."""
    plain = {axis: choices[0] for axis, choices in AXES.items()}
    made = []
    for i, mesh in enumerate(AXES["mesh"]):
        if mesh[1] == mesh[2]:
            continue
        values = {
            **plain,
            "mesh": mesh,
            "heads": (8, 2) if i % 2 else (7, 1),
            "mask": "window" if i % 3 == 0 else "full",
            "sinks": bool(i % 2),
            "bias": "qkvo",
            "prompt": AXES["prompt"][i % 3],
        }
        try:
            made.append(build_case(values, steps=8))
        except (UsageError, GoldenError):
            made.append(build_case({**values, "heads": (8, 1)}, steps=8))
    return made


def adapters() -> list[ParallelWorkload]:
    """LoRA on every mesh in both dtypes: shards alike in both phases, and unlike.

    What else the layer has is drawn: heads copied and padded, fused weights, pieces and strides of
    a sequence, norms, biases, orders of dispatch.
    """
    rng = random.Random(7)
    made = []
    for mesh, dtype in itertools.product(AXES["mesh"], AXES["dtype"]):
        drawn = _completions(("mesh", mesh, "dtype", dtype), rng, count=100)
        case = next(
            case
            for values in drawn
            if values["prompt"] != "packed" and (case := _case_or_none(values)) is not None
        )
        made.append(replace(case, extras=Extras(adapters=3, rank=4)))
    return made


def flash_decoding() -> list[ParallelWorkload]:
    """Eight decode steps with a KV head's tokens spread over the ranks that share it."""
    plain = {axis: choices[0] for axis, choices in AXES.items()}
    made = []
    layers = (
        ((4, 1, 1), (8, 2), 2, True, "pieces"),
        ((8, 1, 1), (7, 1), 8, False, "whole"),
        ((8, 1, 1), (8, 2), 4, True, "whole"),
    )
    for (mesh, heads, cores, sinks, prompt), dtype in itertools.product(layers, AXES["dtype"]):
        values = {"mesh": mesh, "heads": heads, "sinks": sinks, "prompt": prompt, "dtype": dtype}
        case = build_case({**plain, **values}, steps=8)
        spread = replace(case.parallelism, cores_per_group=cores)
        made.append(replace(case, parallelism=spread, stages=("logsumexp_sent", "attn")))
    return made


def parallel_cases() -> list[ParallelWorkload]:
    """Return the cases: pairwise coverage of `AXES`, transitions, adapters, flash decoding."""
    rng = random.Random(6)
    wanted = set(_possible_pairs())
    made: dict[str, ParallelWorkload] = {}
    while wanted:
        best: tuple[int, dict[str, Any], ParallelWorkload] | None = None
        for seed_pair in rng.sample(sorted(wanted, key=str), min(8, len(wanted))):
            for values in _completions(seed_pair, rng):
                case = _case_or_none(values)
                if case is None:
                    continue
                gain = len(wanted & set(_pairs(values)))
                if best is None or gain > best[0]:
                    best = (gain, values, case)
        if best is None:
            break
        wanted -= set(_pairs(best[1]))
        made[best[2].id] = best[2]
    return [*made.values(), *transitions(), *adapters(), *flash_decoding()]


def _pairs(values: Mapping[str, Any]) -> Iterator[tuple[str, Any, str, Any]]:
    for one, other in itertools.combinations(AXES, 2):
        yield one, values[one], other, values[other]


def _possible_pairs() -> Iterator[tuple[str, Any, str, Any]]:
    """Every pair that some layer may have: the rest of its values being plain, or one step off."""
    rng = random.Random(0)
    for one, other in itertools.combinations(AXES, 2):
        for a, b in itertools.product(AXES[one], AXES[other]):
            pair = (one, a, other, b)
            if any(_case_or_none(values) is not None for values in _completions(pair, rng, 40)):
                yield pair


def _completions(
    pair: tuple[str, Any, str, Any], rng: random.Random, count: int = 6
) -> Iterator[dict[str, Any]]:
    for _ in range(count):
        values = {axis: rng.choice(choices) for axis, choices in AXES.items()}
        yield {**values, pair[0]: pair[1], pair[2]: pair[3]}


def _case_or_none(values: Mapping[str, Any]) -> ParallelWorkload | None:
    try:
        return build_case(values)
    except (UsageError, GoldenError):
        return None
