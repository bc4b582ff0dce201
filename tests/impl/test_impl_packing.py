"""Packed sequences give the rows that each of them gives alone."""

from typing import Any

import pytest
import torch
from impl_layers import (
    HIDDEN,
    KV_HEADS,
    ROUNDOFF,
    WIDTH,
    layer,
    model,
    positions,
    relative_error,
    tokens,
)
from torch import Tensor

from impl import KVCacheManager, NeuronAttentionBase, RotaryEmbedding, ShapeError, UnsupportedError
from impl.packing import PackedSequences, together

DOUBLE = torch.float64
RUN = {"is_chunked_prefill": True, "seq_len": 64}
PAGES = {"is_block_kv_layout": True, "pa_num_blocks": 24, "pa_block_size": 4}
TABLES = torch.randperm(24, generator=torch.Generator().manual_seed(0)).view(4, 6)
FEATURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({"rotary_emb": RotaryEmbedding(WIDTH)}, {}),
    "sink": ({"rotary_emb": RotaryEmbedding(WIDTH), "learned_sinks_size": 1}, {}),
    "window, sink": (
        {"rotary_emb": RotaryEmbedding(WIDTH), "sliding_window": 3, "learned_sinks_size": 1},
        {},
    ),
    "polar, window": (
        {"rope_theta": 5e5, "sliding_window": 4},
        {"use_polar_compatible_rope": True},
    ),
    "temperature, softcap": (
        {"attn_temperature_tuning": True, "floor_scale": 3, "attn_logit_softcapping": 2.0},
        {},
    ),
}
# New and cached tokens of each sequence: a prompt, a decode step, a chunk of a prompt, nothing.
STEPS = [([5, 1, 3, 0], [0, 6, 4, 2]), ([1, 1, 1, 1], [5, 7, 7, 2]), ([0, 0, 2, 0], [1, 1, 1, 1])]


def packing(new: list[int], cached: list[int]) -> dict[str, Tensor]:
    return {"num_queries": torch.tensor(new), "computed_context_lens": torch.tensor(cached)}


def packed(
    made: NeuronAttentionBase, new: list[int], cached: list[int], pad: int, call: dict[str, Any]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The row of a packed step, cached keys by sequence, and what each sequence gives alone."""
    every = tokens(24, batch=len(new))
    row, alone, past = [], [], []
    for seq, (n, c) in enumerate(zip(new, cached, strict=True)):
        at = positions(n + c, batch=1)
        whole = made(every[seq : seq + 1, : n + c], at >= 0, at, **call) if n + c else None
        row.append(every[seq, c : c + n])
        if whole is not None:
            alone.append(whole.hidden_states[0, c:])
            past.append(torch.stack([t[0, :, :c] for t in whole.present_key_value]))
    row.append(torch.full((pad, HIDDEN), 0.3, dtype=DOUBLE))
    return torch.cat(row)[None], alone, past


@pytest.mark.parametrize(("features", "call"), FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize(("new", "cached"), STEPS)
@pytest.mark.parametrize("pad", [0, 4])
def test_each_sequence_gets_the_rows_it_gets_alone(
    features: dict[str, Any],
    call: dict[str, Any],
    new: list[int],
    cached: list[int],
    pad: int,
) -> None:
    made = layer(run=RUN, **features)
    row, alone, past = packed(made, new, cached, pad, call)
    slots = 10
    cache = torch.full((2, len(new), KV_HEADS, slots, WIDTH), float("nan"), dtype=DOUBLE)
    for seq, kv in enumerate(past):
        cache[:, seq, :, : kv.shape[2]] = kv
    got = made(row, past_key_value=(cache[0], cache[1]), **packing(new, cached), **call)
    expected = torch.cat(alone)
    assert relative_error(got.hidden_states[0, : len(expected)], expected) <= ROUNDOFF
    rest = got.hidden_states[0, len(expected) :]
    assert torch.equal(rest, torch.zeros(pad, HIDDEN, dtype=DOUBLE))


def test_prompts_without_a_cache_are_packed_too() -> None:
    made = layer(run=RUN, rotary_emb=RotaryEmbedding(WIDTH), learned_sinks_size=1)
    row, alone, _ = packed(made, [3, 4, 2], [0, 0, 0], 2, {})
    got = made(row, **packing([3, 4, 2], [0, 0, 0])).hidden_states
    assert relative_error(got[0, :9], torch.cat(alone)) <= ROUNDOFF


def test_a_packed_row_is_read_from_and_written_to_blocks() -> None:
    config = model(run={**RUN, **PAGES, "batch_size": 1})
    made = layer(config=config, rotary_emb=RotaryEmbedding(WIDTH), learned_sinks_size=1)
    manager = KVCacheManager(config)
    for stored in manager.past_key_values:
        stored.fill_(float("nan"))
    every, cached = tokens(24, batch=4), [0, 0, 0, 0]
    at = positions(24, batch=4)
    whole = made(every, at >= 0, at).hidden_states
    for new in ([5, 0, 9, 2], [1, 7, 4, 1], [1, 1, 1, 1], [3, 0, 0, 6]):
        row = torch.cat(
            [every[s, c : c + n] for s, (n, c) in enumerate(zip(new, cached, strict=True))]
        )
        padded = torch.cat((row, torch.zeros(20 - len(row), HIDDEN, dtype=DOUBLE)))[None]
        got = made(
            padded,
            kv_mgr=manager,
            get_kv_per_layer=True,
            update_kv_per_layer=True,
            idx=0,
            active_block_table=TABLES,
            **packing(new, cached),
        )
        manager.store(0, got.present_key_value)
        expected = [whole[s, c : c + n] for s, (n, c) in enumerate(zip(new, cached, strict=True))]
        assert relative_error(got.hidden_states[0, : len(row)], torch.cat(expected)) <= ROUNDOFF
        cached = [c + n for c, n in zip(cached, new, strict=True)]


def test_given_positions_and_masks_are_kept() -> None:
    made = layer(run=RUN, rotary_emb=RotaryEmbedding(WIDTH))
    row, *_ = packed(made, [3, 2], [0, 0], 2, {})
    call = packing([3, 2], [0, 0])
    expected = made(row, **call).hidden_states
    at = torch.tensor([[0, 1, 2, 0, 1, 5, 6]])
    assert torch.equal(made(row, position_ids=at, **call).hidden_states, expected)
    causal = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    assert torch.equal(made(row, causal, **call).hidden_states, expected)
    alone = torch.eye(7, dtype=torch.bool)[None, None]
    assert not torch.equal(made(row, alone, **call).hidden_states, expected)


def test_the_picture_in_the_docstring() -> None:
    sequences = PackedSequences(torch.tensor([2, 1]), torch.tensor([1, 2]))
    assert sequences.segments(4).tolist() == [0, 0, 1, 2]
    assert sequences.positions(4).tolist() == [[1, 2, 2, -1]]
    assert sequences.own_slots(sequences.segments(3), 3)[0, 0].int().tolist() == [
        [1, 1, 1, 0, 0, 0]
    ] * 2 + [[0, 0, 0, 1, 1, 1]]
    assert together(sequences.segments(3), sequences.segments(3))[0, 0].int().tolist() == [
        [1, 1, 0],
        [1, 1, 0],
        [0, 0, 1],
    ]


def test_a_packed_step_compiles_as_one_graph() -> None:
    made = layer(torch.float32, run=RUN, rotary_emb=RotaryEmbedding(WIDTH), sliding_window=3)
    cache = tuple(torch.randn(2, KV_HEADS, 6, WIDTH) for _ in range(2))
    call = {"hidden_states": tokens(7, 1, torch.float32), "past_key_value": cache}
    call |= packing([4, 1], [2, 5])
    torch._dynamo.reset()
    compiled = torch.compile(made, backend="eager", fullgraph=True, dynamic=False)
    assert torch.equal(compiled(**call).hidden_states, made(**call).hidden_states)


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("run", "features", "call", "error", "words"),
    [
        ({}, {}, packing([3], [0]), UnsupportedError, "unless is_chunked_prefill is True"),
        (RUN, {}, {"num_queries": torch.tensor([3])}, ShapeError, "be given together"),
        (RUN, {}, packing([3], [0, 1]), ShapeError, r"computed_context_lens must be integers"),
        (
            RUN,
            {},
            {"num_queries": torch.ones(1), "computed_context_lens": torch.ones(1)},
            ShapeError,
            "num_queries must be integers",
        ),
        (RUN, {}, packing([], []), ShapeError, "num_queries must be integers"),
        (RUN, {}, {**packing([3], [0]), "hidden_states": tokens(3)}, ShapeError, "got 2 rows"),
        (
            RUN,
            {},
            {**packing([3], [0]), "past_key_value": (torch.zeros(2, 2, 4, 8, dtype=DOUBLE),) * 2},
            ShapeError,
            r"have shape \(1, 2, 4, 8\)",
        ),
        (
            RUN,
            {"rotary_emb": RotaryEmbedding(WIDTH, rope_parameters=DYNAMIC)},
            packing([3], [0]),
            UnsupportedError,
            "neither dynamic nor longrope",
        ),
    ],
)
def test_a_row_that_is_no_packing_is_refused(
    run: dict[str, Any],
    features: dict[str, Any],
    call: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    made = layer(run=run, **features)
    with pytest.raises(error, match=words):
        made(**{"hidden_states": tokens(3, batch=1), **call})


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"seq_ids": torch.tensor([0, 1])}, "seq_ids"),
        ({"active_block_table": TABLES[:1]}, "have a row for each of 4 packed sequences"),
    ],
    ids=["ids of other sequences", "one table for all"],
)
def test_what_names_sequences_names_each_of_them(changed: dict[str, Tensor], sentence: str) -> None:
    made = layer(run={**RUN, **PAGES}, rotary_emb=RotaryEmbedding(WIDTH))
    manager = KVCacheManager(made.config)
    call = {"kv_mgr": manager, "idx": 0, "update_kv_per_layer": True, "active_block_table": TABLES}
    with pytest.raises(ShapeError, match=sentence):
        made(tokens(9, batch=1), **packing([5, 1, 3, 0], [0, 0, 0, 0]), **{**call, **changed})
