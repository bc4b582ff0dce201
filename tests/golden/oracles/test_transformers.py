"""Golden against the attention layers of transformers, both in float64.

transformers writes float32 out for softmax, norms and angles; `float32_means_float64` lifts those
so that its layers compute in float64 throughout, and the models' own mask functions and caches
decide what a query sees. Facts pinned here:

* gpt_oss: YaRN without truncation and its factor on cos and sin; one learned sink per query head,
  in the denominator only; biases on all four projections; the window counts the query's own key.
* llama: llama3 scaling, from position 0 and from 9000, with kept, blended and divided
  frequencies; YaRN with truncation and with a given attention factor.
* llama4: chunks aligned to multiples of the chunk size (to the row's first token under left
  padding); interleaved pairs; the unweighted norm after RoPE; on layers without RoPE the query's
  temperature `1 + 0.1 log(1 + floor((p + 1) / floor_scale))`, floor_scale 4.
* mistral: window without sinks. qwen2: biases on q, k, v alone. qwen3: RMS norm per head before
  RoPE. phi: leading half of the head rotates; layer norm with weight and bias.
* gemma3: norm weights stored as `w - 1`, softmax_scale from query_pre_attn_scalar, linear
  scaling by 8. gemma2: soft cap before the mask. olmo: clamp of q, k, v. olmo2: norm over the
  whole projection. hunyuan: weighted norm after RoPE. glm: interleaved pairs in the leading half.
* All: which key/value head a query head reads, softmax weights, prefill and decode with the cache
  that `generate` would use (rolling where the layer has a window or chunk), left padding.
"""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from float64_agreement import assert_agrees, roundoff
from numpy.typing import NDArray
from transformers_layers import LAYERS, SMALL, Array, Oracle

import golden

pytest.importorskip(
    "transformers", reason="the transformers oracle needs transformers: pip install .[oracles]"
)

BATCH, LENGTH = 2, 29
START = 9000
"""Far enough out that float32 angles are wrong in the fourth digit; a multiple of the chunk."""

# A value passes projections of 48 terms in and up to 128 out, heads 16 wide, 29 keys and some 40
# roundings of norm, RoPE and softmax; scores stay below 12, asserted below. Far out this is
# stricter than the worst case: where the two libraries' powers of theta differ in the last bit,
# angles at 9000 differ by up to 2e-13 radians (0.2 * 9000 unit roundoffs; frequencies that are
# not exactly 1 are below 0.2). Errors of that size seldom align: 4e-14 is the largest seen.
LARGEST_SCORE = 12.0
LIMIT = roundoff(terms=48 + 128 + 16 + 29 + 40, score=LARGEST_SCORE)

COUNTS_FROM_ITS_CACHE = {"llama4-nope-temperature"}
"""Takes positions from its cache, not from position_ids: only starts at 0, without padding."""

PREFILLS = [
    (name, start)
    for name in LAYERS
    for start in (0, START)
    if start == 0 or name not in COUNTS_FROM_ITS_CACHE
]


def hidden_states(length: int = LENGTH) -> Array:
    return np.random.default_rng(1).normal(size=(BATCH, length, int(SMALL["hidden_size"])))


def positions_from(start: int, length: int = LENGTH) -> NDArray[np.int64]:
    return np.tile(np.arange(start, start + length), (BATCH, 1))


def assert_prefill_agrees(
    oracle: Oracle, config: golden.AttentionConfig, start: int
) -> golden.Capture:
    """Assert that golden, so configured, encodes a prompt as the oracle does; return its stages."""
    hidden, positions = hidden_states(), positions_from(start)
    output, weights = oracle.run(hidden, positions)
    capture = golden.Capture()
    result = golden.context_encoding(
        config, oracle.weights, hidden, position_ids=positions, observe=capture
    )
    assert_agrees("weights", capture.values["weights"], weights, limit=LIMIT)
    assert_agrees("output", result.output, output, limit=LIMIT)
    return capture


def test_the_limit_is_below_1e_12() -> None:
    assert LIMIT < 1e-12


@pytest.mark.parametrize(("name", "start"), PREFILLS)
def test_prefill_agrees(name: str, start: int) -> None:
    capture = assert_prefill_agrees(Oracle(layer=LAYERS[name]), LAYERS[name].config, start)
    assert np.abs(capture.values["scores"]).max() <= LARGEST_SCORE


@pytest.mark.parametrize("name", LAYERS)
def test_decode_with_the_model_s_own_cache_agrees(name: str) -> None:
    layer = LAYERS[name]
    oracle = Oracle(layer=layer)
    hidden, positions = hidden_states(), positions_from(0)
    theirs = oracle.new_cache()
    ours = golden.empty_cache(layer.config, batch=BATCH, max_length=LENGTH)
    start = 0
    for length in (LENGTH - 8, 1, 1, 1, 1, 3, 1):  # prefill, then decode; 3 as in speculation
        step = slice(start, start + length)
        expected, _ = oracle.run(hidden[:, step], positions[:, step], theirs)
        enter = golden.token_generation if start else golden.context_encoding
        output, ours = enter(
            layer.config,
            oracle.weights,
            hidden[:, step],
            position_ids=positions[:, step],
            cache=ours,
        )
        assert_agrees(f"output from position {start}", output, expected, limit=LIMIT)
        start += length
    keys = theirs.layers[layer.layer].keys.numpy()
    held = keys.shape[2]  # a rolling cache keeps the last of them
    assert_agrees("cached keys", ours.k[:, :, -held:], keys, limit=LIMIT)


@pytest.mark.parametrize("name", sorted(LAYERS.keys() - COUNTS_FROM_ITS_CACHE))
def test_left_padded_rows_agree_on_their_tokens(name: str) -> None:
    layer = LAYERS[name]
    oracle = Oracle(layer=layer)
    hidden = hidden_states()
    padding = np.array([0, 5])
    positions = np.maximum(positions_from(0) - padding[:, None], -1)
    expected, _ = oracle.run(hidden, np.abs(positions), occupied=positions >= 0)
    output = golden.context_encoding(
        layer.config, oracle.weights, hidden, position_ids=positions
    ).output
    for row, first in enumerate(padding):
        assert_agrees(f"row {row}", output[row, first:], expected[row, first:], limit=LIMIT)


def _rope(config: golden.AttentionConfig, **changes: object) -> golden.AttentionConfig:
    assert config.rope is not None
    return replace(config, rope=replace(config.rope, **changes))


def _norm(config: golden.AttentionConfig, **changes: object) -> golden.AttentionConfig:
    assert config.qk_norm is not None
    return replace(config, qk_norm=replace(config.qk_norm, **changes))


def _misread(name: str) -> list[golden.AttentionConfig]:
    """Return configurations near a layer's that mean something else."""
    config = LAYERS[name].config
    wrong = []
    if config.sliding_window is not None:
        wrong += [replace(config, sliding_window=config.sliding_window + d) for d in (-1, 1)]
    if config.attention_chunk_size is not None:
        wrong += [replace(config, attention_chunk_size=config.attention_chunk_size + 1)]
    if config.softcap is not None:
        wrong += [replace(config, softcap=None)]
    if config.clip_qkv is not None:
        wrong += [replace(config, clip_qkv=config.clip_qkv * 1.001)]
    if config.temperature_tuning is not None:
        tuning = config.temperature_tuning
        wrong += [
            replace(config, temperature_tuning=replace(tuning, floor_scale=5)),
            replace(config, temperature_tuning=None),
        ]
    if config.qk_norm is not None:
        wrong += [_norm(config, eps=config.qk_norm.eps * 2)]
        if config.qk_norm.weight_offset:
            wrong += [_norm(config, weight_offset=0.0)]
        if config.qk_norm.scope == "head" and config.qk_norm.weighted:
            other = {"pre_rope": "post_rope", "post_rope": "pre_rope"}[config.qk_norm.placement]
            wrong += [_norm(config, placement=other)]
    if config.rope is not None:
        other = {"half": "interleaved", "interleaved": "half"}[config.rope.pairing]
        wrong += [
            _rope(config, pairing=other),
            _rope(config, theta=config.rope.theta * 1.001),
            replace(config, rope=None),
        ]
        if config.rope.scaling is not None:
            wrong += [_rope(config, scaling=None)]
        if isinstance(config.rope.scaling, golden.YarnScaling):
            yarn = config.rope.scaling
            wrong += [
                _rope(config, scaling=replace(yarn, truncate=not yarn.truncate)),
                _rope(config, scaling=replace(yarn, attention_factor=1.0)),
            ]
        if config.rope.rotary_dim:
            wrong += [_rope(config, rotary_dim=0)]
    return [*wrong, replace(config, softmax_scale=config.softmax_scale * 1.001)]


@pytest.mark.parametrize("name", LAYERS)
def test_comparison_rejects_every_nearby_configuration(name: str) -> None:
    oracle = Oracle(layer=LAYERS[name])
    start = 0 if name in COUNTS_FROM_ITS_CACHE else START
    for config in _misread(name):
        with pytest.raises(AssertionError, match="exceeds bound"):
            assert_prefill_agrees(oracle, config, start)


def test_comparison_rejects_a_sink_left_out() -> None:
    oracle = Oracle(layer=LAYERS["gpt_oss-sliding"])
    oracle.weights = replace(oracle.weights, sinks=None)
    with pytest.raises(AssertionError, match="exceeds bound"):
        assert_prefill_agrees(oracle, oracle.layer.config, 0)


def test_comparison_rejects_transformers_with_its_float32_steps() -> None:
    oracle = Oracle(layer=LAYERS["llama-llama3"], exact=False)
    with pytest.raises(AssertionError, match="exceeds bound"):
        assert_prefill_agrees(oracle, oracle.layer.config, START)


HELD_ELSEWHERE = {"fused_qkv"}
"""Fields that say how weights are stored; no model here stores them so."""


def test_every_field_of_the_configuration_is_held_against_a_model() -> None:
    plain = golden.AttentionConfig(hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
    for field in fields(plain):
        if field.name in HELD_ELSEWHERE:
            continue
        assert any(
            getattr(layer.config, field.name) != getattr(plain, field.name)
            for layer in LAYERS.values()
        ), f"no layer of transformers sets {field.name}; add one, or name it in HELD_ELSEWHERE"
