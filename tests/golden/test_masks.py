from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import BoolArray, sampled

from golden import (
    AttentionConfig,
    Causal,
    Chunked,
    ConfigError,
    Everything,
    Explicit,
    Mask,
    ShapeError,
    SlidingWindow,
    layer_mask,
)
from golden.attention import visible_keys


def picture(mask: Mask, length: int) -> list[str]:
    positions = np.arange(length)[None]
    return rows(mask.visible(positions, positions), length, length)


def rows(visible: BoolArray, q_len: int, kv_len: int) -> list[str]:
    full = np.broadcast_to(visible, (1, 1, q_len, kv_len))
    return ["".join("01"[int(bit)] for bit in row) for row in full[0, 0]]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        pytest.param(Everything(), ["11111"] * 5, id="m1-everything"),
        pytest.param(Causal(), ["10000", "11000", "11100", "11110", "11111"], id="m2-causal"),
        pytest.param(
            Causal() & SlidingWindow(1),
            ["10000", "01000", "00100", "00010", "00001"],
            id="m3-window-1-is-the-query-itself",
        ),
        pytest.param(
            Causal() & SlidingWindow(2),
            ["10000", "11000", "01100", "00110", "00011"],
            id="m3-window-2",
        ),
        pytest.param(
            SlidingWindow(2),
            ["11111", "11111", "01111", "00111", "00011"],
            id="m3-window-alone-does-not-look-back-only",
        ),
        pytest.param(
            Causal() & Chunked(2),
            ["10000", "11000", "00100", "00110", "00001"],
            id="m4-chunk-2",
        ),
        pytest.param(
            Chunked(3), ["11100", "11100", "11100", "00011", "00011"], id="m4-chunk-3-alone"
        ),
        pytest.param(
            Causal() | Explicit(np.arange(5) < 2),
            ["11000", "11000", "11100", "11110", "11111"],
            id="m5-prefix-of-2",
        ),
    ],
)
def test_masks_draw_their_picture(mask: Mask, expected: list[str]) -> None:
    assert picture(mask, 5) == expected


PREDICATES: list[tuple[Callable[[int], Mask], Callable[[int, int, int], bool]]] = [
    (lambda size: Everything(), lambda i, j, size: True),
    (lambda size: Causal(), lambda i, j, size: not j > i),
    (SlidingWindow, lambda i, j, size: j in range(i - size + 1, 2**20)),
    (Chunked, lambda i, j, size: divmod(i, size)[0] == divmod(j, size)[0]),
    (
        lambda size: Causal() & SlidingWindow(size),
        lambda i, j, size: j in {i - back for back in range(size)},
    ),
    (
        lambda size: Causal() & Chunked(size),
        lambda i, j, size: j in range(i - i % size, i + 1),
    ),
]


@pytest.mark.parametrize(
    ("make", "predicate"), PREDICATES, ids=["m1", "m2", "m3", "m4", "m2-and-m3", "m2-and-m4"]
)
@sampled
@given(data=st.data())
def test_masks_agree_with_their_sentence_at_any_position(
    make: Callable[[int], Mask], predicate: Callable[[int, int, int], bool], data: st.DataObject
) -> None:
    start = data.draw(st.sampled_from([0, 1, 127, 128, 16383, 16384, 20000]))
    near = st.integers(start, start + 12)
    batch = data.draw(st.integers(1, 3))
    q_row = data.draw(st.lists(near, min_size=batch * 3, max_size=batch * 3))
    kv_row = data.draw(st.lists(near, min_size=batch * 5, max_size=batch * 5))
    size = data.draw(st.integers(1, 9))
    q_positions = np.array(q_row).reshape(batch, 3)
    kv_positions = np.array(kv_row).reshape(batch, 5)
    visible = np.broadcast_to(make(size).visible(q_positions, kv_positions), (batch, 1, 3, 5))
    for b, i, j in np.ndindex(batch, 3, 5):
        wanted = predicate(int(q_positions[b, i]), int(kv_positions[b, j]), size)
        assert visible[b, 0, i, j] == wanted


@pytest.mark.parametrize("window", [1, 2, 5, 6, 7, 11])
def test_m3_a_causal_row_sees_window_keys_its_own_included(window: int) -> None:
    positions = np.arange(12)[None]
    counts = (Causal() & SlidingWindow(window)).visible(positions, positions).sum(axis=-1)[0, 0]
    assert counts.tolist() == [min(i + 1, window) for i in range(12)]


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_m3_the_key_window_positions_back_is_out_of_reach(offset: int) -> None:
    window, query = 128, 16500
    key = query - window + offset
    visible = SlidingWindow(window).visible(np.array([[query]]), np.array([[key]]))
    assert visible.item() == (offset == 1)


@pytest.mark.parametrize("extra", [0, 1, 100])
def test_m3_m4_a_window_or_chunk_as_long_as_the_sequence_is_causal(extra: int) -> None:
    causal = picture(Causal(), 9)
    assert picture(Causal() & SlidingWindow(9 + extra), 9) == causal
    assert picture(Causal() & Chunked(9 + extra), 9) == causal
    assert picture(Causal() & SlidingWindow(8), 9) != causal
    assert picture(Causal() & Chunked(8), 9) != causal


@pytest.mark.parametrize("chunk", [1, 4, 128, 8192])
def test_m4_chunks_begin_at_multiples_of_their_size(chunk: int) -> None:
    for number in (1, 2, 3):
        edge = number * chunk
        queries = np.array([[edge - 1, edge, edge + chunk - 1]])
        keys = np.array([[edge - chunk, edge - 1, edge, edge + chunk - 1, edge + chunk]])
        assert rows(Chunked(chunk).visible(queries, keys), 3, 5) == ["11000", "00110", "00110"]


@sampled
@given(st.integers(1, 6), st.integers(1, 6), st.lists(st.integers(0, 15), min_size=4, max_size=4))
def test_masks_compose_elementwise(window: int, chunk: int, positions: list[int]) -> None:
    at = np.array([positions])
    parts = [m.visible(at, at) for m in (Causal(), SlidingWindow(window), Chunked(chunk))]
    both = (Causal() & (SlidingWindow(window) | Chunked(chunk))).visible(at, at)
    either = ((Causal() & SlidingWindow(window)) | Chunked(chunk)).visible(at, at)
    assert (both == (parts[0] & (parts[1] | parts[2]))).all()
    assert (either == ((parts[0] & parts[1]) | parts[2])).all()


def test_masks_compare_and_hash_by_value_and_print_themselves() -> None:
    assert Causal() & SlidingWindow(3) == Causal() & SlidingWindow(3)
    assert Causal() & SlidingWindow(3) != Causal() & SlidingWindow(4)
    assert Causal() & SlidingWindow(3) != Causal() | SlidingWindow(3)
    assert len({Chunked(2), Chunked(2), Chunked(3)}) == 2
    assert "SlidingWindow(window=3)" in repr(Causal() & SlidingWindow(3))


@pytest.mark.parametrize(
    "shape",
    [(4,), (1,), (3, 4), (3, 1), (1, 4), (2, 3, 4), (1, 3, 4), (2, 5, 3, 4), (2, 1, 3, 4)],
    ids=str,
)
def test_m5_explicit_broadcasts_from_the_right_and_knows_batch_from_heads(
    shape: tuple[int, ...],
) -> None:
    allowed = np.random.default_rng(0).random(shape) < 0.5
    visible = Explicit(allowed).visible(np.zeros((2, 3), np.int64), np.zeros((2, 4), np.int64))
    with_heads = allowed[:, None] if len(shape) == 3 else allowed
    assert (
        np.broadcast_to(visible, (2, 5, 3, 4)) == np.broadcast_to(with_heads, (2, 5, 3, 4))
    ).all()


@pytest.mark.parametrize(
    "shape", [(5,), (2, 4), (3, 3), (3, 3, 4), (2, 2, 4), (3, 1, 3, 4), (2, 1, 4, 4)], ids=str
)
def test_m5_explicit_names_a_shape_that_does_not_broadcast(shape: tuple[int, ...]) -> None:
    mask = Explicit(np.ones(shape, dtype=np.bool_))
    message = (
        "allowed must broadcast to (batch, heads, q_len, kv_len) with batch, q_len, kv_len = "
        f"(2, 3, 4), got shape {shape}"
    )
    with pytest.raises(ShapeError, match=re.escape(message)):
        mask.visible(np.zeros((2, 3), np.int64), np.zeros((2, 4), np.int64))


@pytest.mark.parametrize(
    ("allowed", "got"),
    [
        (np.ones((3, 3)), "float64 of shape (3, 3)"),
        (np.ones((3, 3), dtype=np.int64), "int64 of shape (3, 3)"),
        (np.bool_(True), "bool of shape ()"),
        (np.ones((1, 1, 1, 1, 1), dtype=np.bool_), "bool of shape (1, 1, 1, 1, 1)"),
    ],
    ids=["additive", "zero-one", "scalar", "five-axes"],
)
def test_m5_explicit_takes_booleans_of_1_to_4_axes(allowed: BoolArray, got: str) -> None:
    message = f"allowed must be a bool array of 1 to 4 axes (True = attend), got {got}"
    with pytest.raises(ShapeError, match=re.escape(message)):
        Explicit(allowed)


@pytest.mark.parametrize("value", [0, -1, -128])
def test_m3_m4_reject_sizes_below_1(value: int) -> None:
    with pytest.raises(ConfigError, match=rf"window must be positive, got {value};"):
        SlidingWindow(value)
    with pytest.raises(ConfigError, match=rf"size must be positive, got {value}$"):
        Chunked(value)


@pytest.mark.parametrize(
    "mask",
    [Everything(), Causal(), Causal() & SlidingWindow(2), Chunked(4), Explicit(np.array([True]))],
    ids=["m1", "m2", "m3", "m4", "m5"],
)
def test_no_mask_shows_an_empty_slot_or_shows_a_padded_query_anything(mask: Mask) -> None:
    visible = visible_keys(mask, np.array([[-1, 0, 3]]), np.array([[-1, 0, 3, -1]]))
    full = np.broadcast_to(visible, (1, 1, 3, 4))[0, 0]
    assert not full[0].any()
    assert not full[:, [0, 3]].any()
    assert full[1, 1]
    assert full[2, 2]


def test_a_mask_without_a_rule_says_so() -> None:
    with pytest.raises(NotImplementedError, match=r"Mask must define visible\(\)"):
        Mask().visible(np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int64))


@pytest.mark.parametrize(
    ("window", "chunk", "expected"),
    [
        (None, None, Causal()),
        (4, None, Causal() & SlidingWindow(4)),
        (None, 4, Causal() & Chunked(4)),
    ],
    ids=["full", "window", "chunk"],
)
def test_layer_mask_is_causal_with_the_layers_window_or_chunk(
    window: int | None, chunk: int | None, expected: Mask
) -> None:
    config = AttentionConfig(
        hidden_size=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=window,
        attention_chunk_size=chunk,
    )
    assert layer_mask(config) == expected
