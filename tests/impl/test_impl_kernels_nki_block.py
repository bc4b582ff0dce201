"""What nki-library's `attention_block_tkg` is called with, and when. No kernel runs here.

`BlockStandin` stands in for the kernel: see there what that pins, and what it cannot. Where numbers
are compared to round-off the layer is in float64, which the kernel does not serve: the limit on
dtypes is lifted there, and tested by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partialmethod
from typing import Any

import pytest
import torch
from block_tkg_standin import BlockStandin
from impl_layers import ROUNDOFF, relative_error
from nki_packages import install_packages
from torch import Tensor

from impl.attention_block import AttentionBlock
from impl.kernels import nki, nki_block_limits
from impl.kernels.native import ScoreRule
from impl.kernels.nki_block import attention_block_tkg
from impl.kernels.token_generation_block import (
    BlockRule,
    BlockWeights,
    RMSWeight,
    token_generation_block,
)

HIDDEN, HEADS, WIDTH, SLOTS, BATCH = 128, 3, 64, 128, 2
BF16 = torch.bfloat16
BLOCK = {"attn_block_tkg_nki_kernel_enabled": True}

Install = Callable[..., BlockStandin]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put stand-ins of the packages, and of the kernel, where imports look."""

    def put(device: bool = False, dtypes: bool = True) -> BlockStandin:
        kernel = BlockStandin()
        install_packages(monkeypatch, "attention_block_tkg", kernel, device=device)
        if dtypes:
            served = (*nki_block_limits.DTYPES, torch.float64)
            monkeypatch.setattr(nki_block_limits, "DTYPES", served)
        return kernel

    nki._operator.cache_clear()
    yield put
    nki._operator.cache_clear()
    torch.compiler.reset()


@pytest.fixture
def on_neuron(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let layers choose as they do on neuron; tensors stay where they are."""
    choose = partialmethod(AttentionBlock.decode_kernel_choice, device_type="neuron")

    def choice(self: Any, *shape: int, device_type: str, **given: Any) -> Any:
        return choose.__get__(self)(*shape, **given)

    monkeypatch.setattr(AttentionBlock, "decode_kernel_choice", choice)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def step(
    q_len: int = 1,
    *,
    width: int = WIDTH,
    batch: int = BATCH,
    heads: int = HEADS,
    dtype: torch.dtype = torch.float64,
    rule: dict[str, Any] | None = None,
    weights: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Arguments of a decode step by both forms."""
    made = BlockWeights(
        **{
            "qkv": drawn((heads + 2) * width, HIDDEN, dtype=dtype) / 8,
            "output": drawn(HIDDEN, heads * width, dtype=dtype) / 8,
            **(weights or {}),
        }
    )
    kept = BlockRule(
        **{
            "num_key_value_heads": 1,
            "head_dim": width,
            "score": ScoreRule(divisor=5.0),
            **(rule or {}),
        }
    )
    held = torch.tensor([90, 40]).repeat(batch // 2 + 1)[:batch, None]
    prior = (torch.arange(SLOTS) < held)[:, None, None, :]
    cache = drawn(batch, 1, SLOTS, width, dtype=dtype)
    return {
        "hidden_states": drawn(batch, q_len, HIDDEN, dtype=dtype),
        "weights": made,
        "rule": kept,
        "cos": None,
        "sin": None,
        "k_cache": cache.transpose(2, 3).contiguous() if kept.k_cache_transposed else cache,
        "v_cache": drawn(batch, 1, SLOTS, width, seed=1, dtype=dtype),
        "prior_mask": prior,
        "active_mask": torch.ones(1, 1, q_len, q_len).tril().bool(),
    }


def angles(q_len: int, width: int, interleaved: bool) -> dict[str, Tensor]:
    half = drawn(BATCH, q_len, width // 2, seed=7)
    whole = half if interleaved else torch.cat([half, half], dim=-1)
    return {"cos": whole.cos(), "sin": whole.sin()}


def norm(width: int, seed: int, offset: float = 0.0) -> RMSWeight:
    return RMSWeight(weight=drawn(width, seed=seed), eps=1e-3, offset=offset)


CASES: dict[str, dict[str, Any]] = {
    "bare": {},
    "biases": {"weights": {"qkv_bias": drawn(5 * WIDTH), "output_bias": drawn(HIDDEN)}},
    "sinks": {"weights": {"sink": 2 * drawn(HEADS)}},
    "norm of the input": {"weights": {"input_norm": norm(HIDDEN, 1)}},
    "norm of the input, one added": {"weights": {"input_norm": norm(HIDDEN, 1, offset=1.0)}},
    "keys as columns": {"rule": {"k_cache_transposed": True}},
    "norms before": {
        "width": 128,
        "weights": {"q_norm": norm(128, 2), "k_norm": norm(128, 3, offset=1.0)},
    },
    "norms after": {
        "width": 128,
        "rule": {"norm_after_rope": True},
        "weights": {"q_norm": norm(128, 2), "k_norm": norm(128, 3)},
    },
    "one query head": {"heads": 1},
}


@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("turns", ["no", "half", "interleaved"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_documented_formula_of_the_arguments_is_the_torch_form(
    install: Install, case: dict[str, Any], turns: str, q_len: int
) -> None:
    kernel = install()
    rule = {**case.get("rule", {}), "interleaved": turns == "interleaved"}
    given = step(q_len, **{**case, "rule": rule})
    if turns != "no":
        given |= angles(q_len, given["rule"].head_dim, turns == "interleaved")
    before = {name: x.clone() for name, x in given.items() if isinstance(x, Tensor)}
    got, want = attention_block_tkg(**given), token_generation_block(**given)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < ROUNDOFF
    assert all(torch.equal(given[name], value) for name, value in before.items())
    (call,) = kernel.calls
    assert (call["update_cache"], call["kv_cache_update_idx"]) == (False, None)
    assert call["softmax_scale"] == 1 / 5.0
    assert call["rope_contiguous_layout"] == (turns != "interleaved")
