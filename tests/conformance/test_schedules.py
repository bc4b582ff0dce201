"""A schedule's text says what is called, where every token stands, and what a cache must hold."""

from __future__ import annotations

import numpy as np
import pytest

from conformance.case_ids import parse
from conformance.cases import Case
from conformance.schedule_calls import Walk, walk
from conformance.serve_expected import serve_rows
from conformance.serve_inputs import draw_serve

LAYER = "h64-hq4-hkv2-d16-rope10000"
WINDOW = LAYER.replace("-rope", "-window4-rope")
CHUNK = LAYER.replace("-rope", "-chunk8-rope")


def case(
    parts: str, *, cache: str = "contiguous", cached: str = "b2-kv0", layer: str = LAYER
) -> Case:
    return parse(f"{layer}/serve-bf16-{cached}-{cache}-{parts}-gaussian-seed0")


def walked(parts: str, **named: str) -> Walk:
    work = case(parts, **named).workload
    assert work.schedule is not None
    return walk(work.schedule, work.lengths)


def positions(parts: str, **named: str) -> list[list[list[int]]]:
    return [call.positions.tolist() for call in walked(parts, **named).calls]


def test_prompt_pads_on_the_right_or_left_and_decode_goes_on_behind_it() -> None:
    assert positions("prompt3_1.decode2") == [[[0, 1, 2], [0, -1, -1]], [[3], [1]], [[4], [2]]]
    assert positions("left3_1.decode1") == [[[0, 1, 2], [-1, -1, 0]], [[3], [1]]]


def test_second_prompt_of_a_sequence_stands_behind_its_prefix() -> None:
    assert positions("prompt2_1.prompt2") == [[[0, 1], [0, -1]], [[2, 3], [1, 2]]]
    assert positions("prompt2", cached="b2-kv5_0") == [[[5, 6], [0, 1]]]


def test_pieces_are_calls_of_one_prompt() -> None:
    found = walked("pieces5_2by2")
    assert [call.positions.tolist() for call in found.calls] == [
        [[0, 1], [0, 1]],
        [[2, 3], [-1, -1]],
        [[4], [-1]],
    ]
    assert [(call.piece, call.first) for call in found.calls] == [(0, 0), (1, 2), (2, 4)]
    assert found.lengths == (5, 2)


def test_rejected_drafts_are_written_over() -> None:
    found = walked("prompt2.draft4keep2_1.decode1")
    assert [call.positions.tolist() for call in found.calls[1:]] == [
        [[2, 3, 4, 5], [2, 3, 4, 5]],
        [[4], [3]],
    ]
    assert found.calls[1].kept.tolist() == [[True, True, False, False], [True] + 3 * [False]]
    assert (found.lengths, found.max_length) == ((5, 4), 6)


def test_siblings_of_a_tree_share_a_position_and_a_path_is_kept() -> None:
    call = walked("tree0_0_1to3_2").calls[0]
    assert call.positions.tolist() == [[0, 1, 1, 2]] * 2
    assert call.kept.tolist() == [[True, True, False, True], [True, False, True, False]]
    assert call.seen is not None
    assert call.seen.astype(int).tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 0, 1, 0],
        [1, 1, 0, 1],
    ]


def test_sequences_join_pause_and_leave() -> None:
    found = walked("prompt3at2.decode1at2_x_0.prompt2at2new.decode1", cached="b3-kv0")
    assert [call.positions.tolist() for call in found.calls] == [
        [[0, 1, 2]],
        [[3], [-1], [0]],
        [[0, 1]],
        [[1], [0], [2]],
    ]
    assert [call.in_order for call in found.calls] == [False, False, False, True]
    assert [call.fresh for call in found.calls] == [False, False, True, False]
    assert found.lengths == (2, 1, 3)


def test_packed_sequences_stand_side_by_side_each_at_its_own_positions() -> None:
    call = walked("packed2_1at1_0", cached="b2-kv3_5").calls[0]
    assert call.positions.tolist() == [[5, 6, 3]]
    assert call.packing is not None
    assert (call.packing.query_lens, call.packing.key_lens) == ((2, 1), (7, 4))


HELD = {
    "contiguous": (LAYER, "contiguous", [range(20), range(17)]),
    "rolling": (WINDOW, "rolling", [range(17, 20), range(14, 17)]),
    "chunk": (CHUNK, "chunk", [range(16, 20), range(16, 17)]),
}


@pytest.mark.parametrize(("layer", "cache", "held"), HELD.values(), ids=HELD)
def test_cache_need_hold_what_the_next_token_may_see(
    layer: str, cache: str, held: list[range]
) -> None:
    one = case("prompt18_15.decode2", cache=cache, layer=layer)
    rows = serve_rows(one, draw_serve(one))["k_cache"]
    assert [np.flatnonzero(row[0]).tolist() for row in rows] == [list(row) for row in held]


def test_features_name_the_cache_and_what_is_done_with_it() -> None:
    parts = "prompt9.pieces8by4.tree0_0to1.draft2keep1.left2.packed1.decode1at1_x"
    assert case(parts, cache="paged4_e5m2").workload.schedule is not None
    assert case(parts, cache="paged4_e5m2").features == (
        "GQA",
        "RoPE half",
        "paged cache",
        "float8 cache",
        "prefix prefill",
        "windowed encoding",
        "tree speculation",
        "speculation",
        "left padding",
        "packed prefill",
        "continuous batching",
    )


def test_inputs_of_a_schedule_are_drawn_anew_for_each_id() -> None:
    one, other = draw_serve(case("prompt3")), draw_serve(case("prompt3.decode1"))
    assert not np.array_equal(one.hidden_states[0], other.hidden_states[0])
    assert np.array_equal(one.hidden_states[0], draw_serve(case("prompt3")).hidden_states[0])


def test_blocks_of_a_paged_cache_stand_in_no_order_and_some_are_spare() -> None:
    inputs = draw_serve(case("prompt40_17", cache="paged8"))
    assert inputs.block_tables is not None
    listed = inputs.block_tables.ravel().tolist()
    assert len(set(listed)) == 10 < inputs.num_blocks
    assert listed != sorted(listed)
