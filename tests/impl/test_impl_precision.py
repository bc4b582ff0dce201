"""The table of roundings in `impl.kernels.native` is what the layer does.

Each test computes in float64 and rounds where the table says so. The layer's float32 differs from
that by about 2^-24 of a value, so after rounding to 2^-8 (bfloat16) or 2^-11 (float16) all but
about one element in a thousand must be the same bits.
"""

from typing import Any

import pytest
import torch
from impl_layers import layer, positions, tokens
from torch import nn

from impl import RMSNorm, RotaryEmbedding
from impl.kernels import native

LOW = [torch.bfloat16, torch.float16]
RULE = native.ScoreRule(divisor=4.0)
FEW = 0.01


def qkv(dtype: torch.dtype, seq_len: int = 48, width: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = ((2, 4, seq_len, width), (2, 2, seq_len, width), (2, 2, seq_len, width))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def causal(seq_len: int) -> torch.Tensor:
    return torch.ones(1, 1, seq_len, seq_len).tril().bool()


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype).double()


def by_the_table(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    dtype: torch.dtype,
    *,
    score_dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Attention in float64, weights rounded to the model dtype, the output once."""
    q, k, v = (t.double() for t in (q, k, v))
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    scores = q @ k.transpose(2, 3) / RULE.divisor
    if score_dtype is not None:
        scores = rounded(scores, score_dtype)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return (rounded(weights, weight_dtype or dtype) @ v).to(dtype)


def share_of_differences(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got != expected).double().mean())


@pytest.mark.parametrize("dtype", LOW)
def test_prefill_rounds_weights_and_output_only(dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype)
    got = native.context_encoding(q, k, v, causal(48), None, RULE)
    assert share_of_differences(got, by_the_table(q, k, v, causal(48), dtype)) < FEW


@pytest.mark.parametrize("dtype", LOW)
def test_decode_rounds_weights_and_the_sum_of_both_parts_only(dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype)
    prior = torch.ones(1, 1, 1, 47, dtype=torch.bool)
    got = native.token_generation(
        q[:, :, -1:],
        k[:, :, -1:],
        v[:, :, -1:],
        k[:, :, :-1],
        v[:, :, :-1],
        prior,
        None,
        None,
        RULE,
    )
    expected = by_the_table(q, k, v, causal(48), dtype)[:, :, -1:]
    assert share_of_differences(got, expected) < FEW


@pytest.mark.parametrize(
    "wrong", [{"score_dtype": torch.bfloat16}, {"weight_dtype": torch.float64}]
)
def test_the_comparison_would_see_another_table(wrong: dict[str, Any]) -> None:
    q, k, v = qkv(torch.bfloat16)
    got = native.context_encoding(q, k, v, causal(48), None, RULE)
    other = by_the_table(q, k, v, causal(48), torch.bfloat16, **wrong)
    assert share_of_differences(got, other) > 10 * FEW


@pytest.mark.parametrize("dtype", LOW)
def test_projection_norm_and_rope_round_once_each(dtype: torch.dtype) -> None:
    norms = {f"{n}_layernorm": RMSNorm(8, dtype=dtype) for n in "qk"}
    made = layer(dtype, rotary_emb=RotaryEmbedding(8), qkv_bias=True, **norms)
    hidden, at = tokens(32, dtype=dtype), positions(32, 1000)
    q, _, v, cos, sin = made.prep_qkv_tensors(hidden, at)

    def project(linear: nn.Linear, heads: int) -> torch.Tensor:
        wide = hidden.double() @ linear.weight.double().T + linear.bias.double()
        return rounded(wide, dtype).unflatten(-1, (heads, 8)).transpose(1, 2)

    flat = project(made.qkv_proj.q_proj, 6)
    mean_square = flat.square().mean(-1, keepdim=True)
    normed = flat / (mean_square + 1e-6).sqrt() * made.q_layernorm.weight.double()
    x, c, s = rounded(normed, dtype), cos.double()[:, None], sin.double()[:, None]
    turned = x * c + torch.cat((-x[..., 4:], x[..., :4]), -1) * s
    # One value in 48 projected ones that rounds otherwise moves its whole head: 8 elements.
    assert share_of_differences(q, turned.to(dtype)) < 8 * FEW
    assert share_of_differences(v, project(made.qkv_proj.v_proj, 2).to(dtype)) < FEW


@pytest.mark.parametrize("dtype", LOW)
def test_output_projection_rounds_once(dtype: torch.dtype) -> None:
    made = layer(dtype, o_bias=True)
    heads = tokens(64, dtype=dtype)
    linear = made.o_proj.o_proj
    expected = heads.double() @ linear.weight.double().T + linear.bias.double()
    assert share_of_differences(made.o_proj(heads), expected.to(dtype)) < FEW


def test_float64_layers_use_no_lower_precision() -> None:
    made = layer(rotary_emb=RotaryEmbedding(8), sliding_window=20, learned_sinks_size=1)
    low = layer(torch.float32, rotary_emb=RotaryEmbedding(8), sliding_window=20,
                learned_sinks_size=1)  # fmt: skip
    at = positions(30, 90000)
    assert made(tokens(30), position_ids=at).cos_cache.dtype is torch.float64
    exact = torch.cos(at[0, 7].double() * 0.1)
    assert float((made.rotary_emb(tokens(30), at)[0][0, 7, 1] - exact).abs()) < 90000 * 2**-52
    assert float((low.rotary_emb(tokens(30).float(), at)[0][0, 7, 1] - exact).abs()) > 1e-6
