from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import (
    LAYERS,
    BoolArray,
    U,
    assert_within,
    attend_by_hand,
    final_queries,
    gamma,
    identical,
    integer_weights,
    layer_bound,
    normal,
    sampled,
    small_integers,
)

import golden.layer
from golden import (
    Accumulation,
    Array,
    AttentionConfig,
    AttentionWeights,
    Capture,
    ConfigError,
    LayerResult,
    Observer,
    Positions,
    QKNorm,
    RopeConfig,
    ShapeError,
    TemperatureTuning,
    context_encoding,
    empty_cache,
    encode_projected,
    generate_projected,
    project_qkv,
    token_generation,
    unobserved,
)
from golden.layer import merge_heads, split_heads


def hidden_states(config: AttentionConfig, seed: int, batch: int, length: int) -> Array:
    return small_integers(seed, batch, length, config.hidden_size)


def sees(config: AttentionConfig, query: int, key: int) -> bool:
    if query < 0 or key < 0 or key > query:
        return False
    if config.sliding_window is not None and query - key >= config.sliding_window:
        return False
    chunk = config.attention_chunk_size
    return chunk is None or query // chunk == key // chunk


def pairs_seen(config: AttentionConfig, positions: Positions) -> BoolArray:
    """Return `(batch, num_attention_heads, length, length)`, True = attend."""
    table = [[[sees(config, i, j) for j in row] for i in row] for row in positions.tolist()]
    return np.repeat(np.array(table)[:, None], config.num_attention_heads, axis=1)


def norm_by_hand(
    row: list[float], norm: QKNorm, weight: Array | None, bias: Array | None
) -> list[float]:
    centre = math.fsum(row) / len(row) if norm.kind == "layer" else 0.0
    root = math.sqrt(math.fsum((x - centre) ** 2 for x in row) / len(row) + norm.eps)
    unit = [(x - centre) / root for x in row]
    if weight is not None:
        unit = [x * (norm.weight_offset + float(w)) for x, w in zip(unit, weight, strict=True)]
    if bias is not None:
        unit = [x + float(b) for x, b in zip(unit, bias, strict=True)]
    return unit


def turn_by_hand(row: list[float], rope: RopeConfig, position: int) -> list[float]:
    width = rope.rotary_dim or len(row)
    out = list(row)
    for i in range(width // 2):
        first, second = (2 * i, 2 * i + 1) if rope.pairing == "interleaved" else (i, i + width // 2)
        angle = position * math.exp(-2.0 * i / width * math.log(rope.theta))
        out[first] = row[first] * math.cos(angle) - row[second] * math.sin(angle)
        out[second] = row[second] * math.cos(angle) + row[first] * math.sin(angle)
    return out


def heads_by_hand(
    config: AttentionConfig,
    states: list[float],
    position: int,
    heads: int,
    matrices: tuple[Array, Array | None, Array | None, Array | None],
    *,
    kind: str,
) -> list[list[float]]:
    """Return one token's heads: project, clip, normalise, rotate, normalise, tune."""
    projection, bias, weight, norm_bias = matrices
    flat = [math.fsum(float(w) * x for w, x in zip(row, states, strict=True)) for row in projection]
    if bias is not None:
        flat = [x + float(b) for x, b in zip(flat, bias, strict=True)]
    if config.clip_qkv is not None:
        flat = [min(max(x, -config.clip_qkv), config.clip_qkv) for x in flat]
    norm = config.qk_norm if kind != "v" else None
    if norm is not None and norm.scope == "projection":
        flat = norm_by_hand(flat, norm, weight, norm_bias)
    size = config.head_dim
    split = [flat[head * size : (head + 1) * size] for head in range(heads)]
    if norm is not None and norm.scope == "head" and norm.placement == "pre_rope":
        split = [norm_by_hand(head, norm, weight, norm_bias) for head in split]
    if config.rope is not None and kind != "v":
        split = [turn_by_hand(head, config.rope, position) for head in split]
    if norm is not None and norm.placement == "post_rope":
        split = [norm_by_hand(head, norm, weight, norm_bias) for head in split]
    tuning = config.temperature_tuning
    if tuning is not None and kind == "q":
        factor = 1.0 + tuning.attn_scale * math.log(1 + (position + 1) // tuning.floor_scale)
        split = [[factor * x for x in head] for head in split]
    return split


def layer_by_hand(
    config: AttentionConfig, weights: AttentionWeights, states: Array, positions: Positions
) -> Array:
    """The layer as its documentation orders it, token by token, for whole sequences."""
    w = weights
    heads = {
        "q": (config.num_attention_heads, (w.q_proj, w.q_bias, w.q_norm, w.q_norm_bias)),
        "k": (config.num_key_value_heads, (w.k_proj, w.k_bias, w.k_norm, w.k_norm_bias)),
        "v": (config.num_key_value_heads, (w.v_proj, w.v_bias, None, None)),
    }
    made = {
        kind: np.array(
            [
                [
                    heads_by_hand(config, token.tolist(), position, count, matrices, kind=kind)
                    for token, position in zip(sequence, row.tolist(), strict=True)
                ]
                for sequence, row in zip(states, positions, strict=True)
            ]
        ).swapaxes(1, 2)
        for kind, (count, matrices) in heads.items()
    }
    mixed, _ = attend_by_hand(
        made["q"],
        made["k"],
        made["v"],
        pairs_seen(config, positions),
        scale=config.softmax_scale,
        softcap=config.softcap,
        sinks=w.sinks,
    )
    output = np.zeros((*states.shape[:2], config.hidden_size))
    for b, t, c in np.ndindex(output.shape):
        row = mixed[b, :, t].reshape(-1).tolist()
        output[b, t, c] = math.fsum(float(x) * y for x, y in zip(w.o_proj[c], row, strict=True))
        output[b, t, c] += 0.0 if w.o_bias is None else float(w.o_bias[c])
    return output


def encode(
    config: AttentionConfig,
    states: Array,
    positions: Any,
    *,
    observe: Observer = unobserved,
    seed: int = 0,
) -> LayerResult:
    weights = integer_weights(config, seed)
    return context_encoding(config, weights, states, position_ids=positions, observe=observe)


def bound_of(
    config: AttentionConfig, states: Array, positions: Positions, *, seed: int = 0
) -> Array:
    """Bound two evaluations of the same whole sequences against each other."""
    capture = Capture()
    encode(config, states, positions, observe=capture, seed=seed)
    return layer_bound(
        config,
        integer_weights(config, seed),
        capture,
        pairs_seen(config, positions),
        last_position=int(positions.max()),
    )


def check_against_hand(name: str, seed: int, start: int, observe: Observer = unobserved) -> None:
    config = LAYERS[name]
    states = hidden_states(config, seed, 2, 6)
    positions = np.stack([np.arange(start, start + 6), np.arange(6)])
    got = encode(config, states, positions, observe=observe, seed=seed).output
    want = layer_by_hand(config, integer_weights(config, seed), states, positions)
    assert_within(got, want, bound_of(config, states, positions, seed=seed))


# The layer, derived twice


@pytest.mark.parametrize("start", [0, 3, 511])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_its_steps_in_their_documented_order(name: str, start: int) -> None:
    for seed in range(3):
        check_against_hand(name, seed, start)


def positions_ignored(
    stage: str, value: Array, accumulation: Accumulation | None = None, /
) -> Array:
    return 0.0 * value if stage == "rope_angles" else value


def keys_slightly_too_long(
    stage: str, value: Array, accumulation: Accumulation | None = None, /
) -> Array:
    return value * (1.0 + 1e-9) if stage == "k_cache" else value


def values_of_the_next_head(
    stage: str, value: Array, accumulation: Accumulation | None = None, /
) -> Array:
    return np.roll(value, 1, axis=1) if stage == "attn" else value


def clip_skipped(stage: str, value: Array, accumulation: Accumulation | None = None, /) -> Array:
    return 2.0 * value if stage == "v_clip" else value


def temperature_skipped(
    stage: str, value: Array, accumulation: Accumulation | None = None, /
) -> Array:
    return value / (1.0 + 1e-3) if stage == "q_temperature" else value


@pytest.mark.parametrize(
    ("name", "defect"),
    [
        ("mha", positions_ignored),
        ("mha", keys_slightly_too_long),
        ("gqa-bias-rms", values_of_the_next_head),
        ("nope-temperature-clip-cap", clip_skipped),
        ("nope-temperature-clip-cap", temperature_skipped),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_the_comparison_with_the_steps_sees_a_defect(name: str, defect: Observer) -> None:
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_against_hand(name, 0, 3, defect)


@pytest.mark.parametrize("name", ["window-sinks", "chunk-post-norm"])
def test_the_comparison_with_the_steps_sees_a_plain_causal_mask(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden.layer, "layer_mask", lambda config: golden.Causal())
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_against_hand(name, 0, 0)


# Context encoding and token generation


@pytest.mark.parametrize("name", LAYERS)
@sampled
@given(
    seed=st.integers(0, 2**16),
    cuts=st.lists(st.integers(1, 9), max_size=9, unique=True).map(sorted),
)
def test_prefill_then_decode_in_steps_of_any_size_is_one_prefill(
    name: str, seed: int, cuts: list[int]
) -> None:
    config = LAYERS[name]
    weights = integer_weights(config, seed)
    states = hidden_states(config, seed, 2, 10)
    positions = np.tile(np.arange(10), (2, 1))
    whole = encode(config, states, positions, seed=seed)
    cache, rows = empty_cache(config, batch=2, max_length=12), []
    for start, stop in zip([0, *cuts], [*cuts, 10], strict=True):
        step = token_generation if start else context_encoding
        result = step(
            config,
            weights,
            states[:, start:stop],
            position_ids=positions[:, start:stop],
            cache=cache,
        )
        rows.append(result.output)
        cache = result.cache
    bound = bound_of(config, states, positions, seed=seed)
    assert_within(np.concatenate(rows, axis=1), whole.output, bound)
    assert (cache.positions[:, :10] == positions).all()
    assert (cache.positions[:, 10:] == -1).all()
    norms = np.linalg.norm(whole.cache.k, axis=-1, keepdims=True)
    assert_within(cache.k[:, :, :10], whole.cache.k, gamma(64) * norms)
    assert identical(np.ascontiguousarray(cache.v[:, :, :10]), whole.cache.v)


def test_decode_one_by_one_across_position_16384_is_one_prefill() -> None:
    for name in ("window-sinks", "chunk-post-norm"):
        config = LAYERS[name]
        states = hidden_states(config, 1, 1, 8)
        positions = np.arange(16380, 16388)[None]
        cache, rows = empty_cache(config, batch=1, max_length=16388), []
        for t in range(8):
            result = token_generation(
                config,
                integer_weights(config),
                states[:, t : t + 1],
                position_ids=positions[:, t : t + 1],
                cache=cache,
            )
            rows.append(result.output)
            cache = result.cache
        # most of the 16388 slots are empty and add only zeros to a sum
        want, bound = encode(config, states, positions).output, bound_of(config, states, positions)
        assert_within(np.concatenate(rows, axis=1), want, bound)


def test_decode_rows_of_a_batch_stand_at_their_own_positions() -> None:
    config, lengths = LAYERS["window-sinks"], [2, 7, 0]
    weights = integer_weights(config)
    states = hidden_states(config, 1, 3, 8)
    positions = np.tile(np.arange(8), (3, 1))
    held = np.where(positions < np.array(lengths)[:, None], positions, -1)
    cache = context_encoding(
        config,
        weights,
        states,
        position_ids=held,
        cache=empty_cache(config, batch=3, max_length=8),
    ).cache
    at = np.array(lengths)[:, None]
    step = token_generation(
        config,
        weights,
        np.take_along_axis(states, at[..., None], axis=1),
        position_ids=at,
        cache=cache,
    )
    want = encode(config, states, positions).output
    bound = bound_of(config, states, positions)
    for row, length in enumerate(lengths):
        assert_within(step.output[row, 0], want[row, length], bound[row, length])


@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e308])
def test_decode_reads_no_slot_beyond_its_position(junk: float) -> None:
    config = LAYERS["mha"]
    weights = integer_weights(config)
    states = hidden_states(config, 1, 2, 5)
    start = context_encoding(
        config,
        weights,
        states[:, :3],
        position_ids=np.arange(3),
        cache=empty_cache(config, batch=2, max_length=6),
    ).cache
    k, v = start.k.copy(), start.v.copy()
    k[:, :, 4:], v[:, :, 4:] = junk, junk
    filled = golden.filled_cache(config, k, v, [3, 3])
    clean, dirty = (
        token_generation(config, weights, states[:, 3:4], position_ids=[3], cache=cache)
        for cache in (start, filled)
    )
    assert identical(dirty.output, clean.output)


def test_decode_leaves_the_cache_it_was_given_as_it_was() -> None:
    config = LAYERS["mha"]
    cache = empty_cache(config, batch=1, max_length=4)
    token_generation(
        config,
        integer_weights(config),
        hidden_states(config, 1, 1, 2),
        position_ids=[0, 1],
        cache=cache,
    )
    assert not cache.k.any()
    assert (cache.positions == -1).all()


def test_an_idle_row_writes_nothing_and_holds_the_bias_alone() -> None:
    config = LAYERS["gqa-bias-rms"]
    weights = integer_weights(config)
    cache = empty_cache(config, batch=2, max_length=4)
    result = token_generation(
        config, weights, hidden_states(config, 1, 2, 1), position_ids=[[-1], [2]], cache=cache
    )
    assert weights.o_bias is not None
    assert identical(result.output[0, 0], weights.o_bias)
    assert result.cache.positions.tolist() == [[-1] * 4, [-1, -1, 2, -1]]
    assert not result.cache.k[0].any()


def test_prefill_reads_the_prompt_only_and_keeps_what_the_cache_held() -> None:
    config = LAYERS["mha"]
    weights = integer_weights(config)
    states = hidden_states(config, 1, 1, 6)
    held = context_encoding(
        config,
        weights,
        states[:, :3],
        position_ids=np.arange(3),
        cache=empty_cache(config, batch=1, max_length=6),
    ).cache
    later = context_encoding(
        config, weights, states[:, 3:], position_ids=np.arange(3, 6), cache=held
    )
    fresh = context_encoding(config, weights, states[:, 3:], position_ids=np.arange(3, 6))
    assert identical(later.output, fresh.output)
    assert later.cache.positions.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert identical(later.cache.k[:, :, :3], held.k[:, :, :3])


def test_prefill_makes_a_cache_just_long_enough() -> None:
    config = LAYERS["mha"]
    states = hidden_states(config, 1, 2, 3)
    ragged = encode(config, states, np.array([[-1, 0, 1], [2, 3, 4]]))
    assert ragged.cache.positions.tolist() == [[0, 1, -1, -1, -1], [-1, -1, 2, 3, 4]]
    assert encode(config, states, np.full((2, 3), -1)).cache.positions.shape == (2, 1)


def test_the_cache_stores_keys_after_norm_and_rope_and_values_as_projected() -> None:
    for config in LAYERS.values():
        capture = Capture()
        states = hidden_states(config, 1, 1, 4)
        result = encode(config, states, np.arange(4)[None], observe=capture)
        values = capture.values
        last = "k_proj" if config.temperature_tuning is None else "k_clip"
        for stage in ("k_norm", "k_rope"):
            last = stage if stage in values else last
        if config.qk_norm is not None and config.qk_norm.placement == "post_rope":
            last = "k_norm"
        k = values[last]
        k = split_heads(k, config.num_key_value_heads) if k.ndim == 3 else k
        v = split_heads(values.get("v_clip", values["v_proj"]), config.num_key_value_heads)
        assert identical(result.cache.k, np.ascontiguousarray(k))
        assert identical(result.cache.v, v)


# Padding


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_a_padded_batch_of_unequal_lengths_equals_its_rows_alone(name: str, left: bool) -> None:
    config, lengths = LAYERS[name], [3, 8, 1, 5]
    weights = integer_weights(config)
    states = hidden_states(config, 2, 4, 8)
    positions = np.full((4, 8), -1)
    for row, length in zip(positions, lengths, strict=True):
        row[8 - length if left else 0 :][:length] = np.arange(length)
    poisoned = np.where(positions[..., None] < 0, math.nan, states)
    result = encode(config, states, positions)
    assert identical(encode(config, poisoned, positions).output, result.output)
    for b, length in enumerate(lengths):
        at = positions[b] >= 0
        alone, places = states[b : b + 1, at], np.arange(length)[None]
        bound = bound_of(config, alone, places)
        assert_within(result.output[b : b + 1, at], encode(config, alone, places).output, bound)
        bias = np.zeros(config.hidden_size) if weights.o_bias is None else weights.o_bias
        assert (result.output[b, ~at] == bias).all()
        assert result.cache.positions[b].tolist() == [
            slot if slot < length else -1 for slot in range(8)
        ]


# Masks of the layer


@pytest.mark.parametrize("size", [6, 7, 100])
@pytest.mark.parametrize("field", ["sliding_window", "attention_chunk_size"])
def test_a_window_or_chunk_as_long_as_the_prompt_is_full_attention(field: str, size: int) -> None:
    config = LAYERS["mha"]
    states = hidden_states(config, 1, 2, 6)
    fields: dict[str, Any] = {field: size}
    full = encode(config, states, np.arange(6)).output
    wide = encode(dataclasses.replace(config, **fields), states, np.arange(6)).output
    assert identical(wide, full)
    fields[field] = 5
    narrow = encode(dataclasses.replace(config, **fields), states, np.arange(6)).output
    assert not identical(narrow, full)


def test_a_window_of_1_attends_to_the_token_itself() -> None:
    config = dataclasses.replace(LAYERS["mha"], sliding_window=1)
    capture = Capture()
    encode(config, hidden_states(config, 1, 2, 6), np.arange(6), observe=capture)
    assert identical(capture.values["attn"], capture.values["v_cache"])


def test_a_chunk_starts_empty_at_its_edge() -> None:
    config = LAYERS["chunk-post-norm"]
    capture = Capture()
    positions = np.arange(16380, 16386)[None]
    encode(config, hidden_states(config, 1, 1, 6), positions, observe=capture)
    seen = (capture.values["weights"][0, 0] > 0).sum(axis=-1).tolist()
    assert seen == [position % 3 + 1 for position in positions[0].tolist()]


# Steps


@pytest.mark.parametrize("bound", [0.5, 3.0, 1e9])
def test_clip_bounds_queries_keys_and_values_after_the_bias(bound: float) -> None:
    config = dataclasses.replace(LAYERS["gqa-bias-rms"], clip_qkv=bound)
    capture = Capture()
    encode(config, hidden_states(config, 1, 2, 4), np.arange(4), observe=capture)
    for kind in "qkv":
        before, after = capture.values[f"{kind}_proj"], capture.values[f"{kind}_clip"]
        assert identical(after, np.minimum(np.maximum(before, -bound), bound))
    assert identical(
        capture.values["q_norm_unit"],
        split_heads(capture.values["q_clip"], 4) * capture.values["q_norm_scale"],
    )


@pytest.mark.parametrize(
    ("position", "steps"),
    [(0, 0), (8190, 0), (8191, 1), (8192, 1), (16382, 1), (16383, 2), (20000, 2), (131071, 16)],
)
def test_temperature_grows_by_steps_that_count_the_position_itself(
    position: int, steps: int
) -> None:
    config = AttentionConfig(
        hidden_size=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        temperature_tuning=TemperatureTuning(),
    )
    capture = Capture()
    encode(config, hidden_states(config, 1, 1, 1), [position], observe=capture)
    plain = split_heads(capture.values["q_proj"], 2)
    want = (1.0 + 0.1 * math.log(1 + steps)) * plain
    assert_within(capture.values["q_temperature"], want, 8.0 * U * np.abs(want))
    assert identical(capture.values["k_cache"], split_heads(capture.values["k_proj"], 2))
    if steps == 0:
        assert identical(capture.values["q_temperature"], plain)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("placement", ["pre_rope", "post_rope"])
def test_a_norm_stands_on_its_side_of_rope_and_leaves_values_alone(
    kind: str, placement: str
) -> None:
    norm = QKNorm(
        kind="rms" if kind == "rms" else "layer",
        placement="pre_rope" if placement == "pre_rope" else "post_rope",
    )
    config = dataclasses.replace(LAYERS["mha"], qk_norm=norm)
    order: list[str] = []

    def observe(stage: str, value: Array, accumulation: Accumulation | None = None, /) -> Array:
        order.append(stage)
        return value

    encode(config, hidden_states(config, 1, 1, 3), np.arange(3), observe=observe)
    assert (order.index("q_norm") < order.index("q_rope")) == (placement == "pre_rope")
    assert (order.index("k_norm") < order.index("k_rope")) == (placement == "pre_rope")
    assert not any(stage.startswith("v_norm") for stage in order)


def test_a_flat_norm_reads_all_heads_at_once_and_a_head_norm_each_alone() -> None:
    states = hidden_states(LAYERS["mha"], 1, 1, 3)
    shapes = {}
    for scope in ("head", "projection"):
        norm = QKNorm(scope="head" if scope == "head" else "projection", weighted=False)
        capture = Capture()
        config = dataclasses.replace(LAYERS["mha"], qk_norm=norm)
        encode(config, states, np.arange(3), observe=capture)
        shapes[scope] = capture.values["q_norm_scale"].shape
        power = np.square(capture.values["q_norm"]).mean(axis=-1)
        assert_within(power, np.ones_like(power), 1e-6 / (1.0 + 1e-6) + gamma(16))
    assert shapes == {"head": (1, 2, 3, 1), "projection": (1, 3, 1)}


@pytest.mark.parametrize("name", LAYERS)
def test_shifting_every_position_of_a_full_layer_moves_rope_scores_by_roundoff_only(
    name: str,
) -> None:
    config = LAYERS[name]
    if config.rope is None or config.attention_chunk_size is not None:
        config = dataclasses.replace(
            config, rope=RopeConfig(), attention_chunk_size=None, temperature_tuning=None
        )
    states = hidden_states(config, 3, 2, 6)
    here, there = np.tile(np.arange(6), (2, 1)), np.tile(np.arange(16384, 16390), (2, 1))
    got, want = encode(config, states, there).output, encode(config, states, here).output
    assert_within(got, want, bound_of(config, states, there))


def test_the_softmax_scale_is_a_factor() -> None:
    config = LAYERS["mha"]
    states = hidden_states(config, 1, 1, 4)
    capture = Capture()
    scaled = dataclasses.replace(config, softmax_scale=4.0)
    encode(scaled, states, np.arange(4), observe=capture)
    assert identical(capture.values["scores"], 4.0 * capture.values["qk"])


def test_sinks_of_the_weights_enter_the_denominator() -> None:
    config = LAYERS["window-sinks"]
    capture = Capture()
    encode(config, hidden_states(config, 1, 2, 5), np.arange(5), observe=capture)
    rest = 1.0 - capture.values["weights"].sum(axis=-1)
    assert (rest > 0).all()


# Projections made before


@pytest.mark.parametrize("name", LAYERS)
def test_projections_made_before_give_the_same_bits(name: str) -> None:
    config = LAYERS[name]
    weights = integer_weights(config)
    states = hidden_states(config, 1, 2, 4)
    projected = project_qkv(config, weights, states)
    cache = empty_cache(config, batch=2, max_length=9)
    for whole, parts in (
        (context_encoding, encode_projected),
        (token_generation, generate_projected),
    ):
        one = whole(config, weights, states, position_ids=np.arange(4), cache=cache)
        two = parts(config, weights, projected, position_ids=np.arange(4), cache=cache)
        assert identical(one.output, two.output)
        assert identical(one.cache.k, two.cache.k)
        cache = one.cache


def test_projections_are_products_and_their_bias_follows() -> None:
    config = LAYERS["gqa-bias-rms"]
    weights = integer_weights(config)
    states = hidden_states(config, 1, 2, 3)
    projected, capture = project_qkv(config, weights, states), Capture()
    encode(config, states, np.arange(3), observe=capture)
    for kind in "qkv":
        product = np.einsum("bsi,oi->bso", states, getattr(weights, f"{kind}_proj"))
        assert (getattr(projected, kind) == product).all()
        assert identical(capture.values[f"{kind}_product"], getattr(projected, kind))
        biased = product + getattr(weights, f"{kind}_bias")
        assert (capture.values[f"{kind}_proj"] == biased).all()
    assert weights.o_bias is not None
    assert identical(capture.values["o_proj"], capture.values["o_product"] + weights.o_bias)


def test_splitting_and_merging_heads_are_inverse() -> None:
    flat = normal(0, 2, 5, 12)
    split = split_heads(flat, 3)
    assert split.shape == (2, 3, 5, 4)
    assert identical(split[:, 1], np.ascontiguousarray(flat[:, :, 4:8]))
    assert identical(np.ascontiguousarray(merge_heads(split)), flat)


def test_final_queries_are_those_that_attention_reads() -> None:
    for config in LAYERS.values():
        capture = Capture()
        encode(config, hidden_states(config, 1, 1, 3), np.arange(3), observe=capture)
        q, k = final_queries(config, capture.values), capture.values["k_cache"]
        products = q @ k.repeat(config.group_size, axis=1).swapaxes(-1, -2)
        norms = np.linalg.norm(q, axis=-1)[..., None]
        sizes = norms * np.linalg.norm(k, axis=-1).repeat(config.group_size, axis=1)[:, :, None]
        assert_within(capture.values["qk"], products, 2.0 * gamma(config.head_dim) * sizes)


# Errors


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"hidden_states": np.ones((1, 3, 9))},
            ShapeError,
            "hidden_states must have shape (any, any, 8), (batch, q_len, hidden_size), "
            "got (1, 3, 9)",
        ),
        (
            {"hidden_states": np.ones((3, 8))},
            ShapeError,
            "hidden_states must have shape (any, any, 8), (batch, q_len, hidden_size), got (3, 8)",
        ),
        (
            {"hidden_states": np.ones((1, 3, 8), dtype=complex)},
            ShapeError,
            "hidden_states must hold real numbers, got dtype complex128",
        ),
        (
            {"position_ids": [0, 1]},
            ShapeError,
            "position_ids must have shape (1, 3), (batch, length), got (2,)",
        ),
        (
            {"position_ids": [0.0, 1.0, 2.0]},
            ShapeError,
            "position_ids must hold integers, got dtype float64",
        ),
        (
            {"position_ids": [0, 1, -3]},
            ShapeError,
            "position_ids must lie between -1 (an empty slot) and 2**31 - 1, got -3 to",
        ),
        (
            {"position_ids": [3, 4, 5]},
            ConfigError,
            "positions must be below the cache's max_length of 5, got 5; make the cache longer",
        ),
        (
            {"cache": empty_cache(LAYERS["mha"], batch=2, max_length=5)},
            ShapeError,
            "k must have shape (2, 2, any, 4), BHSD, got (1, 2, 3, 4)",
        ),
        (
            {"cache": empty_cache(LAYERS["window-sinks"], batch=1, max_length=5)},
            ShapeError,
            "k must have shape (1, 1, any, 4), BHSD, got (1, 2, 3, 4)",
        ),
    ],
    ids=[
        "width",
        "no-batch",
        "complex",
        "positions-length",
        "positions-floats",
        "positions-below",
        "positions-beyond",
        "cache-batch",
        "cache-heads",
    ],
)
@pytest.mark.parametrize("step", [context_encoding, token_generation], ids=["cte", "tkg"])
def test_a_call_that_does_not_fit_the_layer_is_refused(
    step: Any, changes: dict[str, Any], error: type[ValueError], message: str
) -> None:
    config = LAYERS["mha"]
    call: dict[str, Any] = {
        "hidden_states": np.ones((1, 3, 8)),
        "position_ids": [0, 1, 2],
        "cache": empty_cache(config, batch=1, max_length=5),
    } | changes
    with pytest.raises(error, match=re.escape(message)):
        step(config, integer_weights(config), call.pop("hidden_states"), **call)
