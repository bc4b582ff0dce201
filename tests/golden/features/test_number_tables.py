"""The public module's tables of slots and masks, number by number.

Each table was read off a run of neuronx-distributed-inference on CPU; `-1` stands for a slot that
holds nothing, which the module fills with zeros or stale keys behind its mask.
"""

from __future__ import annotations

import numpy as np
import pytest

from golden import (
    AttentionConfig,
    Causal,
    ChunkCache,
    Chunked,
    Mask,
    Positions,
    RollingCache,
    SlidingWindow,
    chunk_cache,
    kernel_bucket,
    rolling_cache,
    sharded_cache,
    slot_mapping,
    tree_mask,
    visible_keys,
)


def layer(**changes: int) -> AttentionConfig:
    return AttentionConfig(
        hidden_size=1, num_attention_heads=1, num_key_value_heads=1, head_dim=1, **changes
    )


def tokens(positions: list[int]) -> np.ndarray:
    """Return keys that say which token they are: token t is t + 100."""
    return np.array(positions, dtype=float).reshape(1, 1, -1, 1) + 100


def rolling(window: int, *, speculation_length: int = 1, slots: int | None = None) -> RollingCache:
    config = layer(sliding_window=window)
    return rolling_cache(config, batch=1, speculation_length=speculation_length, slots=slots)


def after_prompt(cache: RollingCache | ChunkCache, last: int) -> list[int]:
    prompt = list(range(last + 1))
    written = cache.write(tokens(prompt), tokens(prompt), [prompt])
    held = written.held
    occupied = held.positions[0] >= 0
    assert (held.k[0, 0, occupied, 0] == held.positions[0, occupied] + 100).all()
    assert (held.v[0, 0, occupied, 0] == held.positions[0, occupied] + 100).all()
    return [int(p) for p in held.positions[0]]


def rows(mask: Mask, q_positions: list[int], kv_positions: Positions | list[int]) -> list[str]:
    q, kv = np.array([q_positions]), np.atleast_2d(np.array(kv_positions))
    seen = np.broadcast_to(visible_keys(mask, q, kv), (1, 1, q.shape[1], kv.shape[1]))
    return ["".join("01"[int(x)] for x in row) for row in seen[0, 0]]


# Masks of context encoding


def test_m3_window_of_two_over_five() -> None:
    five = list(range(5))
    mask = Causal() & SlidingWindow(2)
    assert rows(mask, five, five) == ["10000", "11000", "01100", "00110", "00011"]


def test_m4_chunks_of_two_over_five() -> None:
    five = list(range(5))
    mask = Causal() & Chunked(2)
    assert rows(mask, five, five) == ["10000", "11000", "00100", "00110", "00001"]


# The rolling window


@pytest.mark.parametrize(
    ("last", "slots"), [(2, [0, 1, 2]), (3, [3, 1, 2]), (4, [3, 4, 2]), (9, [9, 7, 8])]
)
def test_k1_window_of_four_keeps_three_slots_after_the_prompt(last: int, slots: list[int]) -> None:
    assert after_prompt(rolling(4), last) == slots


def test_k1_speculation_of_three_adds_two_slots() -> None:
    assert after_prompt(rolling(4, speculation_length=3), 5) == [5, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("position", "seen"), [(0, "0000"), (1, "1000"), (2, "1100"), (3, "1110"), (4, "1110")]
)
def test_k3_token_generation_sees_the_ring_and_never_the_last_slot(
    position: int, seen: str
) -> None:
    cache = rolling(4, slots=4)
    for p in range(position):
        cache = cache.write(tokens([p]), tokens([p]), [[p]])
    prior = cache.prior(np.array([[position]]))
    assert rows(Causal() & SlidingWindow(4), [position], prior.positions) == [seen]


def test_k1_speculation_masks_window_11_of_three_drafts_at_12() -> None:
    window, drafts, start = 11, 3, 12
    ring = window + drafts - 2
    cache = rolling(window, speculation_length=drafts)
    for p in range(start):
        cache = cache.write(tokens([p]), tokens([p]), [[p]])
    prior = cache.prior(np.array([[start, start + 1, start + 2]]))
    assert prior.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert prior.positions.shape[1] == ring == 12
    # token i sees slot of token j where 0 < i - j <= 10
    assert rows(Causal() & SlidingWindow(window), [12, 13, 14], prior.positions) == [
        "001111111111",
        "000111111111",
        "000011111111",
    ]
    assert rows(Causal() & SlidingWindow(window), [12, 13, 14], [12, 13, 14]) == [
        "100",
        "110",
        "111",
    ]


def test_t1_a_chain_of_drafts_is_the_lower_triangle() -> None:
    assert (tree_mask([-1, 0, 1, 2]) == np.tril(np.ones((4, 4), dtype=bool))).all()


@pytest.mark.parametrize(("slots", "bucket"), [(1, 128), (127, 128), (128, 256), (129, 256)])
def test_the_block_kernel_s_bucket_always_has_a_spare_slot(slots: int, bucket: int) -> None:
    assert kernel_bucket(slots) == bucket


# Chunks


def test_k4_chunk_of_four_after_position_six() -> None:
    assert after_prompt(chunk_cache(layer(attention_chunk_size=4), batch=1), 6) == [4, 5, 6, -1]


@pytest.mark.parametrize(
    ("position", "seen"),
    [(0, "0000"), (1, "1000"), (3, "1110"), (4, "0000"), (6, "1100"), (7, "1110"), (8, "0000")],
)
def test_k4_token_generation_sees_the_slots_below_p_mod_c(position: int, seen: str) -> None:
    cache = chunk_cache(layer(attention_chunk_size=4), batch=1)
    for p in range(position):
        cache = cache.write(tokens([p]), tokens([p]), [[p]])
    prior = cache.prior(np.array([[position]]))
    assert rows(Causal() & Chunked(4), [position], prior.positions) == [seen]


# Blocks


def test_k6_slot_mapping_is_table_entry_times_block_size_plus_offset() -> None:
    tables = [[5, 2, 7], [0, 3, -1], [1, -1, -1]]
    got = slot_mapping(tables, [[0, 3, 4, 11], [7, 6, 5, 4], [2, -1, -1, -1]], 4)
    assert got.tolist() == [[20, 23, 8, 31], [15, 14, 13, 12], [6, -1, -1, -1]]


def test_k6_a_token_generation_step_maps_one_token_a_row_and_idle_rows_to_minus_one() -> None:
    got = slot_mapping([[4, 6], [2, 1], [-1, -1]], [[32], [31], [-1]], 32)
    assert got.tolist() == [[192], [95], [-1]]


# Flash decoding


def test_k11_token_t_lives_on_core_t_mod_g_in_slot_t_div_g() -> None:
    cache = sharded_cache(layer(), batch=1, max_length=7, cores=3)
    prompt = list(range(7))
    cache = cache.write(tokens(prompt), tokens(prompt), [prompt])
    assert [core.positions[0].tolist() for core in cache.cores] == [
        [0, 3, 6],
        [1, 4, -1],
        [2, 5, -1],
    ]
    assert [core.k[0, 0, :, 0].tolist() for core in cache.cores] == [
        [100, 103, 106],
        [101, 104, 0],
        [102, 105, 0],
    ]


def test_k11_each_core_selects_every_g_th_token_of_the_prompt() -> None:
    cores = 4
    cache = sharded_cache(layer(), batch=1, max_length=16, cores=cores)
    prompt = list(range(16))
    cache = cache.write(tokens(prompt), tokens(prompt), [prompt])
    for rank, core in enumerate(cache.cores):
        assert core.positions[0].tolist() == list(range(rank % cores, 16, cores))
