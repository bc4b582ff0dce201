"""One prefill whichever implementation computes it, and NaN where its promise is broken."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from impl_layers import ROUNDOFF, relative_error
from torch import Tensor

from impl import ConfigError
from impl.kernels import PrefillRule, PriorKeys, flash, flash_plan, fused, prefill
from impl.kernels.native import ScoreRule
from impl.strategy import Implementation

BATCH, HEADS, KV_HEADS, WIDTH, LENGTH = 3, 4, 2, 8, 11
LENGTHS = torch.tensor([LENGTH, 6, 1])
PLAIN = PrefillRule(score=ScoreRule(divisor=2.5))


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "Q_TILE", 3)
    monkeypatch.setattr(flash_plan, "KV_TILE", 4)


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def step(side: str = "right", start: int = 0) -> dict[str, Any]:
    """Rows of 11, 6 and 1 tokens, padded on `side`, starting at position `start`."""
    index = torch.arange(LENGTH)
    if side == "right":
        at = torch.where(index < LENGTHS[:, None], index + start, -1)
    else:
        at = (index - (LENGTH - LENGTHS[:, None])).clamp(min=-1)
        at = torch.where(at >= 0, at + start, -1)
    return {
        "q": drawn(BATCH, HEADS, LENGTH, WIDTH),
        "k": drawn(BATCH, KV_HEADS, LENGTH, WIDTH),
        "v": drawn(BATCH, KV_HEADS, LENGTH, WIDTH),
        "sink": None,
        "position_ids": at,
        "attention_mask": at >= 0,
    }


def run(implementation: Implementation, rule: PrefillRule, call: dict[str, Any]) -> Tensor:
    return prefill(implementation=implementation, rule=rule, **call)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("start", [0, 3, 16390])
@pytest.mark.parametrize(
    ("limits", "sink"),
    [
        ({}, False),
        ({}, True),
        ({"sliding_window": 1}, True),
        ({"sliding_window": 4}, False),
        ({"sliding_window": LENGTH}, False),
        ({"attention_chunk_size": 4}, False),
        ({"attention_chunk_size": 5, "sliding_window": 3}, False),
    ],
)
def test_flash_is_native_for_rows_of_unequal_lengths(
    side: str, start: int, limits: dict[str, Any], sink: bool
) -> None:
    rule = replace(PLAIN, padding_side=side, **limits)
    call = step(side, start) | {"sink": drawn(HEADS) if sink else None}
    expected = run(Implementation.NATIVE, rule, call)
    assert relative_error(run(Implementation.FLASH, rule, call), expected) < ROUNDOFF
    without = run(Implementation.FLASH, rule, call | {"attention_mask": None})
    if limits:
        assert relative_error(without, expected) < ROUNDOFF


@pytest.mark.parametrize("start", [0, 7])
@pytest.mark.parametrize(
    "sink", [None, [0.0] * HEADS, [-50.0, -1.5, 3.0, 50.0], [-math.inf] * HEADS]
)
def test_pytorchs_attention_is_native_where_it_can_be_used(
    sink: list[float] | None, start: int
) -> None:
    call = step("right", start)
    call["sink"] = None if sink is None else torch.tensor(sink, dtype=torch.float64)
    expected = run(Implementation.NATIVE, PLAIN, call)
    assert relative_error(run(Implementation.SDPA, PLAIN, call), expected) < ROUNDOFF
    call["attention_mask"] = None
    expected = run(Implementation.NATIVE, PLAIN, call)
    assert relative_error(run(Implementation.SDPA, PLAIN, call), expected) < ROUNDOFF


@pytest.mark.parametrize("limits", [{}, {"sliding_window": 4}])
def test_a_mask_for_every_pair_is_served_by_flash(limits: dict[str, Any]) -> None:
    rule, call = replace(PLAIN, **limits), step()
    pairs = torch.rand(BATCH, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(5)) < 0.5
    call |= {"attention_mask": pairs, "sink": drawn(HEADS)}
    expected = run(Implementation.NATIVE, rule, call)
    assert relative_error(run(Implementation.FLASH, rule, call), expected) < ROUNDOFF


@pytest.mark.parametrize("limits", [{}, {"sliding_window": 5}, {"attention_chunk_size": 6}])
@pytest.mark.parametrize("explicit", [False, True])
def test_cached_keys_are_seen_alike(limits: dict[str, Any], explicit: bool) -> None:
    """Rows continue after 4, 0 and 2 cached tokens, one of which is not to be seen."""
    rule, call = replace(PLAIN, **limits), step()
    before = torch.tensor([4, 0, 2])
    held = torch.where(torch.arange(6) < before[:, None], torch.arange(6), -1)
    held[0, 1] = -1
    call["position_ids"] = torch.where(
        call["position_ids"] >= 0, call["position_ids"] + before[:, None], -1
    )
    if explicit:
        call["attention_mask"] = torch.ones(1, 1, LENGTH, LENGTH).tril().bool()
    call["prior"] = PriorKeys(
        k=drawn(BATCH, KV_HEADS, 6, WIDTH), v=drawn(BATCH, KV_HEADS, 6, WIDTH), positions=held
    )
    expected = run(Implementation.NATIVE, rule, call)
    got = run(Implementation.FLASH, rule, call)
    real = (call["position_ids"] >= 0)[:, None, :, None]
    assert relative_error(got * real, expected * real) < ROUNDOFF


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("strided", [False, True])
def test_a_rank_computes_its_queries_only(rank: int, strided: bool) -> None:
    whole = step()
    mine = slice(rank, None, 2) if strided else slice(5 * rank, 5 * rank + 5)
    call = whole | {
        "q": whole["q"][:, :, mine],
        "position_ids": whole["position_ids"][:, mine],
        "kv_position_ids": whole["position_ids"],
    }
    rule = replace(PLAIN, q_offset=mine.start, q_stride=2 if strided else 1)
    expected = run(Implementation.NATIVE, PLAIN, whole)[:, :, mine]
    assert relative_error(run(Implementation.NATIVE, rule, call), expected) < ROUNDOFF
    assert relative_error(run(Implementation.FLASH, rule, call), expected) < ROUNDOFF


def wide_inputs(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What PyTorch's attention is given from now on."""
    given: list[Tensor] = []
    right = fused.scaled_dot_product_attention

    def spy(*tensors: Tensor, **named: Any) -> Tensor:
        given[:] = tensors
        return right(*tensors, **named)

    monkeypatch.setattr(fused, "scaled_dot_product_attention", spy)
    return given


@pytest.mark.parametrize("width", [8, 5, 64, 126, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_key_of_a_sink_has_its_logit_to_float32(
    dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rounding of `sink * divisor`, one of the pieces' remainder, or float16's smallest."""
    given = wide_inputs(monkeypatch)
    divisor = math.sqrt(width)
    sink = torch.tensor([-1234.5, -0.7131, 1e-3, 17.773], dtype=torch.float32)
    q, k, v = (drawn(1, heads, 5, width).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
    fused.fused_attention(q, k, v, divisor=divisor, causal=True, sink=sink)
    wide_q, wide_k, wide_v = (tensor.double() for tensor in given)
    assert wide_q.shape[3] % 8 == 0
    heads_of = wide_k[:, :, 0].repeat_interleave(HEADS // KV_HEADS, dim=1)
    logits = (wide_q[0, :, 1:] * heads_of[0, :, None]).sum(dim=2) / divisor
    smallest = 2.0**-25 * 256 / divisor if dtype == torch.float16 else 0.0
    limit = 2 * 2.0**-24 * sink.double().abs() + smallest
    assert bool(((logits - sink.double()[:, None]).abs() <= limit[:, None]).all())
    others = wide_q[..., width:] @ wide_k[:, :, 1:, width:].repeat_interleave(2, 1).transpose(2, 3)
    assert not others.any()
    assert not wide_v[:, :, 0].any()
    assert not wide_v[..., width:].any()


def test_a_planted_bug_shows_a_sink_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_PIECES", 1)
    with pytest.raises(AssertionError):
        test_the_key_of_a_sink_has_its_logit_to_float32(torch.bfloat16, 64, monkeypatch)


def test_a_sink_that_is_not_a_number_makes_no_number() -> None:
    sink = torch.tensor([0.0, math.nan, math.inf, 0.0], dtype=torch.float64)
    got = run(Implementation.SDPA, PLAIN, step() | {"sink": sink})
    assert got[0, 1:3].isnan().all()
    assert got[0, ::3].isfinite().all()


@pytest.mark.parametrize("implementation", [Implementation.SDPA, Implementation.FLASH])
@pytest.mark.parametrize("breach", ["left padding", "a gap", "packed"])
def test_a_row_that_breaks_the_promise_is_nan_and_no_other(
    implementation: Implementation, breach: str
) -> None:
    call = step()
    at = call["position_ids"].clone()
    if breach == "left padding":
        at[1] = step("left")["position_ids"][1]
    elif breach == "a gap":
        at[1, 3:6] += 1
    else:
        at[1, :6] = torch.tensor([0, 1, 2, 0, 1, 2])
    got = run(implementation, PLAIN, call | {"position_ids": at, "attention_mask": at >= 0})
    assert got[1][:, at[1] >= 0].isnan().all()
    expected = run(Implementation.NATIVE, PLAIN, call)
    assert relative_error(got[[0, 2]], expected[[0, 2]]) < ROUNDOFF


@pytest.mark.parametrize("implementation", [Implementation.SDPA, Implementation.FLASH])
def test_what_padding_holds_reaches_nothing(implementation: Implementation) -> None:
    call = step()
    clean = run(implementation, PLAIN, call)
    padding = (call["position_ids"] < 0)[:, None, :, None]
    for name in "qkv":
        call[name] = call[name].masked_fill(padding, float("nan"))
    assert torch.equal(run(implementation, PLAIN, call), clean)
    assert not clean[:, :, -1][1:].any()


def test_pytorchs_attention_refuses_what_it_cannot_express() -> None:
    with pytest.raises(ConfigError, match="implementation must be able to express the layer"):
        run(Implementation.SDPA, replace(PLAIN, sliding_window=3), step())
