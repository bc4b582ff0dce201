import logging
from typing import Any

import pytest
import torch
from impl_layers import WIDTH, layer, model, positions, tokens

from impl import ConfigError, RotaryEmbedding, get_flash_attention_strategy
from impl import FlashAttentionStrategy as S
from impl.strategy import NATIVE_LENGTHS, Implementation, resolve_kernel

DIM = 128


def select(q_len: int, **given: Any) -> S:
    return get_flash_attention_strategy(
        **{"q_len": q_len, "has_attention_mask": True, "head_dim": DIM, **given}
    )


@pytest.mark.parametrize(
    ("lnc", "enabled", "q_len", "masked", "expected"),
    [
        (2, None, 1024, True, S.SHARDED_KERNEL),
        (2, None, 1536, True, S.SHARDED_KERNEL),
        (2, None, 1280, True, S.NONE),
        (2, None, 1025, True, S.NONE),
        (2, None, 768, True, S.SHARDED_KERNEL),
        (2, None, 256, True, S.SHARDED_KERNEL),
        (2, None, 255, True, S.NONE),
        (2, None, 100, False, S.SHARDED_KERNEL),
        (2, True, 100, True, S.NONE),
        (1, None, 4095, True, S.NONE),
        (1, None, 4096, True, S.UNSHARDED_KERNEL),
        (1, True, 512, True, S.UNSHARDED_KERNEL),
        (1, True, 511, True, S.NONE),
        (1, None, 512, True, S.NONE),
        (1, None, 512, False, S.NONE),
    ],
)
def test_without_context_parallelism(
    lnc: int, enabled: bool | None, q_len: int, masked: bool, expected: Any
) -> None:
    got = select(
        q_len, logical_nc_config=lnc, attn_kernel_enabled=enabled, has_attention_mask=masked
    )
    assert got is expected


@pytest.mark.parametrize(
    ("lnc", "q_len", "strided", "window", "expected"),
    [
        (2, 512, False, None, S.CONTEXT_PARALLEL_KERNEL),
        (2, 512, False, 64, S.CONTEXT_PARALLEL_KERNEL),
        (2, DIM + 1, False, None, S.CONTEXT_PARALLEL_KERNEL),
        (2, DIM, False, None, S.NONE),
        (1, 512, False, None, S.NONE),
        (2, 512, True, None, S.STRIDED_CONTEXT_PARALLEL_KERNEL),
    ],
)
def test_with_context_parallelism(
    lnc: int, q_len: int, strided: bool, window: int | None, expected: Any
) -> None:
    got = select(
        q_len,
        cp_degree=4,
        logical_nc_config=lnc,
        strided_context_parallel_kernel_enabled=strided,
        sliding_window=window,
    )
    assert got is expected


@pytest.mark.parametrize(("lnc", "q_len", "window"), [(1, 512, None), (2, DIM, None), (2, 512, 64)])
def test_strided_kernel_is_refused_where_it_cannot_run(
    lnc: int, q_len: int, window: int | None
) -> None:
    with pytest.raises(ConfigError, match="strided_context_parallel_kernel_enabled"):
        select(
            q_len,
            cp_degree=4,
            logical_nc_config=lnc,
            strided_context_parallel_kernel_enabled=True,
            sliding_window=window,
        )


@pytest.mark.parametrize("q_len", [256, 512, 4096])
@pytest.mark.parametrize("lnc", [1, 2])
@pytest.mark.parametrize("cp", [1, 4])
def test_disabled_kernels_are_never_selected(q_len: int, lnc: int, cp: int) -> None:
    got = select(q_len, cp_degree=cp, logical_nc_config=lnc, attn_kernel_enabled=False)
    assert got is S.NONE


def test_an_uneven_length_on_two_cores_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="impl.strategy"):
        select(1025, logical_nc_config=2)
    assert "no multiple of 512" in caplog.text


def test_a_layer_says_which_kernel_it_wanted_and_what_computes_it() -> None:
    made = layer(run={"logical_nc_config": 2})
    choice = made.kernel_choice(1024)
    assert (choice.strategy, choice.implementation) == (S.SHARDED_KERNEL, Implementation.SDPA)
    assert "can express it" in choice.reason
    assert made.get_flash_attention_strategy(1024, True) is S.SHARDED_KERNEL


@pytest.mark.parametrize(
    ("dtype", "device_type", "kernel"),
    [
        (torch.float32, "cpu", Implementation.SDPA),
        (torch.bfloat16, "cpu", Implementation.FLASH),
        (torch.float16, "cpu", Implementation.FLASH),
        (torch.bfloat16, "cuda", Implementation.SDPA),
    ],
)
def test_a_kernel_that_sums_gradients_in_16_bits_trains_nothing(
    dtype: torch.dtype, device_type: str, kernel: Implementation
) -> None:
    made = layer(run={"torch_dtype": dtype})
    choice = made.kernel_choice(1024, trains=True, device_type=device_type)
    assert choice.implementation is kernel
    infers = made.kernel_choice(1024, device_type=device_type)
    assert infers.implementation is Implementation.SDPA


def test_kernels_that_are_asked_for_and_not_bound_are_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    layer()
    assert not caplog.records
    layer(run={"attn_kernel_enabled": True, "qkv_kernel_enabled": True})
    assert "['attn_kernel_enabled', 'qkv_kernel_enabled']" in caplog.text


@pytest.mark.parametrize(
    ("strategy", "q_len", "plain", "device", "enabled", "expected"),
    [
        (S.NONE, NATIVE_LENGTHS - 1, True, "cpu", None, Implementation.NATIVE),
        (S.NONE, NATIVE_LENGTHS, True, "cpu", None, Implementation.SDPA),
        (S.NONE, NATIVE_LENGTHS, True, "cuda", None, Implementation.SDPA),
        (S.NONE, NATIVE_LENGTHS, True, "neuron", None, Implementation.FLASH),
        (S.NONE, NATIVE_LENGTHS, False, "cpu", None, Implementation.FLASH),
        (S.NONE, 1 << 20, True, "cpu", False, Implementation.NATIVE),
        (S.SHARDED_KERNEL, 256, True, "cpu", None, Implementation.SDPA),
        (S.SHARDED_KERNEL, 256, False, "cpu", None, Implementation.FLASH),
        (S.UNSHARDED_KERNEL, 512, True, "cpu", True, Implementation.SDPA),
    ],
)
def test_the_first_implementation_that_fits_computes_the_step(
    strategy: S, q_len: int, plain: bool, device: str, enabled: bool | None, expected: Any
) -> None:
    choice = resolve_kernel(
        strategy, q_len=q_len, plain=plain, device_type=device, attn_kernel_enabled=enabled
    )
    assert (choice.strategy, choice.implementation) == (strategy, expected)


@pytest.mark.parametrize(
    ("features", "call", "plain"),
    [
        ({}, {}, True),
        ({"learned_sinks_size": 1}, {}, True),
        ({"learned_sinks_size": 1}, {"trains": True}, False),
        ({"learned_sinks_size": 1}, {"device_type": "cuda"}, True),
        ({"learned_sinks_size": 1, "config": model(head_dim=256)}, {}, True),
        ({"learned_sinks_size": 1, "config": model(head_dim=256)}, {"device_type": "cuda"}, False),
        ({"attn_logit_softcapping": 5.0}, {}, False),
        ({"sliding_window": 4}, {}, False),
        ({"attention_chunk_size": 4}, {}, False),
        ({"run": {"padding_side": "left"}}, {}, False),
        ({}, {"explicit_mask": True}, False),
        ({}, {"prior": True}, False),
    ],
)
def test_pytorchs_attention_gets_only_what_it_can_express(
    features: dict[str, Any], call: dict[str, Any], plain: bool
) -> None:
    choice = layer(**features).kernel_choice(NATIVE_LENGTHS, **call)
    assert choice.implementation is (Implementation.SDPA if plain else Implementation.FLASH)


@pytest.mark.parametrize("trained", ["q", "k", "v"])
def test_a_layer_trains_whichever_of_its_projections_does(
    trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = layer(dtype=torch.bfloat16, rotary_emb=RotaryEmbedding(WIDTH)).requires_grad_(False)
    getattr(made.qkv_proj, f"{trained}_proj").requires_grad_(True)
    asked = []
    choose = type(made).kernel_choice

    def choice(self: Any, *given: Any, **named: Any) -> Any:
        asked.append(named["trains"])
        return choose(self, *given, **named)

    monkeypatch.setattr(type(made), "kernel_choice", choice)
    hidden = tokens(6).to(torch.bfloat16)
    with torch.enable_grad():
        made(hidden, position_ids=positions(6))
    made(hidden, position_ids=positions(6))
    assert asked == [True, False]
