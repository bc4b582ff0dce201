"""Stacks of interleaved layers and the caches they call for."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from golden import (
    AttentionConfig,
    ChunkCache,
    ConfigError,
    ContiguousCache,
    RollingCache,
    RopeConfig,
    Stack,
    TemperatureTuning,
    empty_cache,
    forward,
    run_stack,
)
from tests.golden.features.served import whole
from tests.golden.layers import LAYERS, assert_within, identical, integer_weights, small_integers

GLOBAL = AttentionConfig(
    hidden_size=8, num_attention_heads=2, num_key_value_heads=1, rope=RopeConfig(theta=1e6)
)
LOCAL = replace(GLOBAL, sliding_window=3, rope=RopeConfig(theta=1e4))
CHUNKED = replace(GLOBAL, attention_chunk_size=3)
NOPE = replace(
    GLOBAL, rope=None, softmax_scale=0.25, temperature_tuning=TemperatureTuning(floor_scale=4.0)
)

GEMMA3 = Stack({"local": LOCAL, "global": GLOBAL}, ("local",) * 5 + ("global",), 8)
LLAMA4 = Stack({"chunked": CHUNKED, "nope": NOPE}, ("chunked",) * 3 + ("nope",), 4)
GPT_OSS = Stack({"window": LOCAL, "global": GLOBAL}, ("window", "global"), 4)


def test_s1_published_patterns() -> None:
    assert GEMMA3.layers == (LOCAL,) * 5 + (GLOBAL,) + (LOCAL,) * 2
    assert LLAMA4.layers == (CHUNKED, CHUNKED, CHUNKED, NOPE)
    assert GPT_OSS.layers == (LOCAL, GLOBAL, LOCAL, GLOBAL)


def test_each_layer_gets_the_smallest_cache_of_its_kind() -> None:
    kinds = [type(c) for c in GPT_OSS.caches(batch=1, max_length=9)]
    assert kinds == [RollingCache, ContiguousCache] * 2
    assert [type(c) for c in LLAMA4.caches(batch=1, max_length=9)] == [
        ChunkCache,
        ChunkCache,
        ChunkCache,
        ContiguousCache,
    ]
    short = GPT_OSS.caches(batch=1, max_length=2)  # the ring would be no smaller
    assert [type(c) for c in short] == [ContiguousCache] * 4
    speculative = GPT_OSS.caches(batch=1, max_length=9, speculation_length=4)[0]
    assert isinstance(speculative, RollingCache)
    assert speculative.ring == 3 + 4 - 2


@pytest.mark.parametrize("stack", [GEMMA3, LLAMA4, GPT_OSS])
def test_a_stack_is_its_layers_in_order_with_residuals(stack: Stack) -> None:
    weights = [integer_weights(config, seed) for seed, config in enumerate(stack.layers)]
    hidden = small_integers(1, 2, 7, 8)
    positions = np.tile(np.arange(7), (2, 1))
    caches = stack.caches(batch=2, max_length=9)
    result = run_stack(stack, weights, hidden, position_ids=positions, caches=caches)
    again: Any = hidden
    for config, layer_weights, cache, written in zip(
        stack.layers, weights, caches, result.caches, strict=True
    ):
        alone = forward(config, layer_weights, again, position_ids=positions, cache=cache)
        again = again + alone.output
        at = np.full((2, 1), 7)
        assert all(map(identical, alone.cache.prior(at), written.prior(at)))
    assert identical(result.hidden_states, again)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_stack_of_one_decodes_what_it_encodes(layer: str) -> None:
    config = LAYERS[layer]
    stack = Stack({"only": config}, ("only",), 1)
    sequences = whole(config, 0, 2, 9)
    caches, rows = stack.caches(batch=2, max_length=9), []
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9)):
        result = run_stack(
            stack,
            [integer_weights(config)],
            sequences.states[:, start:stop],
            position_ids=sequences.positions[:, start:stop],
            caches=caches,
        )
        caches = result.caches
        rows.append(result.hidden_states)
    want = sequences.states + sequences.output
    # the residual adds one rounding to either side
    bound = sequences.bound + 2.0**-52 * (np.abs(want) + sequences.bound)
    assert_within(np.concatenate(rows, axis=1), want, bound)


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="pattern must name kinds among global for at least one"):
        Stack({"global": GLOBAL}, ("local",), 2)
    with pytest.raises(ConfigError, match="kinds must share one hidden_size"):
        Stack({"a": GLOBAL, "b": replace(GLOBAL, hidden_size=16)}, ("a", "b"), 2)
    with pytest.raises(ConfigError, match=re.escape("one per layer, 4, got 0 and 1")):
        run_stack(
            GPT_OSS,
            [],
            np.zeros((1, 1, 8)),
            position_ids=[0],
            caches=[empty_cache(GLOBAL, batch=1, max_length=1)],
        )
