"""Decode over a cache written first, in place: native's function, whatever slots and masks hold."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from impl_layers import ROUNDOFF, relative_error
from torch import Tensor

from impl.kernels import headwise, native, updated
from impl.kernels.native import ScoreRule
from impl.kv_cache.token_writes import write_step

BATCH, KV_HEADS, WIDTH, SLOTS = 3, 2, 8, 12
CACHED = torch.tensor([6, 4, 0])
RULE = ScoreRule(divisor=2.5)
TREE = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]).bool()


def step(q_len: int, group: int, *, per_query: bool = False) -> dict[str, Any]:
    """Rows with 6, 4 and 0 cached tokens; their own go to the slots after those."""
    generator = torch.Generator().manual_seed(q_len)

    def drawn(heads: int, length: int) -> Tensor:
        return torch.randn(BATCH, heads, length, WIDTH, generator=generator, dtype=torch.float64)

    mask = (torch.arange(SLOTS) < CACHED[:, None])[:, None, None, :]
    if per_query:
        mask = mask & (torch.rand(BATCH, 1, q_len, SLOTS, generator=generator) < 0.5)
    return {
        "q": drawn(KV_HEADS * group, q_len),
        "k": drawn(KV_HEADS, q_len),
        "v": drawn(KV_HEADS, q_len),
        "k_cache": drawn(KV_HEADS, SLOTS),
        "v_cache": drawn(KV_HEADS, SLOTS),
        "prior_mask": mask,
        "active_mask": None if q_len == 1 else torch.ones(1, 1, q_len, q_len).tril().bool(),
        "write_slots": CACHED[:, None] + torch.arange(q_len),
    }


def expected(call: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Native's heads, and the caches with the step in them."""
    k, v = call["k_cache"].clone(), call["v_cache"].clone()
    heads = native.token_generation(
        *(call[name] for name in ("q", "k", "v")),
        k,
        v,
        call["prior_mask"],
        call["active_mask"],
        None,
        RULE,
    )
    write_step(k, v, call["k"], call["v"], call["write_slots"])
    return heads, k, v


def assert_native(call: dict[str, Any], *, again: bool) -> None:
    """Compare with native, and say whether the step was computed head by head."""
    heads, k, v = expected(call)
    with patch.object(headwise, "token_generation", wraps=headwise.token_generation) as spy:
        got = updated.token_generation(**call, rule=RULE)
    assert spy.called is again
    assert heads.isfinite().all()
    assert relative_error(got, heads) < ROUNDOFF
    for cache, after in ((call["k_cache"], k), (call["v_cache"], v)):
        assert torch.equal(cache.nan_to_num(nan=7.0), after.nan_to_num(nan=7.0))


@pytest.mark.parametrize("q_len", [1, 2, 5])
@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("per_query", [False, True])
def test_it_is_native_and_the_cache_holds_the_step(q_len: int, group: int, per_query: bool) -> None:
    assert_native(step(q_len, group, per_query=per_query), again=False)


def test_a_tree_of_drafts_sees_its_ancestors() -> None:
    assert_native(step(4, 2) | {"active_mask": TREE[None, None]}, again=False)


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_an_unused_slot_holds_does_not_get_through(name: str, value: float) -> None:
    call = step(2, 4)
    call[name][0, 1, SLOTS - 1] = value
    heads, _, _ = expected(call)
    got = updated.token_generation(**call, rule=RULE)
    assert relative_error(got, heads) < ROUNDOFF


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_a_step_that_nan_got_into_is_computed_again(name: str) -> None:
    call = step(2, 4)
    call[name][0, 1, SLOTS - 1] = float("nan")
    assert_native(call, again=True)


def test_large_numbers_in_an_unused_slot_cost_nothing() -> None:
    call = step(2, 4)
    for name in ("k_cache", "v_cache"):
        call[name][:, :, SLOTS - 1] = 1e30
    assert_native(call, again=False)


@pytest.mark.parametrize(
    "slots",
    [
        [[6], [2], [0]],  # the second row sees slot 2
        [[6], [-1], [0]],  # the second row's token is cached nowhere
        [[6], [4], [-1]],
    ],
)
def test_a_cache_that_cannot_be_written_first_is_written_after(slots: list[list[int]]) -> None:
    assert_native(step(1, 4) | {"write_slots": torch.tensor(slots)}, again=True)


def test_siblings_of_a_tree_that_share_a_slot_are_attended_to_as_themselves() -> None:
    call = step(4, 2) | {"active_mask": TREE[None, None]}
    call["write_slots"] = CACHED[:, None] + torch.tensor([0, 1, 1, 2])
    heads, _, _ = expected(call)
    assert relative_error(updated.token_generation(**call, rule=RULE), heads) < ROUNDOFF


def test_a_slot_beyond_the_cache_is_refused_as_in_any_write() -> None:
    call = step(1, 4) | {"write_slots": torch.tensor([[6], [4], [SLOTS]])}
    with pytest.raises(IndexError):
        updated.token_generation(**call, rule=RULE)


def test_a_token_that_sees_nothing_is_zeros() -> None:
    call = step(1, 4) | {"active_mask": torch.zeros(1, 1, 1, 1).bool()}
    heads, _, _ = expected(call)
    got = updated.token_generation(**call, rule=RULE)
    assert relative_error(got[:2], heads[:2]) < ROUNDOFF
    assert not heads[2].any()
    assert torch.equal(got[2], heads[2])
