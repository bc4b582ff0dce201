from typing import Any

import pytest
import torch

from impl import ShapeError
from impl.masks import (
    active_token_mask,
    context_encoding_mask,
    prior_mask,
    visible,
)
from impl.slot_positions import (
    ChunkSlots,
    ContiguousSlots,
    LeftPaddedSlots,
    RollingSlots,
    SlotLayout,
    first_positions,
    slot_positions,
)


def rows(mask: torch.Tensor) -> list[str]:
    """One string of 0 and 1 per query row of batch row 0."""
    return ["".join(str(int(x)) for x in row) for row in mask[0, 0]]


def place(*numbers: int) -> torch.Tensor:
    return torch.tensor([numbers])


FIVE = place(0, 1, 2, 3, 4)


def decode_mask(
    given: torch.Tensor | None,
    at: torch.Tensor,
    slots: int,
    layout: SlotLayout | None = None,
    **limits: Any,
) -> torch.Tensor:
    """Mask of the cached keys of a step at `at`, in a cache of a layout."""
    held = slot_positions(layout or ContiguousSlots(), first_positions(at), slots)
    return prior_mask(given, at, held, **limits)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, ["10000", "11000", "11100", "11110", "11111"]),
        ({"sliding_window": 2}, ["10000", "11000", "01100", "00110", "00011"]),
        ({"sliding_window": 1}, ["10000", "01000", "00100", "00010", "00001"]),
        ({"sliding_window": 5}, ["10000", "11000", "11100", "11110", "11111"]),
        ({"attention_chunk_size": 3}, ["10000", "11000", "11100", "00010", "00011"]),
        ({"attention_chunk_size": 1}, ["10000", "01000", "00100", "00010", "00001"]),
    ],
)
def test_visibility_counts_the_querys_own_key(limits: dict[str, Any], expected: Any) -> None:
    assert rows(visible(FIVE, FIVE, **limits)) == expected


def test_chunks_and_windows_follow_positions_not_indices() -> None:
    start = place(8190, 8191, 8192, 8193)
    chunked = context_encoding_mask(None, start, attention_chunk_size=8192)
    assert rows(chunked) == ["1000", "1100", "0010", "0011"]
    gap = place(0, 1, 10, 11)
    assert rows(context_encoding_mask(None, gap, sliding_window=3)) == [
        "1000",
        "1100",
        "0010",
        "0011",
    ]


def test_negative_positions_are_padding() -> None:
    mask = context_encoding_mask(None, place(0, 1, -1, -1), sliding_window=4)
    assert rows(mask) == ["1000", "1100", "0000", "0000"]
    chunked = context_encoding_mask(None, place(-1, -1, 0, 1), attention_chunk_size=4)
    assert rows(chunked) == ["0000", "0000", "0010", "0011"]


def test_no_mask_on_a_full_layer_is_no_mask() -> None:
    assert context_encoding_mask(None, FIVE) is None


def test_key_padding_is_causal_and_hides_padding() -> None:
    keep = torch.tensor([[0, 1, 1, 1, 0]])
    mask = context_encoding_mask(keep, FIVE)
    assert rows(mask) == ["00000", "01000", "01100", "01110", "01110"]
    narrow = context_encoding_mask(keep, FIVE, sliding_window=2)
    assert rows(narrow) == ["00000", "01000", "01100", "00110", "00010"]


def test_a_full_mask_cannot_widen_a_window() -> None:
    everything = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    got = context_encoding_mask(everything, FIVE, sliding_window=2)
    assert rows(got) == ["10000", "11000", "01100", "00110", "00011"]
    assert rows(context_encoding_mask(everything, FIVE)) == ["11111"] * 5


@pytest.mark.parametrize(
    ("position", "limits", "expected"),
    [
        (0, {"sliding_window": 4}, "00000000"),
        (1, {"sliding_window": 4}, "10000000"),
        (3, {"sliding_window": 4}, "11100000"),
        (6, {"sliding_window": 4}, "00011100"),
        (6, {}, "11111100"),
        (4, {"attention_chunk_size": 4}, "00000000"),
        (6, {"attention_chunk_size": 4}, "00001100"),
        (-1, {}, "00000000"),
    ],
)
def test_decode_mask_is_what_lies_before_the_token_within_the_limit(
    position: int, limits: dict[str, Any], expected: Any
) -> None:
    got = decode_mask(None, place(position), 8, **limits)
    assert rows(got) == [expected]


@pytest.mark.parametrize(
    ("layout", "limits", "expected"),
    [
        (RollingSlots.of(4), {"sliding_window": 4}, ["0000", "1000", "1100", "1110", "1110"]),
        (ChunkSlots(4), {"attention_chunk_size": 4}, ["0000", "1000", "1100", "1110", "0000"]),
    ],
    ids=["rolling", "chunk"],
)
def test_decode_masks_of_short_caches_as_published(
    layout: SlotLayout, limits: dict[str, int], expected: list[str]
) -> None:
    for position, row in enumerate(expected):
        got = decode_mask(None, place(position), 4, layout, **limits)
        assert rows(got) == [row]


def test_decode_mask_does_not_count_the_new_tokens_slot() -> None:
    including_itself = torch.tensor([[1, 1, 1, 0]])
    got = decode_mask(including_itself, place(2), 4)
    assert rows(got) == ["1100"]


def test_decode_mask_with_several_tokens_has_a_window_per_token() -> None:
    given = torch.ones(1, 1, 3, 8, dtype=torch.bool)
    got = decode_mask(given, place(4, 5, 6), 8, sliding_window=4)
    assert rows(got) == ["01110000", "00110000", "00010000"]


def test_decode_mask_of_a_left_padded_cache_counts_from_its_end() -> None:
    got = decode_mask(None, place(2), 5, LeftPaddedSlots())
    assert rows(got) == ["00011"]
    narrow = decode_mask(None, place(3), 5, LeftPaddedSlots(), sliding_window=3)
    assert rows(narrow) == ["00011"]
    given = torch.tensor([[1, 1, 1, 1, 0]])
    assert rows(decode_mask(given, place(2), 5, LeftPaddedSlots())) == ["00010"]


def test_active_mask_is_narrowed_by_the_window() -> None:
    tril = torch.ones(1, 1, 4, 4).tril().bool()
    got = active_token_mask(tril, place(7, 8, 9, 10), sliding_window=2)
    assert rows(got) == ["1000", "1100", "0110", "0011"]
    whole = active_token_mask(tril, place(7, 8, 9, 10))
    assert torch.equal(whole, tril)
    assert torch.equal(whole, active_token_mask(None, place(7, 8, 9, 10)))


def test_active_mask_of_a_tree_keeps_siblings_apart() -> None:
    # A root, two children of it, and a child of the second; siblings share a position.
    tree = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]])[None, None]
    at = place(7, 8, 8, 9)
    assert rows(active_token_mask(tree, at)) == ["1000", "1100", "1010", "1011"]
    assert rows(active_token_mask(tree, at, sliding_window=2)) == ["1000", "1100", "1010", "0011"]


def test_active_mask_hides_padding_and_ends_at_a_chunk() -> None:
    assert rows(active_token_mask(None, place(-1, 7, 8, -1))) == ["0000", "0100", "0110", "0000"]
    chunked = active_token_mask(None, place(6, 7, 8, 9), attention_chunk_size=4)
    assert rows(chunked) == ["1000", "1100", "0010", "0011"]


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.zeros(1, 1, 5, 5), "is it additive?"),
        (torch.ones(1, 4, dtype=torch.bool), "must have shape"),
        (torch.ones(1, 2, 5, 5, dtype=torch.bool), "must have shape"),
        (torch.ones(5, 5, dtype=torch.bool), "must have shape"),
    ],
)
def test_a_mask_of_another_kind_is_refused(mask: torch.Tensor, words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        context_encoding_mask(mask, FIVE)


def test_a_decode_mask_shorter_than_the_cache_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(1, 8\)"):
        decode_mask(torch.ones(1, 7, dtype=torch.bool), place(3), 8)
