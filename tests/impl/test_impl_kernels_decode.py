"""Decode streamed over the cache is the native form's function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from impl_layers import ROUNDOFF, layer, positions, relative_error, tokens
from torch import Tensor

from impl import ConfigError, RotaryEmbedding
from impl import strategy as strategies
from impl.kernels import decode, flash_plan
from impl.kernels.native import ScoreRule
from impl.strategy import NATIVE_CACHE, Implementation, resolve_decode_kernel

BATCH, KV_HEADS, WIDTH, SLOTS, KV_TILE = 3, 2, 8, 11, 4


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_plan, "KV_TILE", KV_TILE)


def step(q_len: int, group: int, *, per_query: bool = False) -> dict[str, Any]:
    """Rows with 11, 4 and 0 cached tokens; slots that hold none hold NaN."""
    generator = torch.Generator().manual_seed(q_len)

    def drawn(heads: int, length: int) -> Tensor:
        return torch.randn(BATCH, heads, length, WIDTH, generator=generator, dtype=torch.float64)

    held = torch.arange(SLOTS) < torch.tensor([SLOTS, KV_TILE, 0])[:, None]
    mask = held[:, None, None, :]
    if per_query:
        mask = mask & (torch.rand(BATCH, 1, q_len, SLOTS, generator=generator) < 0.5)
    unseen = ~mask.any(dim=2).unsqueeze(-1)
    return {
        "q": drawn(KV_HEADS * group, q_len),
        "k": drawn(KV_HEADS, q_len),
        "v": drawn(KV_HEADS, q_len),
        "k_prior": drawn(KV_HEADS, SLOTS).masked_fill(unseen, float("nan")),
        "v_prior": drawn(KV_HEADS, SLOTS).masked_fill(unseen, float("nan")),
        "prior_mask": mask,
        "active_mask": None if q_len == 1 else torch.ones(1, 1, q_len, q_len).tril().bool(),
    }


@pytest.mark.parametrize("q_len", [1, 2, 5])
@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("per_query", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_streamed_decode_is_native(
    q_len: int, group: int, transposed: bool, per_query: bool, softcap: float | None
) -> None:
    call = step(q_len, group, per_query=per_query)
    sink = torch.linspace(-1, 3, KV_HEADS * group, dtype=torch.float64)
    if transposed:
        call |= {"k_prior": call["k_prior"].transpose(2, 3), "k_prior_transposed": True}
    for s in (None, sink):
        call |= {"sink": s, "rule": ScoreRule(divisor=2.5, softcap=softcap)}
        expected = decode(**call, implementation=Implementation.NATIVE)
        got = decode(**call, implementation=Implementation.FLASH)
        assert expected.isfinite().all()
        assert relative_error(got, expected) < ROUNDOFF


def test_a_tree_of_drafts_sees_its_ancestors() -> None:
    call = step(4, 2)
    tree = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]).bool()
    call |= {"active_mask": tree[None, None], "sink": None, "rule": ScoreRule(divisor=2.0)}
    expected = decode(**call, implementation=Implementation.NATIVE)
    got = decode(**call, implementation=Implementation.FLASH)
    assert relative_error(got, expected) < ROUNDOFF


@pytest.mark.parametrize("features", [{}, {"sliding_window": 5, "learned_sinks_size": 1}])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_layer_decodes_alike_with_either(
    features: dict[str, Any], transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = {"k_cache_transposed": transposed}
    made = layer(run=run, rotary_emb=RotaryEmbedding(WIDTH), **features)
    past = [torch.randn(2, 2, SLOTS, WIDTH, dtype=torch.float64) for _ in range(2)]
    if made.k_cache_transposed:
        past[0] = past[0].transpose(2, 3)
    call = {"position_ids": positions(1, 7), "past_key_value": tuple(past)}
    expected = made(tokens(1), **call).hidden_states
    monkeypatch.setattr(strategies, "NATIVE_CACHE", 1)
    assert relative_error(made(tokens(1), **call).hidden_states, expected) < ROUNDOFF


@pytest.mark.parametrize(
    ("elements", "device", "expected"),
    [
        (NATIVE_CACHE, "cpu", Implementation.NATIVE),
        (NATIVE_CACHE + 1, "cpu", Implementation.FLASH),
        (NATIVE_CACHE + 1, "cuda", Implementation.FLASH),
        (1 << 20, "neuron", Implementation.NATIVE),
    ],
)
def test_long_caches_are_streamed(elements: int, device: str, expected: Implementation) -> None:
    assert resolve_decode_kernel(elements, device) is expected


def test_decode_has_no_form_in_pytorchs_attention() -> None:
    with pytest.raises(ConfigError, match="implementation must be native or flash in decode"):
        decode(
            **step(1, 1),
            sink=None,
            rule=ScoreRule(divisor=1.0),
            implementation=Implementation.SDPA,
        )


def test_a_planted_bug_shows_a_tile_that_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    call = step(1, 2) | {"sink": None, "rule": ScoreRule(divisor=2.0)}
    expected = decode(**call, implementation=Implementation.NATIVE)
    right = flash_plan.TilePlan.kv_tiles

    def dropped(self: Any, start: int, end: int) -> Any:
        return list(right(self, start, end))[1:]

    monkeypatch.setattr(flash_plan.TilePlan, "kv_tiles", dropped)
    got = decode(**call, implementation=Implementation.FLASH)
    assert relative_error(got, expected) > 1e-3
