"""Static shapes and no data-dependent Python: fake tensors and whole-graph compilation."""

import shutil
from typing import Any

import pytest
import torch
from impl_layers import HIDDEN, KV_HEADS, WIDTH, layer, model, positions, relative_error, tokens
from torch._subclasses.fake_tensor import FakeTensorMode

from impl import KVCacheManager, LoraServingConfig, RMSNorm, RotaryEmbedding

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "truncate": False,
}
PATHS = {
    "full": ({"rotary_emb": RotaryEmbedding(WIDTH), "learned_sinks_size": 1}, {}),
    "window": (
        {"rotary_emb": RotaryEmbedding(WIDTH, rope_parameters=YARN), "sliding_window": 3},
        {},
    ),
    "chunk": ({"rope_theta": 1e4, "attention_chunk_size": 4}, {"use_polar_compatible_rope": True}),
    "dynamic": (
        {
            "rotary_emb": RotaryEmbedding(
                WIDTH,
                rope_parameters={
                    "rope_type": "dynamic",
                    "factor": 2.0,
                    "original_max_position_embeddings": 4,
                },
            )
        },
        {},
    ),
    "nope": ({"attn_temperature_tuning": True, "attn_logit_softcapping": 5.0}, {}),
}


def steps(dtype: torch.dtype, slots: int = 8) -> dict[str, dict[str, Any]]:
    """Arguments of calls: a prompt, a token, and the second window of a prompt."""
    past = tuple(torch.zeros(2, KV_HEADS, slots, WIDTH, dtype=dtype).normal_() for _ in range(2))
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    prefill = {"hidden_states": tokens(5, dtype=dtype), "attention_mask": keep}
    decode = {
        "hidden_states": tokens(1, dtype=dtype),
        "position_ids": positions(1, 5),
        "past_key_value": past,
    }
    window = {
        "hidden_states": tokens(5, dtype=dtype),
        "position_ids": positions(5, 5),
        "past_key_value": past,
        "windowed_context_encoding_window_idx": 1,
    }
    return {"prefill": prefill, "decode": decode, "window of a prompt": window}


WINDOWS = {"windowed_context_encoding_size": 5}


@pytest.mark.parametrize(("features", "call"), PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("phase", steps(torch.float32))
def test_every_path_compiles_as_one_graph(
    features: dict[str, Any], call: dict[str, Any], phase: str
) -> None:
    made = layer(torch.float32, WINDOWS, **features)
    arguments = {**steps(torch.float32)[phase], **call}
    torch._dynamo.reset()
    compiled = torch.compile(made, backend="eager", fullgraph=True, dynamic=False)
    got, expected = compiled(**arguments), made(**arguments)
    assert torch.equal(got.hidden_states, expected.hidden_states)
    assert torch.equal(got.present_key_value[0], expected.present_key_value[0])


@pytest.mark.parametrize(("features", "call"), PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_path_runs_on_fake_tensors(
    features: dict[str, Any], call: dict[str, Any], dtype: torch.dtype
) -> None:
    made = layer(dtype, WINDOWS, **features)
    for arguments in steps(dtype).values():
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = {
                name: torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, value)
                for name, value in arguments.items()
            }
            got = made(**fake, **call)
        expected = made(**arguments, **call)
        assert got.hidden_states.shape == expected.hidden_states.shape
        assert got.hidden_states.dtype is dtype


def test_a_step_with_its_cache_compiles_as_one_graph() -> None:
    made = layer(
        torch.float32,
        rotary_emb=RotaryEmbedding(WIDTH),
        q_layernorm=RMSNorm(WIDTH),
        k_layernorm=RMSNorm(WIDTH),
    )
    manager = KVCacheManager(model(torch.float32))
    call = {
        "hidden_states": tokens(1, dtype=torch.float32),
        "position_ids": positions(1, 5),
        "kv_mgr": manager,
        "get_kv_per_layer": True,
        "update_kv_per_layer": True,
        "idx": 0,
    }
    torch._dynamo.reset()
    compiled = torch.compile(made, backend="eager", fullgraph=True, dynamic=False)
    got, expected = compiled(**call), made(**call)
    for a, b in zip(got.present_key_value, expected.present_key_value, strict=True):
        assert torch.equal(a, b)


def test_adapters_and_what_the_qkv_kernel_fuses_compile_as_one_graph() -> None:
    run = {"lora_config": LoraServingConfig(max_loras=2), "qkv_kernel_enabled": True}
    made = layer(torch.float32, run, rotary_emb=RotaryEmbedding(WIDTH))
    call = {
        "hidden_states": tokens(5, dtype=torch.float32),
        "residual": tokens(5, dtype=torch.float32, seed=2),
        "rmsnorm": RMSNorm(HIDDEN),
        "adapter_ids": torch.tensor([1, -1]),
    }
    torch._dynamo.reset()
    compiled = torch.compile(made, backend="eager", fullgraph=True, dynamic=False)
    got, expected = compiled(**call), made(**call)
    assert torch.equal(got.hidden_states, expected.hidden_states)
    assert torch.equal(got.residual, expected.residual)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_computes_the_same_function() -> None:
    made = layer(torch.float32, rotary_emb=RotaryEmbedding(WIDTH), sliding_window=3)
    arguments = steps(torch.float32)["decode"]
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, dynamic=False)
    got, expected = compiled(**arguments), made(**arguments)
    # Both are within 4 contractions of length 48 of the exact result: 2 * 4 * 48 * 2^-24.
    assert relative_error(got.hidden_states, expected.hidden_states) < 2.3e-5
