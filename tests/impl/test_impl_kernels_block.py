"""A decode step as one function gives the bits of the layer's own, and changes no cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from impl_layers import HEADS, HIDDEN, KV_HEADS, WIDTH, layer, positions, tokens
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from impl import QKNormPlacement, RMSNorm, RotaryEmbedding, ShapeError
from impl.kernels import token_generation_block as blocks
from impl.kernels.native import ScoreRule
from impl.kernels.token_generation_block import BlockRule, BlockWeights, token_generation_block
from impl.step import Phase, StepInputs

SLOTS = 11
BLOCK = {"qkv_kernel_enabled": True, "attn_block_tkg_nki_kernel_enabled": True}


def norm(seed: int, width: int = WIDTH) -> RMSNorm:
    made = RMSNorm(width, 1e-5, weight_offset=1.0)
    with torch.no_grad():
        made.weight.copy_(torch.randn(width, generator=torch.Generator().manual_seed(seed)) / 4)
    return made.requires_grad_(False)


FEATURES: dict[str, dict[str, Any]] = {
    "rope": {"rotary_emb": RotaryEmbedding(WIDTH)},
    "bias, sinks, window": {
        "rotary_emb": RotaryEmbedding(WIDTH),
        "qkv_bias": True,
        "o_bias": True,
        "learned_sinks_size": 1,
        "sliding_window": 4,
    },
    "norm before": {
        "rotary_emb": RotaryEmbedding(WIDTH),
        "q_layernorm": norm(1),
        "k_layernorm": norm(2),
    },
    "norm after": {
        "rope_theta": 1e4,
        "q_layernorm": norm(1),
        "k_layernorm": norm(2),
        "qk_layernorm_placement": QKNormPlacement.POST_ROPE,
    },
    "no rope, softcap": {"attn_logit_softcapping": 2.0},
    "chunk": {"rope_theta": 1e4, "attention_chunk_size": 4},
}


def call(features: dict[str, Any], dtype: torch.dtype, transposed: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(4)
    k, v = (torch.randn(2, KV_HEADS, SLOTS, WIDTH, generator=generator).to(dtype) for _ in range(2))
    at = torch.tensor([[7], [2]])
    made: dict[str, Any] = {
        "hidden_states": tokens(1, dtype=dtype),
        "position_ids": at,
        "past_key_value": (k.transpose(2, 3) if transposed else k, v),
        "rmsnorm": norm(3, HIDDEN).to(dtype),
        "residual": tokens(1, dtype=dtype, seed=9),
    }
    if "rope_theta" in features:
        made["use_polar_compatible_rope"] = True
    return made


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_block_gives_the_bits_of_the_layer(
    features: dict[str, Any], dtype: torch.dtype, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = {"fused_qkv": True, "k_cache_transposed": transposed, "qkv_kernel_enabled": True}
    plain = layer(dtype, run=run, **features)
    fused = layer(dtype, run={**run, **BLOCK}, **features)
    calls: list[int] = []
    right = blocks.token_generation_block

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return right(*arguments, **named)

    monkeypatch.setattr("impl.attention_block.token_generation_block", counted)
    arguments = call(features, dtype, fused.k_cache_transposed)
    before = [t.clone() for t in arguments["past_key_value"]]
    expected, got = plain(**arguments), fused(**arguments)
    assert calls == [1]
    assert torch.equal(got.hidden_states, expected.hidden_states)
    assert torch.equal(got.residual, expected.residual)
    for a, b in zip(got.present_key_value, expected.present_key_value, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(arguments["past_key_value"], before, strict=True):
        assert torch.equal(a, b)


def test_several_tokens_with_an_active_mask() -> None:
    features = FEATURES["bias, sinks, window"]
    run = {"fused_qkv": True, "qkv_kernel_enabled": True}
    plain = layer(run=run, **features)
    fused = layer(run={**run, **BLOCK}, **features)
    arguments = call(features, torch.float64, False) | {
        "hidden_states": tokens(3),
        "residual": None,
        "position_ids": positions(3, 5),
        "active_mask": torch.ones(1, 1, 3, 3).tril().bool(),
    }
    assert torch.equal(fused(**arguments).hidden_states, plain(**arguments).hidden_states)


@pytest.mark.parametrize(
    "features",
    [{"clip_qkv": 1.0}, {"use_qk_norm": True, "rms_norm_eps": 1e-6}, {"run": {"fused_qkv": False}}],
)
def test_what_the_kernel_has_no_argument_for_stays_with_the_layer(features: dict[str, Any]) -> None:
    run = {"fused_qkv": True, **BLOCK, **features.pop("run", {})}
    made = layer(run=run, **features)
    step = StepInputs(Phase.TOKEN_GENERATION, tokens(1), positions(1, 5))
    assert not made.uses_block(step)
    assert layer(run={"fused_qkv": True, **BLOCK}).uses_block(step)
    assert not layer(run={"fused_qkv": True, **BLOCK}).uses_block(
        step._replace(phase=Phase.CONTEXT_ENCODING)
    )


def arguments(q_len: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "hidden_states": drawn(2, q_len, HIDDEN),
        "weights": BlockWeights(
            qkv=drawn((HEADS + 2 * KV_HEADS) * WIDTH, HIDDEN), output=drawn(HIDDEN, HEADS * WIDTH)
        ),
        "rule": BlockRule(
            num_key_value_heads=KV_HEADS, head_dim=WIDTH, score=ScoreRule(divisor=2.0)
        ),
        "cos": None,
        "sin": None,
        "k_cache": drawn(2, KV_HEADS, SLOTS, WIDTH),
        "v_cache": drawn(2, KV_HEADS, SLOTS, WIDTH),
        "prior_mask": torch.ones(1, 1, 1, SLOTS).bool(),
        "active_mask": torch.ones(1, 1, q_len, q_len).tril().bool(),
    }


@pytest.mark.parametrize("transposed", [False, True])
def test_the_step_is_written_into_the_caches(transposed: bool) -> None:
    given = arguments()
    if transposed:
        given["k_cache"] = given["k_cache"].transpose(2, 3).contiguous()
        given["rule"] = replace(given["rule"], k_cache_transposed=True)
    slots = torch.tensor([[3, 4], [-1, 10]], dtype=torch.int32)
    before = {name: given[name].clone() for name in ("k_cache", "v_cache")}
    alone = token_generation_block(**given)
    for name, old in before.items():
        assert torch.equal(given[name], old)
    got = token_generation_block(**given, write_slots=slots)
    for one, other in zip(got, alone, strict=True):
        assert torch.equal(one, other)
    for step, name in ((alone.k, "k_cache"), (alone.v, "v_cache")):
        expected = before[name]
        rows = expected.transpose(2, 3) if transposed and name == "k_cache" else expected
        rows[0, :, 3:5] = step[0]
        rows[1, :, 10] = step[1, :, 1]
        assert torch.equal(given[name], expected)


def test_it_is_one_graph_and_runs_on_fake_tensors() -> None:
    given = arguments()
    slots = torch.tensor([[3, 4], [5, 6]])

    def step(hidden_states: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        tensors = {"hidden_states": hidden_states, "k_cache": k_cache, "v_cache": v_cache}
        out = token_generation_block(**{**given, **tensors}, write_slots=slots)
        return out.hidden_states

    def tensors() -> list[Tensor]:
        return [given[name].clone() for name in ("hidden_states", "k_cache", "v_cache")]

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=False)
    ours, theirs = tensors(), tensors()
    assert torch.equal(compiled(*ours), step(*theirs))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(ours[1], given["k_cache"])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert step(*(mode.from_tensor(tensor) for tensor in tensors())).dim() == 3


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"cos": torch.zeros(2, 2, WIDTH)}, "cos and sin must be given together"),
        ({"write_slots": torch.zeros(2, 1).long()}, "write_slots must have shape"),
        (
            {"weights": BlockWeights(qkv=torch.zeros(35, HIDDEN), output=torch.zeros(1, 1))},
            "qkv must have a multiple of 16 rows",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_words(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ShapeError, match=match):
        token_generation_block(**{**arguments(), **change})
