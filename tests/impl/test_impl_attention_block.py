"""Which decode steps are one call, what computes them and why, alone and on ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from block_tkg_standin import BlockStandin
from impl_layers import ROUNDOFF, layer, model, relative_error
from nki_packages import forget_operators, install_packages
from torch import Tensor, nn

from impl import (
    KVCacheManager,
    L2Norm,
    LoraServingConfig,
    NeuronAttentionBase,
    QKNormPlacement,
    QKNormScope,
    RMSNorm,
    RotaryEmbedding,
)
from impl.attention_block import AttentionBlock
from impl.decode_strategy import DecodeStep, resolve_block_kernel
from impl.kernels import nki_block_limits
from impl.slot_positions import LeftPaddedSlots, RollingSlots
from impl.strategy import Implementation, KernelChoice

HIDDEN, HEADS, WIDTH, SLOTS = 128, 2, 64, 128
BF16 = torch.bfloat16
RUN = {
    "attn_block_tkg_nki_kernel_enabled": True,
    "qkv_kernel_enabled": True,
    "fused_qkv": True,
    "seq_len": SLOTS,
}
SERVES = "nki-library's attention_block_tkg serves it"


def made(
    dtype: torch.dtype = BF16,
    run: dict[str, Any] | None = None,
    width: int = WIDTH,
    kv_heads: int = 1,
    **features: Any,
) -> NeuronAttentionBase:
    sizes = {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": kv_heads,
        "head_dim": width,
    }
    return layer(config=model(dtype, {**RUN, **(run or {})}, **sizes), **features)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[BlockStandin]:
    """The stand-in, on a machine with a device."""
    standin = BlockStandin()
    install_packages(monkeypatch, "attention_block_tkg", standin, device=True)
    forget_operators()
    yield standin
    forget_operators()


@pytest.fixture
def on_neuron(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let layers choose as on neuron, and in float64; tensors stay where they are."""
    served = (*nki_block_limits.DTYPES, torch.float64)
    monkeypatch.setattr(nki_block_limits, "DTYPES", served)
    choose = AttentionBlock.decode_kernel_choice

    def choice(self: AttentionBlock, *shape: int, **given: Any) -> KernelChoice:
        return choose(self, *shape, **{**given, "device_type": "neuron"})

    monkeypatch.setattr(AttentionBlock, "decode_kernel_choice", choice)


def norms(width: int, **given: Any) -> dict[str, Any]:
    return {f"{name}_layernorm": RMSNorm(width, 1e-5, **given) for name in "qk"}


@pytest.mark.parametrize(
    ("features", "call", "reason"),
    [
        ({}, {}, SERVES),
        ({"rotary_emb": RotaryEmbedding(WIDTH), "learned_sinks_size": 1}, {}, SERVES),
        ({"dtype": torch.float16, "qkv_bias": True, "o_bias": True}, {}, SERVES),
        ({"rope_theta": 1e4}, {"use_polar_compatible_rope": True}, SERVES),
        ({"width": 128, **norms(128)}, {"rmsnorm": RMSNorm(HIDDEN)}, SERVES),
        ({"sliding_window": 20}, {"cache_layout": RollingSlots(19)}, SERVES),
        ({}, {"trains": True}, "no backward"),
        ({}, {"cache_layout": LeftPaddedSlots()}, "last slots, which hold cached keys"),
        ({"run": {"padding_side": "left"}}, {}, "last slots, which hold cached keys"),
        ({"attn_logit_softcapping": 5.0}, {}, "no softcap"),
        ({"dtype": torch.float32}, {}, "the layer is in torch.float32"),
        ({"kv_heads": 2}, {}, "one KV head a rank, and there are 2"),
        ({"rotary_emb": RotaryEmbedding(32)}, {}, "32 of 64 turn"),
        ({}, {"rotary_dim": 32}, "32 of 64 turn"),
        (norms(WIDTH), {}, "norms heads of 128 alone"),
        ({"run": {"logical_nc_config": 2}}, {}, "hidden size 128 is no multiple of 256"),
        ({"run": {"is_eagle_draft": True, "is_eagle3": True}}, {}, "not 256 and 128"),
    ],
)
def test_on_neuron_a_layer_takes_the_kernel_where_it_can_and_says_why_not(
    kernel: BlockStandin, features: dict[str, Any], call: dict[str, Any], reason: str
) -> None:
    chosen = made(**features).decode_kernel_choice(2, 1, SLOTS, device_type="neuron", **call)
    assert reason in chosen.reason
    assert (chosen.implementation is Implementation.NKI) == (reason == SERVES)
    elsewhere = made(**features).decode_kernel_choice(2, 1, SLOTS, **call)
    assert elsewhere.implementation is Implementation.NATIVE
    assert elsewhere.reason.endswith("no NKI kernel runs on cpu")
    assert not kernel.calls


@pytest.mark.parametrize(
    ("features", "reason"),
    [
        ({"run": {"attn_block_tkg_nki_kernel_enabled": False}}, "tkg_nki_kernel_enabled is False"),
        ({"run": {"fused_qkv": False}}, "fused_qkv is False"),
        ({"run": {"lora_config": LoraServingConfig(max_loras=1)}}, "it has LoRA adapters"),
        ({"clip_qkv": 1.0}, "it clips q, k and v"),
        ({"use_qk_norm": True, "rms_norm_eps": 1e-6}, "it has a weightless norm"),
        (
            {
                "qk_layernorm_scope": QKNormScope.PROJECTION,
                "q_layernorm": RMSNorm(HEADS * WIDTH),
                "k_layernorm": RMSNorm(WIDTH),
            },
            "its norms run over the flat q and k",
        ),
        ({"attn_temperature_tuning": True}, "it scales queries by position"),
        ({"q_layernorm": L2Norm(), "k_layernorm": L2Norm()}, "a norm is no RMSNorm"),
    ],
)
def test_a_step_that_is_not_one_call_says_why(
    kernel: BlockStandin, features: dict[str, Any], reason: str
) -> None:
    chosen = made(**features).decode_kernel_choice(2, 1, SLOTS, device_type="neuron")
    assert reason in chosen.reason
    assert chosen.reason.startswith("the layer computes the step: ")
    assert chosen.implementation is Implementation.NATIVE
    assert not kernel.calls


def test_without_the_packages_a_layer_on_neuron_says_which_is_missing() -> None:
    chosen = made().decode_kernel_choice(2, 1, SLOTS, device_type="neuron")
    assert chosen.implementation is Implementation.NATIVE
    assert "nki must be importable" in chosen.reason


@pytest.mark.parametrize(
    ("device", "slots", "block", "obstacle", "expected"),
    [
        ("neuron", 1 << 17, None, None, Implementation.NKI),
        ("neuron", 1 << 17, None, "why", Implementation.NATIVE),
        ("neuron", 1 << 17, "why", None, Implementation.NATIVE),
        ("cpu", 1 << 17, None, None, Implementation.HEADWISE),
        ("cuda", 1 << 17, None, None, Implementation.FLASH),
        ("cuda", 1 << 13, None, None, Implementation.NATIVE),
    ],
)
def test_the_kernel_is_selected_on_neuron_alone(
    device: str,
    slots: int,
    block: str | None,
    obstacle: str | None,
    expected: Implementation,
) -> None:
    step = DecodeStep(
        batch=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        q_len=1,
        slots=slots,
        head_dim=64,
        dtype=torch.bfloat16,
        device_type=device,
    )
    chosen = resolve_block_kernel(step, block_obstacle=block, nki_obstacle=obstacle)
    assert chosen.implementation is expected
    assert (block or obstacle or "") in chosen.reason


def step(dtype: torch.dtype, q_len: int = 1, width: int = WIDTH) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "hidden_states": drawn(2, q_len, HIDDEN),
        "position_ids": torch.tensor([[70], [9]]) + torch.arange(q_len),
        "past_key_value": (drawn(2, 1, SLOTS, width), drawn(2, 1, SLOTS, width)),
        "active_mask": torch.ones(1, 1, q_len, q_len).bool().tril(),
    }


FEATURES: dict[str, dict[str, Any]] = {
    "rotation, sinks, biases": {
        "rotary_emb": RotaryEmbedding(WIDTH),
        "learned_sinks_size": 1,
        "qkv_bias": True,
        "o_bias": True,
    },
    "window": {"rotary_emb": RotaryEmbedding(WIDTH), "sliding_window": 20},
    "norms with one added, after": {
        "width": 128,
        **norms(128, weight_offset=1.0),
        "qk_layernorm_placement": QKNormPlacement.POST_ROPE,
    },
}


@pytest.mark.usefixtures("on_neuron")
@pytest.mark.parametrize("q_len", [1, 2])
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_a_layer_gives_the_same_by_the_kernel_and_by_itself(
    kernel: BlockStandin, features: dict[str, Any], q_len: int
) -> None:
    plain = made(torch.float64, {"attn_block_tkg_nki_kernel_enabled": False}, **features)
    block = made(torch.float64, **features)
    given = step(torch.float64, q_len, features.get("width", WIDTH))
    given["rmsnorm"] = RMSNorm(HIDDEN, 1e-5, weight_offset=1.0).to(torch.float64)
    nn.init.normal_(given["rmsnorm"].weight, std=0.2)
    given["position_ids"][1, -1] = -1  # padding, which sees nothing where it is a row of its own
    got, want = block(**given), plain(**given)
    assert len(kernel.calls) == 1
    pairs = zip(got.present_key_value, want.present_key_value, strict=True)
    for ours, right in [(got.hidden_states, want.hidden_states), *pairs]:
        assert relative_error(ours, right) < ROUNDOFF


@pytest.mark.usefixtures("on_neuron")
@pytest.mark.parametrize("transposed", [False, True])
def test_what_the_kernel_returns_is_written_into_the_cache(
    kernel: BlockStandin, transposed: bool
) -> None:
    found = []
    for enabled in (True, False):
        run: dict[str, Any] = {"k_cache_transposed": transposed, "batch_size": 2}
        run["attn_block_tkg_nki_kernel_enabled"] = enabled
        run["attn_block_tkg_nki_kernel_cache_update"] = enabled
        layer_made = made(torch.float64, run)
        cache = KVCacheManager(layer_made.config)
        given = step(torch.float64)
        past = given.pop("past_key_value")
        cache.store(0, (past[0].transpose(2, 3) if transposed else past[0], past[1]))
        given |= {"get_kv_per_layer": True, "update_kv_per_layer": True}
        got = layer_made(**given, kv_mgr=cache, idx=0)
        stored = tuple(cache.past_key_values)
        assert enabled is all(a is b for a, b in zip(got.present_key_value, stored, strict=True))
        found.append((got.hidden_states, *got.present_key_value))
    assert len(kernel.calls) == 1
    for ours, right in zip(*found, strict=True):
        assert relative_error(ours, right) < ROUNDOFF


@pytest.mark.usefixtures("on_neuron")
def test_a_step_beyond_the_kernel_runs_the_torch_form(kernel: BlockStandin) -> None:
    beyond = made(torch.float64, attn_logit_softcapping=5.0)
    assert beyond(**step(torch.float64)).hidden_states.isfinite().all()
    assert not kernel.calls


@pytest.mark.usefixtures("on_neuron")
def test_a_decode_step_of_a_layer_compiles_into_one_node_and_stays_in_bfloat16(
    kernel: BlockStandin,
) -> None:
    block = made(BF16, **FEATURES["rotation, sinks, biases"])
    given = step(BF16)
    want = block(**given)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    got = torch.compile(block, backend=backend, fullgraph=True, dynamic=False)(**given)
    assert torch.equal(got.hidden_states, want.hidden_states)
    assert got.hidden_states.dtype == BF16
    nodes = [n for graph in graphs for n in graph.graph.nodes if "impl_nki" in str(n.target)]
    assert len(nodes) == 1
    floating = [x for x in kernel.calls[0].values() if isinstance(x, Tensor)]
    assert {x.dtype for x in floating} == {BF16, torch.uint8}


def test_a_layer_takes_gradients_by_the_torch_form(kernel: BlockStandin) -> None:
    block = made(torch.float64)
    given = step(torch.float64)
    given["hidden_states"].requires_grad_()
    with torch.enable_grad():
        block(**given).hidden_states.sum().backward()
    assert given["hidden_states"].grad is not None
    assert not kernel.calls
