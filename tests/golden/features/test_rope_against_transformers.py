"""RoPE variants against the models of transformers, run in true float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from golden import (
    Array,
    DynamicNTKScaling,
    LongRopeScaling,
    ProportionalScaling,
    RopeConfig,
    attention_factor,
    deepseek_yarn_scaling,
    rope_cos_sin,
    rope_frequencies,
    rotate,
    yarn_mscale,
)
from tests.golden.layers import assert_within, gamma, normal
from tests.golden.oracles.transformers_layers import float32_means_float64

pytest.importorskip(
    "transformers", reason="the transformers oracle needs transformers: pip install .[oracles]"
)

HEAD_DIM, ORIGINAL = 16, 64
THETA = 150000.0
ROUNDINGS = 2 * math.log(THETA) + 60
"""Of a frequency, by either side: the exponent's one rounding times log(theta), the growth of a
base and its power, a ramp's ends, and a divisor."""


def config(kind: str, *, max_position_embeddings: int = ORIGINAL, **rope: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=max_position_embeddings,
        rope_parameters={"rope_type": kind, "rope_theta": THETA, **rope},
    )


def theirs(kind: str, seq_len: int | None = None, **settings: Any) -> tuple[Array, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    with float32_means_float64():
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](
            config(kind, **settings), None, seq_len=seq_len
        )
    return frequencies.numpy(), float(factor)


def check(rope: RopeConfig, kind: str, seq_len: int = 0, **settings: Any) -> None:
    want, factor = theirs(kind, seq_len or None, **settings)
    assert want.dtype == np.float64
    got = rope_frequencies(rope, HEAD_DIM, seq_len=seq_len)
    assert_within(got, want, 2 * gamma(ROUNDINGS) * want)
    assert abs(attention_factor(rope) - factor) <= gamma(8) * factor


@pytest.mark.parametrize("seq_len", [1, ORIGINAL, ORIGINAL + 1, 1000, 100_000])
def test_r6_dynamic_ntk_agrees(seq_len: int) -> None:
    scaling = DynamicNTKScaling(factor=4.0, original_max_position_embeddings=ORIGINAL)
    check(RopeConfig(theta=THETA, scaling=scaling), "dynamic", seq_len, factor=4.0)


@pytest.mark.parametrize("seq_len", [1, ORIGINAL, ORIGINAL + 1, 1000])
@pytest.mark.parametrize("attention", [None, 1.25])
def test_r7_longrope_agrees(seq_len: int, attention: float | None) -> None:
    short = [1.0 + 0.01 * i for i in range(8)]
    long = [1.0 + i * i for i in range(8)]
    scaling = LongRopeScaling(
        short_factor=tuple(short),
        long_factor=tuple(long),
        factor=32.0,
        original_max_position_embeddings=ORIGINAL,
        attention_factor=attention or 0.0,
    )
    settings: dict[str, Any] = {
        "short_factor": short,
        "long_factor": long,
        "factor": 32.0,
        "original_max_position_embeddings": ORIGINAL,
        "max_position_embeddings": 32 * ORIGINAL,
    }
    if attention is not None:
        settings["attention_factor"] = attention
    check(RopeConfig(theta=THETA, scaling=scaling), "longrope", seq_len, **settings)


@pytest.mark.parametrize("proportion", [0.1, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_r8_proportional_agrees(proportion: float, factor: float) -> None:
    scaling = ProportionalScaling(proportion=proportion, factor=factor)
    check(
        RopeConfig(theta=THETA, scaling=scaling),
        "proportional",
        partial_rotary_factor=proportion,
        factor=factor,
    )


DEEPSEEK = {
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}


@pytest.mark.parametrize(("mscale", "all_dim"), [(1.0, 1.0), (0.707, 1.0), (1.0, 0.5)])
def test_r9_deepseek_yarn_agrees(mscale: float, all_dim: float) -> None:
    scaling = deepseek_yarn_scaling(**DEEPSEEK, mscale=mscale, mscale_all_dim=all_dim)  # type: ignore[arg-type]
    check(
        RopeConfig(theta=THETA, scaling=scaling),
        "yarn",
        **DEEPSEEK,
        mscale=mscale,
        mscale_all_dim=all_dim,
        max_position_embeddings=163840,
    )


@pytest.mark.parametrize("all_dim", [0.5, 1.0])
def test_r9_deepseek_scales_the_scores_by_the_square_of_mscale(all_dim: float) -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

    parameters = {"rope_type": "yarn", "factor": 40.0, "mscale_all_dim": all_dim}
    want = yarn_apply_mscale(parameters, 192**-0.5)
    got = 192**-0.5 * yarn_mscale(40.0, all_dim) ** 2
    assert abs(got - want) <= gamma(8) * want


def test_r9_deepseek_s_interleaved_rotation_agrees() -> None:
    import torch
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
        apply_rotary_pos_emb_interleave,
    )

    x = normal(1, 2, 3, 5, HEAD_DIM)
    rope = RopeConfig(theta=THETA, pairing="interleaved")
    cos, sin = rope_cos_sin(rope, HEAD_DIM, np.tile(np.arange(90, 95), (2, 1)))
    twice = [torch.from_numpy(np.concatenate([a, a], axis=-1)) for a in (cos, sin)]
    tensor = torch.from_numpy(x)
    want, _ = apply_rotary_pos_emb_interleave(tensor, tensor, *twice)
    got = rotate(x, cos, sin, pairing="interleaved")
    split = np.concatenate([got[..., 0::2], got[..., 1::2]], axis=-1)  # theirs ends half by half
    size = np.abs(x).max() * np.ones_like(split)
    assert_within(split, want.numpy(), gamma(6) * 2 * size)


# Multimodal RoPE


def rotary_module(family: str, prefix: str, section: list[int]) -> Any:
    import importlib

    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    settings = config("default")
    settings.rope_parameters["mrope_section"] = section
    with float32_means_float64():
        return getattr(module, f"{prefix}RotaryEmbedding")(settings)


GRID = np.stack(
    [
        np.array([[0, 0, 0, 0, 5, 9000], [7, 7, 8, 8, 8, 2]]),
        np.array([[0, 0, 1, 1, 5, 9000], [7, 8, 7, 8, 9, 31]]),
        np.array([[0, 1, 0, 1, 5, 9000], [9, 7, 7, 9, 8, 77]]),
    ]
)

MROPE = {
    "qwen2_vl": ("Qwen2VL", RopeConfig(theta=THETA, mrope_section=(2, 3, 3))),
    "qwen3_vl": (
        "Qwen3VLText",
        RopeConfig(theta=THETA, mrope_section=(4, 2, 2), mrope_interleaved=True),
    ),
}


def check_mrope(family: str, rope: RopeConfig) -> None:
    import torch

    prefix, right = MROPE[family]
    module = rotary_module(family, prefix, list(right.mrope_section))
    with float32_means_float64():
        cos, sin = module(torch.zeros(1, dtype=torch.float64), torch.from_numpy(GRID))
    got = rope_cos_sin(rope, HEAD_DIM, GRID)
    # an angle of p * f errs by the frequency's roundings and one more, cos and sin by that angle
    fastest = rope_frequencies(RopeConfig(theta=THETA), HEAD_DIM)
    angle = GRID.max(axis=0)[..., None] * fastest
    bound = np.where(fastest == 1.0, 0.0, 2 * gamma(ROUNDINGS) * angle) + gamma(4)
    for ours, their in zip(got, (cos.numpy(), sin.numpy()), strict=True):
        assert their.dtype == np.float64
        assert_within(ours, their[..., : HEAD_DIM // 2], bound)
        assert_within(ours, their[..., HEAD_DIM // 2 :], bound)


@pytest.mark.parametrize("family", MROPE)
def test_r10_and_r11_multimodal_rope_agrees(family: str) -> None:
    check_mrope(family, MROPE[family][1])


# The comparisons reject what lies nearby


@pytest.mark.parametrize("family", MROPE)
@pytest.mark.parametrize(
    "changes",
    [{"mrope_section": (3, 3, 2)}, {"theta": THETA * 1.001}, {"mrope_interleaved": None}],
    ids=["sections", "theta", "layout"],
)
def test_the_comparison_rejects_another_multimodal_rope(
    family: str, changes: dict[str, Any]
) -> None:
    right = MROPE[family][1]
    if "mrope_interleaved" in changes:
        changes = {"mrope_interleaved": not right.mrope_interleaved}
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_mrope(family, replace(right, **changes))


def test_the_comparison_rejects_transformers_with_its_float32_steps() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](
        config("dynamic", factor=4.0), None, seq_len=999
    )
    scaling = DynamicNTKScaling(factor=4.0, original_max_position_embeddings=ORIGINAL)
    got = rope_frequencies(RopeConfig(theta=THETA, scaling=scaling), HEAD_DIM, seq_len=999)
    with pytest.raises(AssertionError, match="exceeds bound"):
        assert_within(got, frequencies.double().numpy(), 2 * gamma(ROUNDINGS) * got)


@pytest.mark.parametrize("change", [{"factor": 4.01}, {"original_max_position_embeddings": 63}])
def test_the_comparison_rejects_another_dynamic_scaling(change: dict[str, Any]) -> None:
    right = DynamicNTKScaling(factor=4.0, original_max_position_embeddings=ORIGINAL)
    rope = RopeConfig(theta=THETA, scaling=replace(right, **change))
    with pytest.raises(AssertionError, match="exceeds bound"):
        check(rope, "dynamic", 1000, factor=4.0)
