"""Draws the cases of the calibration: every dtype, regime, phase and feature, S from 16 to 4096."""

from __future__ import annotations

from typing import Any

import numpy as np

from conformance.cases import DTYPES, REGIMES, Case, Workload
from golden import AttentionConfig

_HEADS = ((4, 2), (4, 4), (8, 1), (7, 1), (6, 3))
_FEATURES: tuple[dict[str, Any], ...] = (
    {},
    {"sinks": 1},
    {"window": 1},
    {"window": 16},
    {"window": 128, "sinks": 1},
    {"window": 33},
    {"chunk": 48},
    {"chunk": 128, "sinks": 1},
    {"softcap": 20.0},
    {"softcap": 50.0, "window": 64},
)
_PROMPT_KEYS = 512
"""Most keys of a prompt whose every token queries; longer ones have few queries."""
_LONG_KEYS = 4096
_LONG_QUERIES = 24

COMPILED_EVERY = 40
"""One case in that many is also run by the kernels that compile anew for each shape."""


def calibration_case(index: int) -> Case:
    """Return the case of an index, the same whenever it is asked for.

    Dtypes, regimes, features and phases take turns, so any run of indices covers them evenly;
    lengths are drawn, evenly in their logarithm.
    """
    rng = np.random.default_rng([index, 20250101])
    feature = _FEATURES[index % len(_FEATURES)]
    dtype = DTYPES[index // 10 % len(DTYPES)]
    regime = REGIMES[(index // 30 + index) % len(REGIMES)]
    heads, kv_heads = _HEADS[int(rng.integers(len(_HEADS)))]
    head_dim = int(rng.choice([32, 64, 128]))
    config = AttentionConfig(
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        sliding_window=feature.get("window"),
        attention_chunk_size=feature.get("chunk"),
        learned_sinks_size=feature.get("sinks"),
        softcap=feature.get("softcap"),
    )
    workload = _workload((index // 3 + index // 10) % 4, rng)
    return Case(
        config=config, workload=workload, dtype=dtype, regime=regime, seed=index, scope="core"
    )


def _workload(kind: int, rng: np.random.Generator) -> Workload:
    if kind == 0:  # prompts: the first row sees one key
        return Workload(phase="cte", lengths=_two(_length(rng, _PROMPT_KEYS), rng))
    if kind == 1:  # a later part of a prompt
        queries = int(rng.integers(1, _LONG_QUERIES + 1))
        prior = max(_length(rng, _LONG_KEYS) - queries, 1)
        return Workload(phase="cte", lengths=(queries,), prior=prior)
    if kind == 2:
        return Workload(phase="tkg", lengths=_two(_length(rng, _LONG_KEYS), rng))
    # several tokens one after the other, one row with an empty cache: one visible key
    return Workload(
        phase="tkg", lengths=(_length(rng, _LONG_KEYS) - 4, 0), steps=int(rng.integers(1, 5))
    )


def _length(rng: np.random.Generator, longest: int) -> int:
    return round(float(np.exp(rng.uniform(np.log(16), np.log(longest)))))


def _two(length: int, rng: np.random.Generator) -> tuple[int, ...]:
    return length, int(rng.integers(1, length + 1))


def runs_compiled(index: int) -> bool:
    """Tell whether the case of an index is run by compiling kernels too."""
    return index % COMPILED_EVERY == 7
