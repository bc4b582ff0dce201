"""What each slot holds, against a log of writes kept token by token."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from impl.errors import ConfigError, ShapeError
from impl.slot_positions import (
    ChunkSlots,
    ContiguousSlots,
    LeftPaddedSlots,
    RollingSlots,
    ShardGroupSlots,
    ShardSlots,
    SlotLayout,
    first_positions,
    slot_positions,
)

LAYOUTS = {
    "contiguous": (ContiguousSlots(), 48),
    "rolling": (RollingSlots.of(5), 4),
    "rolling, spare slots": (RollingSlots.of(5), 7),
    "rolling, window 1": (RollingSlots.of(1), 1),
    "chunk": (ChunkSlots(4), 4),
    "chunk, spare slots": (ChunkSlots(4), 6),
    "chunk of one": (ChunkSlots(1), 1),
    "shard 0 of 3": (ShardSlots(0, 3), 16),
    "shard 2 of 3": (ShardSlots(2, 3), 16),
    "shards of 3": (ShardGroupSlots(3, 17), 51),
    "left": (LeftPaddedSlots(), 48),
}


def replayed(layout: SlotLayout, cached: int, slots: int) -> list[int]:
    """Positions by slot after tokens 0 .. cached - 1 arrived one by one, stale chunks cleared."""
    if isinstance(layout, LeftPaddedSlots):
        return ([-1] * slots + list(range(cached)))[-slots:]
    held = [-1] * slots
    for t in range(cached):
        slot = int(layout.slot_of(torch.tensor(t)))
        if slot >= 0:
            held[slot] = t
    if isinstance(layout, ChunkSlots):
        held = [t if t // layout.size == cached // layout.size else -1 for t in held]
    return held


@pytest.mark.parametrize(("layout", "slots"), LAYOUTS.values(), ids=LAYOUTS)
@settings(deadline=None)
@given(cached=st.lists(st.integers(0, 48), min_size=1, max_size=4))
def test_slots_hold_what_was_written_there_last(
    layout: SlotLayout, slots: int, cached: list[int]
) -> None:
    got = slot_positions(layout, torch.tensor(cached), slots)
    assert got.dtype is torch.int64
    assert got.tolist() == [replayed(layout, c, slots) for c in cached]


@pytest.mark.parametrize(
    ("last", "speculation_length", "expected"),
    [
        (2, 1, [0, 1, 2]),
        (3, 1, [3, 1, 2]),
        (4, 1, [3, 4, 2]),
        (9, 1, [9, 7, 8]),
        (5, 3, [5, 1, 2, 3, 4]),
        (0, 0, [0, -1, -1]),
    ],
)
def test_rolling_window_of_four_as_published(
    last: int, speculation_length: int, expected: list[int]
) -> None:
    layout = RollingSlots.of(4, speculation_length)
    got = slot_positions(layout, torch.tensor([last + 1]), len(expected))
    assert got.tolist() == [expected]


@pytest.mark.parametrize(
    ("cached", "expected"), [(0, []), (3, [0, 1, 2]), (4, []), (7, [4, 5, 6]), (8, [])]
)
def test_a_chunk_starts_empty(cached: int, expected: list[int]) -> None:
    got = slot_positions(ChunkSlots(4), torch.tensor([cached]), 4)
    assert got.tolist() == [expected + [-1] * (4 - len(expected))]


def test_positions_beyond_16384_are_exact() -> None:
    first = torch.tensor([70_001], dtype=torch.int32)
    assert slot_positions(RollingSlots(1024), first, 1024).max() == 70_000
    assert slot_positions(ChunkSlots(8192), first, 8192).max() == 70_000
    assert slot_positions(ShardSlots(1, 8), first, 8751).max() == 69_993


@settings(deadline=None)
@given(
    window=st.integers(1, 6),
    drafts=st.integers(1, 4),
    start=st.integers(0, 12),
    accepted=st.lists(st.integers(1, 4), max_size=8),
)
def test_no_window_reaches_a_slot_a_rejected_draft_took(
    window: int, drafts: int, start: int, accepted: list[int]
) -> None:
    layout = RollingSlots.of(window, drafts)
    slots = max(layout.ring, 1)
    truth = replayed(layout, start, slots)
    first = start
    for kept in accepted:
        for t in range(first, first + drafts):
            slot = int(layout.slot_of(torch.tensor(t)))
            if slot >= 0:
                truth[slot] = t
        first += min(kept, drafts)
        claimed = slot_positions(layout, torch.tensor([first]), slots)[0].tolist()
        for slot, position in enumerate(claimed):
            if position > max(first - window, -1):
                assert truth[slot] == position
        reach = range(max(first - window + 1, 0), first)
        assert all(position in claimed for position in reach)


def test_first_positions_skip_padding() -> None:
    rows = torch.tensor([[4, 5, 6], [-1, -1, 2], [7, -1, -1], [-1, -1, -1]], dtype=torch.int32)
    assert first_positions(rows).tolist() == [4, 2, 7, 0]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: RollingSlots(-1), ConfigError, "ring must be >= 0"),
        (lambda: ChunkSlots(0), ConfigError, "size must be >= 1"),
        (lambda: ShardGroupSlots(0, 3), ConfigError, "cores must be >= 1"),
        (lambda: ShardGroupSlots(3, 0), ConfigError, "room must be >= 1"),
        (lambda: ShardSlots(3, 3), ConfigError, r"core must be in 0\.\.2"),
        (lambda: LeftPaddedSlots().slot_of(torch.tensor(1)), ConfigError, "append instead"),
        (
            lambda: slot_positions(ContiguousSlots(), torch.zeros(2, 1), 4),
            ShapeError,
            "first_positions",
        ),
        (
            lambda: slot_positions(ContiguousSlots(), torch.zeros(2), 4),
            ShapeError,
            "first_positions",
        ),
    ],
)
def test_unfit_layouts_are_refused(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
