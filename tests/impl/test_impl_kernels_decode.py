"""Decode streamed over the cache, or head by head, is the native form's function."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from impl_layers import ROUNDOFF, layer, positions, relative_error, tokens
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from impl import ConfigError, RotaryEmbedding, attention_core
from impl.decode_strategy import (
    HEADWISE_SCORES,
    HEADWISE_SLOTS,
    NATIVE_CACHE,
    DecodeStep,
    resolve_decode_kernel,
)
from impl.kernels import decode, flash_plan, headwise
from impl.kernels.native import ScoreRule
from impl.strategy import Implementation

BATCH, KV_HEADS, WIDTH, SLOTS, KV_TILE = 3, 2, 8, 11, 4
IN_PIECES = [Implementation.FLASH, Implementation.HEADWISE]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_plan, "KV_TILE", KV_TILE)
    monkeypatch.setattr(headwise, "PIECE", KV_TILE * WIDTH)


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
@pytest.mark.parametrize("form", IN_PIECES)
def test_decode_in_pieces_is_native(
    form: Implementation,
    q_len: int,
    group: int,
    transposed: bool,
    per_query: bool,
    softcap: float | None,
) -> None:
    call = step(q_len, group, per_query=per_query)
    sink = torch.linspace(-1, 3, KV_HEADS * group, dtype=torch.float64)
    if transposed:
        call |= {"k_prior": call["k_prior"].transpose(2, 3), "k_prior_transposed": True}
    for s in (None, sink):
        call |= {"sink": s, "rule": ScoreRule(divisor=2.5, softcap=softcap)}
        expected = decode(**call, implementation=Implementation.NATIVE)
        got = decode(**call, implementation=form)
        assert expected.isfinite().all()
        assert relative_error(got, expected) < ROUNDOFF


@pytest.mark.parametrize("form", IN_PIECES)
def test_a_tree_of_drafts_sees_its_ancestors(form: Implementation) -> None:
    call = step(4, 2)
    tree = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]).bool()
    call |= {"active_mask": tree[None, None], "sink": None, "rule": ScoreRule(divisor=2.0)}
    expected = decode(**call, implementation=Implementation.NATIVE)
    got = decode(**call, implementation=form)
    assert relative_error(got, expected) < ROUNDOFF


@pytest.mark.parametrize("features", [{}, {"sliding_window": 5, "learned_sinks_size": 1}])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", IN_PIECES)
def test_a_layer_decodes_alike_with_either(
    form: Implementation,
    features: dict[str, Any],
    transposed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = {"k_cache_transposed": transposed}
    made = layer(run=run, rotary_emb=RotaryEmbedding(WIDTH), **features)
    past = [torch.randn(2, 2, SLOTS, WIDTH, dtype=torch.float64) for _ in range(2)]
    if made.k_cache_transposed:
        past[0] = past[0].transpose(2, 3)
    call = {"position_ids": positions(1, 7), "past_key_value": tuple(past)}
    expected = made(tokens(1), **call).hidden_states
    monkeypatch.setattr(attention_core, "resolve_decode_kernel", lambda step: form)
    assert relative_error(made(tokens(1), **call).hidden_states, expected) < ROUNDOFF


LONG = DecodeStep(
    batch=1,
    num_attention_heads=32,
    num_key_value_heads=8,
    q_len=1,
    slots=1 << 13,
    head_dim=128,
    dtype=torch.bfloat16,
)
LONG_FLOAT32 = replace(LONG, dtype=torch.float32)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (LONG, Implementation.HEADWISE),
        (replace(LONG, dtype=torch.float16), Implementation.HEADWISE),
        (replace(LONG, slots=HEADWISE_SLOTS // 128), Implementation.HEADWISE),
        (replace(LONG, slots=HEADWISE_SLOTS // 128 - 1), Implementation.NATIVE),
        (replace(LONG, slots=HEADWISE_SCORES // 32), Implementation.HEADWISE),
        (replace(LONG, slots=HEADWISE_SCORES // 32 + 1), Implementation.FLASH),
        (replace(LONG, updates=True), Implementation.SDPA),
        (replace(LONG, updates=True, dtype=torch.float16, slots=1), Implementation.SDPA),
        (replace(LONG, updates=True, trains=True), Implementation.FLASH),
        (replace(LONG, updates=True, device_type="cuda"), Implementation.FLASH),
        (replace(LONG, updates=True, device_type="neuron"), Implementation.NATIVE),
        (replace(LONG_FLOAT32, updates=True), Implementation.SDPA),
        (replace(LONG, updates=True, dtype=torch.float64), Implementation.FLASH),
        (replace(LONG, trains=True), Implementation.FLASH),
        (replace(LONG, device_type="cuda"), Implementation.FLASH),
        (replace(LONG, device_type="neuron"), Implementation.NATIVE),
        (LONG_FLOAT32, Implementation.FLASH),
        (replace(LONG_FLOAT32, slots=NATIVE_CACHE // 1024), Implementation.NATIVE),
        (replace(LONG_FLOAT32, slots=NATIVE_CACHE // 1024 + 1), Implementation.FLASH),
    ],
)
def test_long_caches_are_read_in_pieces(step: DecodeStep, expected: Implementation) -> None:
    assert resolve_decode_kernel(step) is expected


def test_a_graph_has_no_loop_over_heads() -> None:
    def form(x: Tensor) -> Tensor:
        return x + IN_PIECES.index(resolve_decode_kernel(LONG))

    compiled = torch.compile(form, backend="eager", fullgraph=True)
    zero = torch.zeros(())
    assert int(form(zero)) == IN_PIECES.index(Implementation.HEADWISE)
    assert int(compiled(zero)) == IN_PIECES.index(Implementation.FLASH)


def test_heads_after_one_another_need_no_values() -> None:
    call = step(2, 4) | {"sink": None, "rule": ScoreRule(divisor=2.0)}
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value
            for name, value in call.items()
        }
        out = decode(**fake, implementation=Implementation.HEADWISE)
    assert (out.shape, out.dtype) == (call["q"].shape, call["q"].dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_heads_after_one_another_are_rounded_once(dtype: torch.dtype, transposed: bool) -> None:
    """Half an ulp from the float64 result, and what float32 leaves.

    A score of d products is off by at most (d + 2) u times the product of its absolute values, so a
    weight by that much of itself, numerator and sum alike; a mean of n values by (n + 4) u more.
    The step's own key is hidden: its weight alone is rounded, as in the native form.
    """
    call = step(1, 4) | {"sink": torch.linspace(-1, 3, 8), "rule": ScoreRule(divisor=2.5)}
    tensors = ("q", "k", "v", "k_prior", "v_prior")
    call |= {name: call[name].to(dtype) for name in tensors}
    call["active_mask"] = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    exact = call | {name: call[name].double() for name in tensors}
    expected = decode(**exact, implementation=Implementation.NATIVE)
    q, k, v = (exact[name].nan_to_num().abs() for name in ("q", "k_prior", "v_prior"))
    largest = float((q.view(BATCH, KV_HEADS, 4, WIDTH) @ k.transpose(2, 3)).max()) / 2.5
    u = 2.0**-24
    remainder = (2 * (WIDTH + 2) * largest + SLOTS + 4) * u * float(v.max())
    if transposed:
        call |= {"k_prior": call["k_prior"].transpose(2, 3), "k_prior_transposed": True}
    got = decode(**call, implementation=Implementation.HEADWISE)
    assert got.dtype == dtype
    half_ulp = torch.finfo(dtype).eps / 2 * expected.abs()
    assert bool(((got.double() - expected).abs() <= half_ulp + remainder).all())


def test_decode_has_no_form_in_pytorchs_attention() -> None:
    with pytest.raises(ConfigError, match="implementation must be native, headwise or flash"):
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


@pytest.mark.parametrize("bug", ["a piece is dropped", "a head is another's"])
def test_a_planted_bug_shows_in_heads_after_one_another(
    bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = step(1, 2) | {"sink": None, "rule": ScoreRule(divisor=2.0)}
    expected = decode(**call, implementation=Implementation.NATIVE)
    if bug == "a piece is dropped":
        monkeypatch.setattr(headwise._Pieces, "__iter__", lambda self: iter(self._pieces[:-1]))
    else:
        right = headwise._add_values
        monkeypatch.setattr(
            headwise,
            "_add_values",
            lambda out, weights, v, mask: right(out, weights, v.flip(1), mask),
        )
    got = decode(**call, implementation=Implementation.HEADWISE)
    assert not relative_error(got, expected) <= 1e-3
