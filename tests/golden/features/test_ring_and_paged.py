"""Corners of the rolling, chunk and paged caches."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from golden import (
    AttentionConfig,
    ConfigError,
    ContiguousCache,
    PagedCache,
    ShapeError,
    chunk_cache,
    empty_cache,
    forward,
    paged_cache,
    rolling_cache,
    sharded_cache,
    slot_mapping,
    transposed_cache,
)
from tests.golden.features.served import BLOCK_SIZE, check_served, paged, serve, whole
from tests.golden.layers import LAYERS, assert_within, identical, integer_weights, normal

WINDOW = LAYERS["window-sinks"]
CHUNK = LAYERS["chunk-post-norm"]
PLAIN = LAYERS["mha"]


def entries(config: AttentionConfig, length: int, rows: int = 1) -> Any:
    return normal(length, rows, config.num_key_value_heads, length, config.head_dim)


@pytest.mark.parametrize(
    ("drafts", "accepted", "breaks"), [(3, 1, False), (3, 2, False), (4, 1, True), (5, 2, True)]
)
def test_k1_a_ring_of_window_plus_t_minus_two_survives_rejecting_all_but_one_of_t(
    drafts: int, accepted: int, breaks: bool
) -> None:
    cache = rolling_cache(WINDOW, batch=1, speculation_length=3)
    cache = cache.write(entries(WINDOW, 8), entries(WINDOW, 8), [list(range(8))])
    step = [list(range(8, 8 + drafts))]
    cache = cache.write(entries(WINDOW, drafts), entries(WINDOW, drafts), step)
    after = np.array([[8 + accepted]])
    if breaks:
        with pytest.raises(ConfigError, match="make it for a longer speculation_length"):
            cache.prior(after)
    else:
        held = cache.prior(after).positions[0]
        wanted = set(range(8 + accepted - WINDOW.sliding_window + 1, 8 + accepted))  # type: ignore[operator]
        assert wanted <= set(held.tolist())


def test_k1_a_row_taken_over_by_a_new_sequence_is_no_rollback() -> None:
    cache = rolling_cache(WINDOW, batch=1)
    cache = cache.write(entries(WINDOW, 9), entries(WINDOW, 9), [list(range(9))])
    for p in range(6):
        prior = cache.prior(np.array([[p]]))
        assert sorted(prior.positions[prior.positions >= 0].tolist()) == list(
            range(max(p - 2, 0), p)
        )
        cache = cache.write(entries(WINDOW, 1), entries(WINDOW, 1), [[p]])


def test_k1_a_window_of_one_needs_no_slot() -> None:
    config = replace(WINDOW, sliding_window=1)
    cache = rolling_cache(config, batch=2)
    assert cache.positions.shape == (2, 0)
    check_served(config, 0, 6, [1, 2, 4], cache)


@pytest.mark.parametrize(("first", "crossed"), [(4, True), (5, True), (3, False), (7, False)])
def test_k5_rejected_drafts_that_emptied_the_old_chunk_are_an_error(
    first: int, crossed: bool
) -> None:
    cache = chunk_cache(CHUNK, batch=1)  # chunks of 3
    cache = cache.write(entries(CHUNK, 4), entries(CHUNK, 4), [[0, 1, 2, 3]])
    cache = cache.write(entries(CHUNK, 3), entries(CHUNK, 3), [[4, 5, 6]])
    if crossed:
        with pytest.raises(ConfigError, match="rejected drafts crossed into a new chunk"):
            cache.prior(np.array([[first]]))
    else:
        cache.prior(np.array([[first]]))


def test_k4_a_call_may_span_chunks() -> None:
    check_served(CHUNK, 2, 11, [2, 4, 10], chunk_cache(CHUNK, batch=2))


def test_k7_a_table_entry_of_minus_one_holds_nothing_and_takes_nothing() -> None:
    cache = paged_cache(PLAIN, num_blocks=4, block_size=2, block_tables=[[3, -1, 1]])
    cache = cache.write(entries(PLAIN, 2), entries(PLAIN, 2), [[0, 1]])
    assert cache.prior(np.array([[9]])).positions.tolist() == [[0, 1, -1, -1, -1, -1]]
    message = "row 0 has no block for position 2; its table is [3, -1, 1] with a block_size of 2"
    with pytest.raises(ConfigError, match=re.escape(message)):
        cache.write(entries(PLAIN, 1), entries(PLAIN, 1), [[2]])
    with pytest.raises(ConfigError, match="row 0 has no block for position 6"):
        slot_mapping([[3, -1, 1]], [[6]], 2)


def test_k8_a_freed_block_shows_nothing_of_its_last_owner() -> None:
    cache = paged_cache(PLAIN, num_blocks=3, block_size=2, block_tables=[[0, 1]])
    cache = cache.write(entries(PLAIN, 4), entries(PLAIN, 4), [[0, 1, 2, 3]])
    moved = cache.with_tables([[2, 0]])  # block 0 held positions 0 and 1, is now for 2 and 3
    assert moved.prior(np.array([[9]])).positions.tolist() == [[-1, -1, -1, -1]]


def test_k9_rows_share_the_blocks_of_a_common_prefix() -> None:
    config, weights = LAYERS["window-sinks"], integer_weights(LAYERS["window-sinks"])
    sequences = whole(config, 0, 1, 8)
    cache = paged_cache(config, num_blocks=6, block_size=2, block_tables=[[5, 0, 2, 4]])
    _, prefix = serve(config, 0, sequences, [2], cache)
    assert isinstance(prefix, PagedCache)
    both = prefix.with_tables([[5, 0, 1, -1], [5, 0, 3, -1]])  # 4 shared tokens, own third block
    result = forward(
        config,
        weights,
        np.repeat(sequences.states[:, 4:6], 2, axis=0),
        position_ids=[[4, 5], [4, 5]],
        cache=both,
    )
    for row in range(2):
        assert_within(result.output[row], sequences.output[0, 4:6], sequences.bound[0, 4:6])


def test_write_slots_puts_tokens_where_it_is_told_and_skips_minus_one() -> None:
    cache = paged_cache(PLAIN, num_blocks=2, block_size=2, block_tables=[[1, 0]])
    k = entries(PLAIN, 3)
    cache = cache.write_slots(k, k, np.array([[3, -1, 0]]), np.array([[1, 5, 2]]))
    assert cache.held.tolist() == [[2, -1], [-1, 1]]
    assert identical(cache.k[1, :, 1], k[0, :, 0])
    assert identical(cache.k[0, :, 0], k[0, :, 2])
    with pytest.raises(ConfigError, match="slots must be below the pool's 4, got 4"):
        cache.write_slots(k, k, np.array([[4, -1, 0]]), np.array([[1, 5, 2]]))


def test_paged_and_transposed_caches_hold_the_bits_of_the_contiguous_one() -> None:
    plain: ContiguousCache = empty_cache(PLAIN, batch=2, max_length=8)
    blocks, turned = paged(PLAIN, 2, 8), transposed_cache(PLAIN, batch=2, max_length=8)
    k, v = entries(PLAIN, 7, rows=2), entries(PLAIN, 7, rows=2) + 1.0
    positions = np.array([[0, 1, 2, 3, 4, 5, -1], [3, 2, 1, 0, -1, -1, 4]])
    at = np.full((2, 1), 8)
    want = plain.write(k, v, positions).prior(at)
    assert 8 % BLOCK_SIZE == 0
    for got in (blocks.write(k, v, positions).prior(at), turned.write(k, v, positions).prior(at)):
        assert all(map(identical, map(np.ascontiguousarray, got), want))
    assert turned.write(k, v, positions).k_transposed.shape == (2, 2, 4, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rolling_cache(PLAIN, batch=1), "needs a layer with sliding_window"),
        (lambda: chunk_cache(PLAIN, batch=1), "needs a layer with attention_chunk_size"),
        (lambda: chunk_cache(CHUNK, batch=0), "batch must be positive, got 0"),
        (
            lambda: rolling_cache(WINDOW, batch=1, speculation_length=0),
            "batch and speculation_length must be positive, got 1 and 0",
        ),
        (lambda: rolling_cache(WINDOW, batch=1, slots=1), "slots must hold the ring of 2, got 1"),
        (
            lambda: sharded_cache(PLAIN, batch=1, max_length=4, cores=0),
            "batch, max_length and cores must be positive, got 1, 4 and 0",
        ),
        (
            lambda: paged_cache(PLAIN, num_blocks=0, block_size=2, block_tables=[[0]]),
            "num_blocks and block_size must be positive, got 0 and 2",
        ),
        (
            lambda: paged_cache(PLAIN, num_blocks=2, block_size=2, block_tables=[[2]]),
            "block_tables must name blocks 0 to 1 or -1, got [[2]]",
        ),
    ],
)
def test_a_cache_that_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()


def test_block_tables_are_two_axes_of_integers() -> None:
    with pytest.raises(ShapeError, match="block_tables must be integers of shape"):
        paged_cache(PLAIN, num_blocks=2, block_size=2, block_tables=[0, 1])


def test_a_position_beyond_the_cores_is_refused() -> None:
    cache = sharded_cache(PLAIN, batch=1, max_length=5, cores=2)
    with pytest.raises(ConfigError, match="positions must be below 6, 2 cores of 3 slots, got 6"):
        cache.write(entries(PLAIN, 1), entries(PLAIN, 1), [[6]])
