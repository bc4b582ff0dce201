"""Decode steps that write their cache in place leave what functional ones return, and say it."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from impl_layers import HIDDEN, KV_HEADS, WIDTH, layer, model, tokens
from served_caches import KINDS, LENGTH, LINES, TABLES, Kind
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from impl import KVCacheManager, NeuronAttentionBase, RotaryEmbedding
from impl.kernels import updated
from impl.strategy import Implementation

BLOCK = {
    "fused_qkv": True,
    "qkv_kernel_enabled": True,
    "attn_block_tkg_nki_kernel_enabled": True,
}
UPDATE = "attn_block_tkg_nki_kernel_cache_update"
REFUSED = ("core-sharded", "core-sharded, one process", "paged, heads first")
"""Kinds whose configuration the decode block refuses."""
SERVED = {name: kind for name, kind in KINDS.items() if name not in REFUSED}
VIEWED = (
    "contiguous",
    "transposed",
    "tiled",
    "rolling",
    "rolling, drafts",
    "rolling, kernel bucket",
    "rolling, window 1",
    "rolling, window above length",
    "chunk",
    "chunk of one",
)
"""Kinds that a layer reads without a copy."""
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sinks": {"learned_sinks_size": 1},
    "softcap": {"attn_logit_softcapping": 2.0},
}


def served(
    kind: Kind,
    in_place: bool,
    dtype: torch.dtype = torch.float64,
    block: bool = True,
    **features: Any,
) -> tuple[NeuronAttentionBase, KVCacheManager]:
    """A layer and its cache, whose slots hold NaN until they are written."""
    run = {"seq_len": LENGTH, "batch_size": LINES, **kind.run, **BLOCK, UPDATE: in_place}
    config = model(dtype, run | {"fused_qkv": block}, **kind.fields)
    limits = {
        name: kind.fields[name]
        for name in ("sliding_window", "attention_chunk_size")
        if name in kind.fields
    }
    if "attention_chunk_size" in limits:
        features = {}  # which has no sinks
    made = layer(config=config, rotary_emb=RotaryEmbedding(WIDTH), **limits, **features)
    manager = KVCacheManager(config, kv_scales=None if kind.scales is None else [kind.scales])
    for stored in manager.past_key_values:
        stored.copy_(torch.full(stored.shape, float("nan")))
    return made, manager


def schedule(kind: Kind) -> list[tuple[Tensor, Tensor]]:
    """Hidden states and positions of a prompt of unequal lengths, and of decode steps."""
    at = torch.arange(7) - (torch.tensor([0, 2, 3])[:, None] if kind.padding == "left" else 0)
    lengths = torch.tensor([7, 5, 4])
    steps = [at.expand(LINES, 7).masked_fill(at >= lengths[:, None], -1)]
    for length in (1, 1, kind.drafts, 1):
        steps.append(lengths[:, None] + torch.arange(length))
        lengths = lengths + length
    return [(tokens(at.shape[1], batch=LINES, seed=seed), at) for seed, at in enumerate(steps)]


def run(
    made: NeuronAttentionBase, manager: KVCacheManager, kind: Kind, **call: Any
) -> list[tuple[Tensor, ...]]:
    """Output of every step, and the caches after it."""
    call |= {"kv_mgr": manager, "idx": 0, "update_kv_per_layer": True}
    if "pa_block_size" in kind.run:
        call["active_block_table"] = TABLES
    results = []
    for number, (hidden, at) in enumerate(schedule(kind)):
        more: dict[str, Any] = {"attention_mask": at >= 0}
        if number:
            q_len = at.shape[1]
            more = {"get_kv_per_layer": True}
            more["active_mask"] = torch.ones(1, 1, q_len, q_len).tril().bool()
        got = made(hidden, position_ids=at, **call, **more)
        own = manager.stored_kv(0)
        mine = [one is other for one, other in zip(got.present_key_value, own, strict=True)]
        assert (
            mine == [bool(number and made.neuron_config.attn_block_tkg_nki_kernel_cache_update)] * 2
        )
        manager.store(0, got.present_key_value)
        results.append((got.hidden_states, *(stored.clone() for stored in own)))
    return results


def bits(results: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Everything as float64, NaN as one number."""
    return [tensor.double().nan_to_num(nan=77.0) for step in results for tensor in step]


@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("ids", [False, True])
def test_steps_in_place_leave_the_bits_of_functional_ones(
    kind: str, features: str, ids: bool
) -> None:
    call = {"seq_ids": torch.tensor([2, 0, 1])} if ids else {}
    for block in (True, False):
        found = []
        for in_place in (False, True):
            pair = served(SERVED[kind], in_place, block=block, **FEATURES[features])
            found.append(bits(run(*pair, SERVED[kind], **call)))
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize("call", [{}, {"seq_ids": torch.arange(LINES)}, {"seq_len": 3}])
def test_the_layer_writes_what_it_reads_without_a_copy(kind: str, call: dict[str, Any]) -> None:
    made, manager = served(SERVED[kind], True)
    written = []
    right = updated.write_step

    def write(*tensors: Tensor, **named: bool) -> None:
        written.append(tensors)
        right(*tensors, **named)

    block = "impl.kernels.token_generation_block.write_step"
    if "seq_len" in call and "seq_ids" not in call:
        manager.reset()
    with patch(block, write):
        at = torch.full((LINES, 1), 2)
        more = {"active_block_table": TABLES} if "pa_block_size" in SERVED[kind].run else {}
        made(
            tokens(1, batch=LINES),
            position_ids=at,
            kv_mgr=manager,
            idx=0,
            get_kv_per_layer=True,
            update_kv_per_layer=True,
            **call,
            **more,
        )
    short = {"rolling", "rolling, window 1", "chunk of one"}  # of which 3 positions use every slot
    whole = not call or ("seq_len" in call and kind in short)
    assert len(written) == (kind in VIEWED and whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["contiguous", "tiled", "rolling, drafts", "chunk"])
def test_16_bits_are_read_by_pytorchs_attention_where_it_can(dtype: torch.dtype, kind: str) -> None:
    right, choices = updated.token_generation, []

    def count(*tensors: Any, **named: Any) -> Tensor:
        choices.append(1)
        return right(*tensors, **named)

    for features in FEATURES.values():
        choices.clear()
        made, manager = served(SERVED[kind], True, dtype, **features)
        with patch.object(updated, "token_generation", count):
            run(made, manager, SERVED[kind])
        plain = not features or "attention_chunk_size" in SERVED[kind].fields
        assert len(choices) == (4 if plain else 0)


def test_decode_says_so() -> None:
    made, _ = served(KINDS["contiguous"], True, torch.bfloat16)
    asked = made.decode_kernel_choice(LINES, 1, LENGTH, updates=True)
    assert asked.implementation is Implementation.SDPA
    assert made.decode_kernel_choice(LINES, 1, LENGTH).implementation is Implementation.NATIVE
    for kind, more in (("transposed", {}), ("contiguous", {"learned_sinks_size": 1})):
        other, _ = served(KINDS[kind], True, torch.bfloat16, **more)
        choice = other.decode_kernel_choice(LINES, 1, LENGTH, updates=True)
        assert choice.implementation is Implementation.NATIVE


def test_a_buffer_is_written_in_place_of_the_own_cache() -> None:
    for block in (True, False):
        made, manager = served(KINDS["contiguous"], True, block=block)
        manager.reset()
        buffer = [tuple(torch.zeros_like(stored) for stored in manager.past_key_values)]
        got = made(
            tokens(1, batch=LINES),
            position_ids=torch.full((LINES, 1), 4),
            kv_mgr=manager,
            idx=0,
            kvcache_buffer=buffer,
            get_kv_per_layer=True,
            update_kv_per_layer=True,
        )
        for mine, returned, own in zip(
            buffer[0], got.present_key_value, manager.past_key_values, strict=True
        ):
            assert returned is mine
            assert mine[:, :, 4].all()
            assert not own.any()


def test_a_cache_that_the_caller_gives_is_not_written() -> None:
    made, manager = served(KINDS["contiguous"], True)
    manager.reset()
    past = [torch.ones(LINES, KV_HEADS, LENGTH, WIDTH, dtype=torch.float64) for _ in range(2)]
    got = made(
        tokens(1, batch=LINES),
        position_ids=torch.full((LINES, 1), 4),
        past_key_value=tuple(past),
        kv_mgr=manager,
        idx=0,
        update_kv_per_layer=True,
    )
    for given, own, returned in zip(
        past, manager.past_key_values, got.present_key_value, strict=True
    ):
        assert bool((given == 1).all())
        assert returned is own
        assert own[:, :, 4].all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_step_in_place_needs_no_values_and_is_one_graph(dtype: torch.dtype) -> None:
    made, manager = served(KINDS["contiguous"], True, dtype)
    manager.reset()
    hidden, at = tokens(1, batch=LINES, dtype=dtype), torch.full((LINES, 1), 4)
    call: dict[str, Any] = {"kv_mgr": manager, "idx": 0, "get_kv_per_layer": True}
    call["update_kv_per_layer"] = True

    def step(hidden: Tensor, at: Tensor, *buffer: Tensor) -> Tensor:
        out = made(hidden, position_ids=at, kvcache_buffer=[buffer], **call)
        return out.hidden_states  # type: ignore[no-any-return]

    def given() -> list[Tensor]:
        return [hidden, at, *(stored.detach().clone() for stored in manager.past_key_values)]

    torch._dynamo.reset()
    ours, theirs = given(), given()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=False)(*ours)
    eager = step(*theirs)
    assert dtype != torch.float64 or torch.equal(compiled, eager)  # else of two kernels
    for one, other in zip(ours[2:], theirs[2:], strict=True):
        assert torch.equal(one, other)
        assert one.any()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = step(*(mode.from_tensor(tensor) for tensor in given()))
    assert fake.shape == (LINES, 1, HIDDEN)
