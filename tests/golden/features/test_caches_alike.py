"""Every cache is a way to arrive at the same attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import golden.caches.paged
import golden.caches.sharded
from golden import (
    Array,
    Cache,
    ConfigError,
    Positions,
    RollingCache,
    ShapeError,
    empty_cache,
    forward,
    rolling_cache,
    token_generation,
)
from tests.golden.features.served import CACHES, SERVED, check_served, serve, whole
from tests.golden.layers import LAYERS, assert_within, identical, integer_weights, sampled

LENGTH = 11


@pytest.mark.parametrize(("cache", "layer"), SERVED)
@sampled
@given(
    seed=st.integers(0, 2**16),
    cuts=st.lists(st.integers(1, LENGTH - 1), max_size=LENGTH, unique=True).map(sorted),
)
def test_f1_prefill_then_steps_of_any_size_is_one_context_encoding(
    cache: str, layer: str, seed: int, cuts: list[int]
) -> None:
    config = LAYERS[layer]
    check_served(config, seed, LENGTH, cuts, CACHES[cache](config, 2, LENGTH))


@pytest.mark.parametrize("layer", LAYERS)
def test_f1_prior_and_active_keys_in_one_softmax_are_the_written_cache(layer: str) -> None:
    config, weights = LAYERS[layer], integer_weights(LAYERS[layer])
    sequences = whole(config, 0, 2, LENGTH)
    cache = forward(
        config,
        weights,
        sequences.states[:, :6],
        position_ids=sequences.positions[:, :6],
        cache=empty_cache(config, batch=2, max_length=LENGTH),
    ).cache
    step: dict[str, Any] = {"position_ids": sequences.positions[:, 6:9], "cache": cache}
    joint = forward(config, weights, sequences.states[:, 6:9], **step)
    written = token_generation(config, weights, sequences.states[:, 6:9], **step)
    assert_within(joint.output, written.output, sequences.bound[:, 6:9])
    assert identical(joint.cache.k, written.cache.k)
    assert identical(joint.cache.positions, written.cache.positions)


@pytest.mark.parametrize(("cache", "layer"), SERVED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_f2_padding_on_either_side_changes_nothing(cache: str, layer: str, side: str) -> None:
    config = LAYERS[layer]
    sequences = whole(config, 3, 2, LENGTH)
    prompts = [7, 4]
    weights = integer_weights(config, 3)
    states = np.full((2, 7, config.hidden_size), 1e6)  # what padding holds must not matter
    positions = np.full((2, 7), -1)
    for row, count in enumerate(prompts):
        place = slice(7 - count, 7) if side == "left" else slice(0, count)
        states[row, place] = sequences.states[row, :count]
        positions[row, place] = np.arange(count)
    result = forward(
        config, weights, states, position_ids=positions, cache=CACHES[cache](config, 2, LENGTH)
    )
    for row, count in enumerate(prompts):
        got = result.output[row][positions[row] >= 0]
        assert_within(got, sequences.output[row, :count], sequences.bound[row, :count])
    for step in range(3):  # decode: each row at its own position
        at = np.array(prompts) + step
        rows = np.arange(2)
        result = forward(
            config,
            weights,
            sequences.states[rows, at][:, None],
            position_ids=at[:, None],
            cache=result.cache,
        )
        assert_within(result.output[:, 0], sequences.output[rows, at], sequences.bound[rows, at])


@pytest.mark.parametrize(("cache", "layer"), SERVED)
def test_f3_sequences_join_and_leave_a_running_batch(cache: str, layer: str) -> None:
    config = LAYERS[layer]
    weights = integer_weights(config, 5)
    sequences = whole(config, 5, 3, 9)
    held = CACHES[cache](config, 2, 9)
    # calls of (sequence, cache row, tokens); row 0 is taken over by sequence 2 after sequence 0
    calls = [
        [(0, 0, (0, 5))],
        [(1, 1, (0, 5)), (0, 0, (5, 10))],
        [(1, 1, (5, 6)), (2, 0, (0, 1))],
        [(2, 0, (1, 2)), (1, 1, (6, 7)), (0, -1, (0, 1)), (0, 7, (0, 1))],
        [(2, 0, (2, 9))],
    ]
    for call in calls:
        width = max(stop - start for *_, (start, stop) in call)
        positions = np.full((len(call), width), -1)
        states = np.zeros((len(call), width, config.hidden_size))
        for row, (sequence, _, (start, stop)) in enumerate(call):
            stop = min(stop, 9)
            positions[row, : stop - start] = np.arange(start, stop)
            states[row, : stop - start] = sequences.states[sequence, start:stop]
        seq_ids = [row for _, row, _ in call]
        result = forward(
            config, weights, states, position_ids=positions, cache=held, seq_ids=seq_ids
        )
        held = result.cache
        for row, (sequence, cache_row, _) in enumerate(call):
            if cache_row not in (0, 1):
                continue
            at = positions[row][positions[row] >= 0]
            got = result.output[row][positions[row] >= 0]
            assert_within(got, sequences.output[sequence, at], sequences.bound[sequence, at])


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("ids", [[-1, 9], [5, -7]])
def test_c3_a_sequence_id_outside_the_cache_writes_nothing(cache: str, ids: list[int]) -> None:
    layer = {"chunk": "chunk-post-norm"}.get(cache, "window-sinks")
    config = LAYERS[layer]
    sequences = whole(config, 1, 2, 6)
    _, filled = serve(config, 1, sequences, [3], CACHES[cache](config, 2, 8))
    result = forward(
        config,
        integer_weights(config, 1),
        sequences.states[:, :2],
        position_ids=[[6, 7]],
        cache=filled,
        seq_ids=ids,
    )
    bias = integer_weights(config, 1).o_bias
    assert (result.output == (0.0 if bias is None else bias)).all()
    at = np.array([[8], [8]])
    before, after = filled.prior(at), result.cache.prior(at)
    assert all(map(identical, before, after))
    idle = filled.prior(at, seq_ids=ids)
    assert (idle.positions == -1).all()


def test_c2_rejected_drafts_are_never_seen_again() -> None:
    config = LAYERS["window-sinks"]
    sequences = whole(config, 2, 2, LENGTH)
    weights = integer_weights(config, 2)
    for make in (CACHES["contiguous"], CACHES["paged"], CACHES["rolling-spare"]):
        cache, at, outputs = make(config, 2, LENGTH + 3), 0, []
        for accepted in (4, 1, 2, 3, 1):
            width = max(accepted, 3)
            states = np.full((2, width, config.hidden_size), 7.0)  # wrong drafts
            states[:, :accepted] = sequences.states[:, at : at + accepted]
            positions = np.tile(np.arange(at, at + width), (2, 1))
            result = forward(config, weights, states, position_ids=positions, cache=cache)
            outputs.append(result.output[:, :accepted])
            cache, at = result.cache, at + accepted
        assert_within(np.concatenate(outputs, axis=1), sequences.output, sequences.bound)


def test_a_whole_prompt_far_longer_than_the_ring_leaves_its_last_tokens() -> None:
    config = LAYERS["window-sinks"]
    check_served(config, 1, 40, [37], rolling_cache(config, batch=2))


# Planted defects: the comparison must notice each


def rolled(cache: Cache, shift: int) -> Cache:
    assert isinstance(cache, RollingCache)
    return replace(cache, ring=cache.ring + shift)


def test_the_comparison_sees_a_ring_one_slot_short() -> None:
    config = LAYERS["window-sinks"]
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_served(config, 0, LENGTH, [5], rolled(rolling_cache(config, batch=2), -1))


def test_the_comparison_sees_a_slot_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    right = golden.caches.paged.slot_mapping

    def wrong(tables: Any, positions: Any, block_size: int) -> Positions:
        return right(tables, positions, block_size) - (np.asarray(positions) == 5)

    monkeypatch.setattr(golden.caches.paged, "slot_mapping", wrong)
    config = LAYERS["mha"]
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_served(config, 0, LENGTH, [5, 6], CACHES["paged"](config, 2, LENGTH))


def test_the_comparison_sees_stale_keys_of_a_row_s_last_sequence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(golden.cache, "before_first", lambda held, positions: held)
    config = LAYERS["mha"]
    sequences = whole(config, 0, 2, LENGTH)
    _, cache = serve(config, 0, sequences, [5], empty_cache(config, batch=2, max_length=LENGTH))
    output, _ = serve(config, 0, sequences, [5], cache)
    with pytest.raises(AssertionError, match="exceeds bound"):
        assert_within(output, sequences.output, sequences.bound)


def test_the_comparison_sees_a_write_to_the_wrong_core(monkeypatch: pytest.MonkeyPatch) -> None:
    right = golden.caches.sharded.scattered

    def wrong(held: Any, k: Array, v: Array, positions: Positions, slots: Any, rows: Any) -> Any:
        return right(held, k, v, np.where(positions == 4, -1, positions), slots, rows)

    monkeypatch.setattr(golden.caches.sharded, "scattered", wrong)
    config = LAYERS["mha"]
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_served(config, 0, LENGTH, [5], CACHES["sharded"](config, 2, LENGTH))


# Callers' mistakes


@pytest.mark.parametrize("cache", CACHES)
def test_two_batch_rows_cannot_share_a_cache_row(cache: str) -> None:
    config = LAYERS[{"chunk": "chunk-post-norm"}.get(cache, "window-sinks")]
    held = CACHES[cache](config, 2, 8)
    entry = np.zeros((2, config.num_key_value_heads, 1, config.head_dim))
    with pytest.raises(ConfigError, match=r"seq_ids must name each cache row once, got \[1, 1\]"):
        held.write(entry, entry, [[0], [0]], seq_ids=[1, 1])
    with pytest.raises(ShapeError, match=r"the batch must have the cache's 2 rows, got 3"):
        held.prior(np.zeros((3, 1), dtype=np.int64))
    with pytest.raises(ShapeError, match=r"seq_ids must be integers of shape \(2,\)"):
        held.prior(np.zeros((2, 1), dtype=np.int64), seq_ids=[0.0, 1.0])


@pytest.mark.parametrize("cache", sorted(CACHES.keys() - {"contiguous", "transposed"}))
def test_two_tokens_of_a_row_cannot_share_a_position(cache: str) -> None:
    config = LAYERS[{"chunk": "chunk-post-norm"}.get(cache, "window-sinks")]
    held = CACHES[cache](config, 2, 8)
    entry = np.zeros((2, config.num_key_value_heads, 2, config.head_dim))
    with pytest.raises(ConfigError, match="two tokens of one call share a slot"):
        held.write(entry, entry, [[4, 4], [0, 1]])


@pytest.mark.parametrize("mask", [np.ones((2, 3), dtype=bool), np.ones((2, 2))])
def test_an_active_mask_is_bool_and_square(mask: Any) -> None:
    config = LAYERS["mha"]
    with pytest.raises(ShapeError, match=r"active_mask must be bool of shape \(q_len, q_len\)"):
        forward(
            config,
            integer_weights(config),
            np.zeros((1, 2, 8)),
            position_ids=[0, 1],
            cache=empty_cache(config, batch=1, max_length=2),
            active_mask=mask,
        )
