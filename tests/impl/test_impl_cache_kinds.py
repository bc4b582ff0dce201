"""Every kind of cache gives back, by position, what was written."""

from typing import Any
from unittest import mock

import pytest
import served_caches
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from served_caches import KINDS, LENGTH, LINES, Kind, Served, serve

import impl.kv_cache.dense
import impl.kv_cache.lines
import impl.kv_cache.manager
import impl.kv_cache.paged
import impl.slot_positions
from impl.slot_positions import ChunkSlots, RollingSlots

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@every_kind
def test_every_cache_holds_what_was_written_by_position(kind: Kind) -> None:
    serve(kind)


@every_kind
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_no_schedule_loses_or_mixes_tokens(kind: Kind, data: st.DataObject) -> None:
    served = Served(kind, seed=data.draw(st.integers(0, 99)))
    for _ in range(data.draw(st.integers(1, 5))):
        batch = data.draw(st.permutations([*range(LINES), -1]).map(lambda ids: ids[:LINES]))
        room = min(LENGTH - len(served.log[seq]) for seq in batch if seq >= 0)
        kind_of_step = data.draw(st.sampled_from(["prompt", "decode", "leave"]))
        if kind_of_step == "leave" or room < kind.drafts:
            served.leave(data.draw(st.integers(0, LINES - 1)))
            continue
        if kind_of_step == "prompt" and kind.padding == "left":
            for seq in batch:
                if seq >= 0:
                    served.leave(seq)  # rows of unequal length only start anew there
        most = min(room, 14) if kind_of_step == "prompt" else kind.drafts
        lengths = [data.draw(st.integers(1, most)) if seq >= 0 else 0 for seq in batch]
        if kind_of_step == "decode":
            lengths = [most if seq >= 0 else 0 for seq in batch]
            keep = [data.draw(st.integers(1, most)) if seq >= 0 else 0 for seq in batch]
        else:
            keep = lengths
        served.step(batch, lengths, keep)
        served.check(data.draw(st.permutations(range(LINES))))


@every_kind
def test_no_two_tokens_of_a_step_share_a_slot(kind: Kind) -> None:
    real = impl.kv_cache.dense.token_places

    def spy(lines: torch.Tensor, slots: torch.Tensor) -> Any:
        places = [
            place
            for place in zip(lines.flatten().tolist(), slots.flatten().tolist(), strict=True)
            if min(place) >= 0
        ]
        assert len(set(places)) == len(places)
        return real(lines, slots)

    with (
        mock.patch.object(impl.kv_cache.dense, "token_places", spy),
        mock.patch.object(impl.kv_cache.paged, "token_places", spy),
    ):
        serve(kind)


def _modulo_off_by_one(self: Any, positions: torch.Tensor) -> torch.Tensor:
    return torch.remainder(positions + 1, getattr(self, "ring", getattr(self, "size", 0)))


def _stale_slots(layout: Any, first: torch.Tensor, slots: int) -> torch.Tensor:
    numbers = torch.arange(slots)[None]
    return layout.held(first[:, None], numbers, slots).expand(first.shape[0], slots)


def _next_line(*given: Any, **named: Any) -> torch.Tensor:
    lines = impl.kv_cache.lines.cache_lines(*given, **named)
    return torch.where(lines >= 0, (lines + 1) % LINES, lines)


def _oldest_stay(self: Any, positions: torch.Tensor, newest: torch.Tensor) -> torch.Tensor:
    return positions < self.slots_for(LENGTH)


@pytest.mark.parametrize(
    ("name", "owner", "attribute", "planted"),
    [
        ("rolling", RollingSlots, "slot_of", _modulo_off_by_one),
        ("rolling, drafts", RollingSlots, "slot_of", _modulo_off_by_one),
        ("chunk", ChunkSlots, "slot_of", _modulo_off_by_one),
        ("rolling", RollingSlots, "stays", _oldest_stay),
        ("rolling", RollingSlots, "of", lambda window, drafts=1: RollingSlots(window - 2)),
        (
            "rolling, drafts",
            RollingSlots,
            "of",
            lambda window, drafts=1: RollingSlots(window - 1),
        ),
        (
            "contiguous",
            impl.kv_cache.manager.KVCacheManager,
            "_lines",
            lambda self, ids, at: _next_line(ids, at.shape[0], LINES, at.device),
        ),
        ("contiguous", served_caches, "slot_positions", _stale_slots),
        ("core-sharded", served_caches, "slot_positions", _stale_slots),
        ("paged", impl.kv_cache.paged, "slot_mapping", lambda table, at, size: at),
    ],
)
def test_planted_bugs_are_found(name: str, owner: Any, attribute: str, planted: Any) -> None:
    with mock.patch.object(owner, attribute, planted), pytest.raises((AssertionError, IndexError)):
        serve(KINDS[name])
