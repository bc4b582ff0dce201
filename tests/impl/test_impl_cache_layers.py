"""Layers with quantised and oddly sized caches, and the public snapshot's defects with caches."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

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
from served_caches import KINDS, LENGTH, LINES, TABLES, Kind
from torch import Tensor, nn

from impl import KVCacheManager, NeuronAttentionBase, RotaryEmbedding
from impl.kv_cache import KeyValue, slot_mapping
from impl.slot_positions import RollingSlots

# Kinds that tests/impl/test_impl_served_layers.py does not serve: codes, odd sizes, storage.
SERVED = {
    name: kind
    for name, kind in KINDS.items()
    if kind.run.get("kv_cache_quant")
    or name
    in (
        "rolling, kernel bucket",
        "rolling, window above length",
        "chunk of one",
        "paged, heads first",
        "core-sharded, one process",
    )
}


def made_for(kind: Kind, **features: Any) -> tuple[NeuronAttentionBase, KVCacheManager]:
    """A layer and its cache, whose slots hold NaN until they are written."""
    config = model(run={"seq_len": LENGTH, "batch_size": LINES, **kind.run}, **kind.fields)
    limits = {
        name: kind.fields[name]
        for name in ("sliding_window", "attention_chunk_size")
        if name in kind.fields
    }
    # Blocks with heads first are a cache's; the layer serves them one sequence a row.
    run = {name: value for name, value in kind.run.items() if name != "is_chunked_prefill"}
    of_layer = model(run={"seq_len": LENGTH, "batch_size": LINES, **run}, **kind.fields)
    rope = RotaryEmbedding(WIDTH)
    built = layer(config=of_layer, rotary_emb=rope, **limits, **features)
    scales = None if kind.scales is None else [kind.scales]
    manager = KVCacheManager(config, kv_scales=scales)
    for stored in manager.past_key_values:
        stored.copy_(torch.full(stored.shape, float("nan")))
    return built, manager


class Serving:
    """A layer that serves sequences, beside the hidden states each of them has accepted."""

    def __init__(self, kind: Kind, **features: Any) -> None:
        self.kind = kind
        self.layer, self.manager = made_for(kind, **features)
        self.history = [torch.zeros(0, HIDDEN, dtype=torch.float64) for _ in range(LINES)]
        self.generator = torch.Generator().manual_seed(0)

    def step(self, seq_ids: list[int], length: int, keep: list[int] | None = None) -> None:
        """Feed tokens to each sequence, check every output, and accept the first of them."""
        shape = (len(seq_ids), length, HIDDEN)
        hidden = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        starts = [len(self.history[seq]) if seq >= 0 else 0 for seq in seq_ids]
        at = torch.arange(length) + torch.tensor(starts)[:, None]
        ids = torch.tensor(seq_ids)
        call: dict[str, Any] = {"kv_mgr": self.manager, "idx": 0, "seq_ids": ids}
        call["update_kv_per_layer"] = True
        if "pa_block_size" in self.kind.run:
            tables = TABLES[ids.clamp(min=0)]
            call["active_block_table"] = tables
            call["scatter_index"] = slot_mapping(tables, at, self.kind.run["pa_block_size"])
        if any(starts):
            call["get_kv_per_layer"] = True
            call["active_mask"] = torch.ones(1, 1, length, length).tril().bool()
        if length == 1:
            call["active_mask"] = None
        mask = None if any(starts) else torch.ones(len(seq_ids), length, dtype=torch.bool)
        got = self.layer(hidden, mask, at, **call)
        self.manager.store(0, got.present_key_value)
        for row, seq in enumerate(seq_ids):
            if seq < 0:
                continue
            whole = torch.cat((self.history[seq], hidden[row]))
            self.check(got.hidden_states[row], whole, starts[row])
            kept = length if keep is None else keep[row]
            self.history[seq] = whole[: starts[row] + kept]

    def check(self, got: Tensor, whole: Tensor, start: int) -> None:
        """Compare a row's output with the last rows of a prompt of the whole sequence."""
        every = torch.ones(1, len(whole), dtype=torch.bool)
        if self.kind.scales is None and not self.kind.run.get("kv_cache_quant"):
            expected = self.layer(whole[None], every).hidden_states[0, start:]
        else:
            expected = self.with_codes(whole, start)
        assert relative_error(got, expected) <= ROUNDOFF

    def with_codes(self, whole: Tensor, start: int) -> Tensor:
        """The last rows where earlier keys and values were coded one by one."""
        every = torch.ones(1, max(start, 1), dtype=torch.bool)
        past = self.layer(whole[None, : max(start, 1)], every).present_key_value
        coded = tuple(
            codec.decode(codec.encode(x))
            for codec, x in zip(self.manager.codecs, past, strict=True)
        )
        rest = len(whole) - start
        active = torch.ones(1, 1, rest, rest).tril().bool() if rest > 1 else None
        at = positions(rest, start, batch=1)
        if start == 0:
            return self.layer(whole[None], torch.ones(1, rest, dtype=torch.bool)).hidden_states[0]
        return self.layer(
            whole[None, start:], None, at, past_key_value=coded, active_mask=active
        ).hidden_states[0]


@pytest.mark.parametrize("kind", SERVED.values(), ids=SERVED)
def test_other_caches_serve_prompts_decode_drafts_and_idle_rows(kind: Kind) -> None:
    serving = Serving(kind)
    serving.step([2, 0, 1], 7)
    serving.step([0, -1, 2], 1)
    serving.step([1, 0, 2], 1)
    if kind.drafts > 1:
        serving.step([2, 1, 0], kind.drafts, keep=[1, 2, 3])
        serving.step([0, 1, 2], kind.drafts, keep=[2, 1, 1])
    serving.step([1], 1)
    serving.step([0, 1, 2], 1)


def test_a_wider_ring_is_needed_where_drafts_are_rejected() -> None:
    kind = Kind(fields={"sliding_window": 4})
    serving = Serving(kind)
    serving.step([0, 1, 2], 7)
    serving.step([0, 1, 2], 3, keep=[1, 1, 1])
    with pytest.raises(AssertionError):
        serving.step([0, 1, 2], 1)


def test_a_batch_smaller_than_the_cache_reads_and_writes_its_first_lines() -> None:
    built, manager = made_for(KINDS["contiguous"])
    hidden, at = tokens(6, batch=2), positions(6)
    whole = built(hidden, at >= 0, at).hidden_states
    call: dict[str, Any] = {"kv_mgr": manager, "update_kv_per_layer": True, "idx": 0}
    first = built(hidden[:, :5], at[:, :5] >= 0, at[:, :5], **call)
    manager.store(0, first.present_key_value)
    last = built(hidden[:, 5:], position_ids=at[:, 5:], get_kv_per_layer=True, **call)
    assert relative_error(last.hidden_states, whole[:, 5:]) <= ROUNDOFF
    assert bool(manager.past_key_values[0][2].isnan().all()), "the third line is another's"


def test_an_idle_row_sees_nothing_of_the_line_it_would_read() -> None:
    built, manager = made_for(KINDS["contiguous"])
    for stored in manager.past_key_values:
        stored.zero_()
    hidden = tokens(1, batch=2)
    outputs = []
    for filler in (0.0, 5.0):
        for stored in manager.past_key_values:
            stored.fill_(filler)
        outputs.append(
            built(
                hidden,
                position_ids=positions(1, 5),
                kv_mgr=manager,
                get_kv_per_layer=True,
                idx=0,
                seq_ids=torch.tensor([-1, LINES]),
            ).hidden_states
        )
    assert torch.equal(*outputs)


# What the public snapshot gets wrong with caches.


def test_transposed_keys_and_a_window_do_not_mix_up_the_axes() -> None:
    kind = Kind(run={"k_cache_transposed": True}, fields={"sliding_window": WIDTH + 1}, drafts=1)
    serving = Serving(kind)
    (cache,) = serving.manager.caches
    assert cache.stored_shape(True)[2:] == (WIDTH, WIDTH)  # a square hides which axis is which
    serving.step([0, 1, 2], 12)
    for _ in range(3):
        serving.step([2, 0, 1], 1)


def test_a_window_the_configuration_does_not_know_of_reads_transposed_keys_right() -> None:
    config = model(run={"k_cache_transposed": True, "seq_len": WIDTH})
    built = layer(config=config, rotary_emb=RotaryEmbedding(WIDTH), sliding_window=3)
    manager = KVCacheManager(config)
    hidden = tokens(6)
    whole = built(hidden, torch.ones(2, 6, dtype=torch.bool)).hidden_states
    call: dict[str, Any] = {"kv_mgr": manager, "update_kv_per_layer": True, "idx": 0}
    keep = torch.ones(2, 5, dtype=torch.bool)
    first = built(hidden[:, :5], keep, positions(5), **call)
    manager.store(0, first.present_key_value)
    last = built(hidden[:, 5:], position_ids=positions(1, 5), get_kv_per_layer=True, **call)
    assert relative_error(last.hidden_states, whole[:, 5:]) <= ROUNDOFF


def test_masks_of_the_caller_are_not_written_to() -> None:
    built, manager = made_for(KINDS["contiguous"])
    hidden, keep = tokens(5, batch=3), torch.ones(3, 5, dtype=torch.bool)
    call: dict[str, Any] = {"kv_mgr": manager, "update_kv_per_layer": True, "idx": 0}
    first = built(hidden, keep, positions(5, batch=3), **call)
    manager.store(0, first.present_key_value)
    slots = torch.arange(LENGTH)[None, None, None] < 5
    given = slots.expand(3, 1, 3, LENGTH)  # one row of storage, seen as nine
    active = torch.ones(1, 1, 3, 3).tril().bool()
    kept = given.clone(), active.clone()
    cached = [stored.clone() for stored in manager.past_key_values]
    built(
        tokens(3, batch=3),
        given,
        positions(3, 5, batch=3),
        active_mask=active,
        get_kv_per_layer=True,
        **call,
    )
    assert torch.equal(given, kept[0])
    assert torch.equal(active, kept[1])
    for stored, before in zip(manager.past_key_values, cached, strict=True):
        assert torch.equal(stored.nan_to_num(9.0), before.nan_to_num(9.0))


def test_a_ring_of_w_slots_computes_the_same_as_one_of_w_minus_1() -> None:
    # Two conventions of a window's decode mask exist: W - 1 slots, and W slots of which that of
    # the token itself is left out. Either is right with its own positions.
    serving = Serving(Kind(fields={"sliding_window": 4}, drafts=1))
    manager = serving.manager
    manager.caches = (replace(manager.caches[0], layout=RollingSlots(4), slots=4),)
    for i in range(2):
        wider = torch.full((LINES, KV_HEADS, 4, WIDTH), float("nan"), dtype=torch.float64)
        manager.past_key_values[i] = nn.Parameter(wider, requires_grad=False)
    serving.step([0, 1, 2], 9)
    for _ in range(5):
        serving.step([0, 1, 2], 1)


def test_left_padded_prompts_of_unequal_lengths_decode_as_each_alone() -> None:
    built, manager = made_for(KINDS["left-padded"])
    lengths, hidden = (2, 6, 4), tokens(8, batch=3)
    at = torch.arange(6)[None] - torch.tensor([[6 - n] for n in lengths])
    at = at.masked_fill(at < 0, -1)
    call: dict[str, Any] = {"kv_mgr": manager, "update_kv_per_layer": True, "idx": 0}
    prompt = built(hidden[:, :6], at >= 0, at, **call)
    manager.store(0, prompt.present_key_value)
    later = []
    for t in (6, 7):
        now = torch.tensor([[n + t - 6] for n in lengths])
        step = built(hidden[:, t : t + 1], position_ids=now, get_kv_per_layer=True, **call)
        manager.store(0, step.present_key_value)
        later.append(step.hidden_states)
    got = torch.cat((prompt.hidden_states, *later), dim=1)
    for row, n in enumerate(lengths):
        alone = built(hidden[row : row + 1, 6 - n :], torch.ones(1, n + 2).bool())
        assert relative_error(got[row, 6 - n :], alone.hidden_states[0]) <= ROUNDOFF
        assert float(got[row, : 6 - n].abs().sum()) == 0, "padding sees no key, so it is zero"


def test_layers_of_three_kinds_share_one_manager_for_the_whole_network() -> None:
    # Caches are read before the network and written after it, as the public model does; windows
    # alternate with full layers as in gpt-oss, with a chunked layer besides.
    limits = [{"sliding_window": 4}, {}, {"attention_chunk_size": 4}, {"sliding_window": 4}]
    kinds = ["sliding", "full", "chunked", "sliding"]
    run = {"k_cache_transposed": True, "is_continuous_batching": True, "seq_len": 16}
    config = model(
        run={**run, "batch_size": LINES},
        layer_types=[f"{kind}_attention" for kind in kinds],
        num_hidden_layers=4,
        sliding_window=4,
        attention_chunk_size=4,
    )
    stack = [
        layer(config=config, seed=seed, rotary_emb=RotaryEmbedding(WIDTH), **limit)
        for seed, limit in enumerate(limits)
    ]
    manager = KVCacheManager(config)
    for stored in manager.past_key_values:
        stored.fill_(float("nan"))
    ids, hidden = torch.tensor([1, 2, 0]), tokens(12, batch=3)

    def network(first: int, count: int) -> Tensor:
        states, at = hidden[:, first : first + count], positions(count, first, batch=3)
        past = manager.get_cache(seq_ids=ids) if first else [None] * 4
        new = []
        for idx, part in enumerate(stack):
            mask = None if first else at >= 0
            out = part(states, mask, at, past[idx], kv_mgr=manager, idx=idx, seq_ids=ids)
            states = states + out.hidden_states
            new.append(out.present_key_value)
        stored = manager.update_cache(not first, ids, at, new)
        for idx in range(4):
            manager.store(idx, (stored[2 * idx], stored[2 * idx + 1]))
        return states

    got = torch.cat([network(0, 6), *(network(t, 1) for t in range(6, 12))], dim=1)
    whole, at = hidden, positions(12, batch=3)
    for part in stack:
        whole = whole + part(whole, at >= 0, at).hidden_states
    # Four times as many contractions follow each other as ROUNDOFF counts.
    assert relative_error(got, whole) <= 4 * ROUNDOFF


def _previous_slots(manager: KVCacheManager, *given: Any, **named: Any) -> KeyValue:
    k, v = KVCacheManager.get_kv_by_layer_id(manager, *given, **named)
    return k.roll(1, dims=2), v.roll(1, dims=2)


@pytest.mark.parametrize("name", ["contiguous", "rolling, drafts", "chunk", "paged"])
def test_a_planted_slot_shift_is_found(name: str) -> None:
    serving = Serving(KINDS[name])
    serving.step([0, 1, 2], 7)
    shifted = mock.patch.object(
        serving.manager,
        "get_kv_by_layer_id",
        lambda *given, **named: _previous_slots(serving.manager, *given, **named),
    )
    with shifted, pytest.raises(AssertionError):
        serving.step([0, 1, 2], 1)


@pytest.mark.parametrize("name", ["paged", "rolling, drafts", "int8, scale per channel"])
def test_a_served_step_compiles_as_one_graph(name: str) -> None:
    serving = Serving(KINDS[name])
    serving.step([0, 1, 2], 6)
    ids, at = torch.tensor([2, -1, 0]), positions(1, 6, batch=3)
    call: dict[str, Any] = {"kv_mgr": serving.manager, "idx": 0, "seq_ids": ids}
    call |= {"get_kv_per_layer": True, "update_kv_per_layer": True, "position_ids": at}
    if name == "paged":
        call["active_block_table"] = TABLES[ids.clamp(min=0)]
    torch._dynamo.reset()
    compiled = torch.compile(serving.layer, backend="eager", fullgraph=True, dynamic=False)
    got, expected = compiled(tokens(1, batch=3), **call), serving.layer(tokens(1, batch=3), **call)
    assert torch.equal(got.hidden_states, expected.hidden_states)
    for a, b in zip(got.present_key_value, expected.present_key_value, strict=True):
        assert torch.equal(a.double().nan_to_num(9.0), b.double().nan_to_num(9.0))


def test_the_readme_serves_a_window_from_127_slots() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (block,) = [part for part in text.split("```python")[1:] if "KVCacheManager(config)" in part]
    names: dict[str, Any] = {}
    exec(block.partition("```")[0], names)
    k, v = names["cache"].past_key_values
    assert k.shape == v.shape == (4, 4, 127, 64)
    assert names["step"].hidden_states.shape == (2, 1, 1024)
    used = (k != 0).any(dim=(1, 3))
    assert used.tolist() == [[line in (0, 2)] * 127 for line in range(4)]
