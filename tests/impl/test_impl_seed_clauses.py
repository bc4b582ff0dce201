"""What the summary of NxD Inference's module promises, clause by clause.

Names start with the section of that summary. What it says of routing, tuple access, kernel
selection and process groups is tested in `test_impl_forward`, `test_impl_output`,
`test_impl_strategy` and `parallel`.
"""

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from impl_layers import (
    HEADS,
    HIDDEN,
    KV_HEADS,
    ROUNDOFF,
    WIDTH,
    layer,
    model,
    positions,
    relative_error,
    tokens,
)
from torch import Tensor

from impl import (
    ConfigError,
    LearnedSink,
    NeuronAttentionBase,
    NeuronAttentionBaseOutput,
    RotaryEmbedding,
)
from impl.kernels import native

DOUBLE = torch.float64


def test_1_a_fused_projection_is_one_product_of_q_k_and_v() -> None:
    made = layer(run={"fused_qkv": True}, qkv_bias=True)
    width = (HEADS + 2 * KV_HEADS) * WIDTH
    assert made.qkv_proj.Wqkv.weight.shape == (width, HIDDEN)
    assert made.qkv_proj.Wqkv.bias.shape == (width,)
    assert made.qkv_proj.fused_qkv


def test_1_separate_projections_are_three() -> None:
    made = layer(qkv_bias=True)
    widths = {"q_proj": HEADS * WIDTH, "k_proj": KV_HEADS * WIDTH, "v_proj": KV_HEADS * WIDTH}
    for name, width in widths.items():
        assert getattr(made.qkv_proj, name).weight.shape == (width, HIDDEN)
        assert getattr(made.qkv_proj, name).bias.shape == (width,)


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("o_bias", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_1_biases_are_there_when_asked_for(qkv_bias: bool, o_bias: bool, fused: bool) -> None:
    made = layer(run={"fused_qkv": fused}, qkv_bias=qkv_bias, o_bias=o_bias)
    biases = {name for name, _ in made.named_parameters() if name.endswith("bias")}
    q = {"qkv_proj.Wqkv.bias"} if fused else {f"qkv_proj.{p}_proj.bias" for p in "qkv"}
    assert biases == (q if qkv_bias else set()) | ({"o_proj.o_proj.bias"} if o_bias else set())


@pytest.mark.parametrize("size", [0, 2, 4])
def test_2_only_one_sink_per_head_is_supported(size: int) -> None:
    with pytest.raises(ConfigError, match=f"learned_sinks_size must be 1 or None, got {size}"):
        layer(learned_sinks_size=size)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_2_a_rank_has_the_sinks_of_its_heads(ranks: int) -> None:
    sink = LearnedSink(1, HEADS, DOUBLE, ranks)
    assert torch.equal(sink.get_sink(), torch.zeros(HEADS // ranks, dtype=DOUBLE))
    assert not sink.get_sink().requires_grad


def test_2_no_sinks_are_made_without_a_size() -> None:
    made = layer()
    assert made.learned_sinks is made.tkg_learned_sinks is None
    assert made.get_learned_sinks() is None


def with_a_sink_column(scores: Tensor, sink: Tensor) -> Tensor:
    """Softmax over the scores and a column of sinks, which is dropped afterwards."""
    batch, heads, q_len, _ = scores.shape
    column = sink.view(1, heads, 1, 1).expand(batch, -1, q_len, -1)
    return torch.cat((scores, column), dim=-1).softmax(dim=-1)[..., :-1]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_2_a_sink_is_one_more_score_that_is_dropped_after_the_softmax(phase: str) -> None:
    made = layer(learned_sinks_size=1, rotary_emb=RotaryEmbedding(WIDTH))
    hidden, at = tokens(7), positions(7)
    q, k, v, *_ = made.prep_qkv_tensors(hidden, at)
    group = HEADS // KV_HEADS
    keys, values = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    scores = (q @ keys.transpose(2, 3) / WIDTH**0.5).masked_fill(~causal, float("-inf"))
    weights = with_a_sink_column(scores, made.get_learned_sinks())
    expected = made.o_proj((weights @ values).transpose(1, 2).flatten(2))
    if phase == "prefill":
        got = made(hidden, at >= 0, at).hidden_states
    else:
        got = made(
            hidden[:, 6:], position_ids=at[:, 6:], past_key_value=(k[:, :, :6], v[:, :, :6])
        ).hidden_states
        expected = expected[:, 6:]
    assert relative_error(got, expected) <= ROUNDOFF


def test_3_the_output_has_the_five_documented_fields_in_order() -> None:
    fields = [field.name for field in dataclasses.fields(NeuronAttentionBaseOutput)]
    names = ["hidden_states", "present_key_value", "cos_cache", "sin_cache", "residual"]
    assert fields == names


def test_3_forward_needs_hidden_states_only() -> None:
    parameters = list(inspect.signature(NeuronAttentionBase.forward).parameters.values())[1:]
    assert parameters[0].default is inspect.Parameter.empty
    defaults = {p.name: p.default for p in parameters[1:] if p.kind is not p.VAR_KEYWORD}
    flags = {"get_kv_per_layer": False, "update_kv_per_layer": False}
    flags["windowed_context_encoding_window_idx"] = -1
    assert defaults == {name: flags.get(name) for name in defaults}


def test_3_the_constructor_has_the_documented_defaults() -> None:
    parameters = inspect.signature(NeuronAttentionBase.__init__).parameters
    expected: dict[str, Any] = {
        "head_dim": None,
        "rotary_emb": None,
        "rope_theta": None,
        "use_scaled_rope": False,
        "rms_norm_eps": None,
        "use_qk_norm": False,
        "q_layernorm": None,
        "k_layernorm": None,
        "post_transpose_layernorm": False,
        "clip_qkv": None,
        "qkv_bias": False,
        "o_bias": False,
        "softmax_scale": None,
        "attention_chunk_size": None,
        "is_post_global_attn_layer": False,
        "is_pre_global_attn_layer": False,
        "optimize_interleave_attn": False,
        "sliding_window": None,
        "learned_sinks_size": None,
        "num_cores_per_group": 1,
        "sequence_parallel_enabled": None,
        "tensor_model_parallel_group": None,
        "o_proj_layer_name": "o_proj",
    }
    for name, default in expected.items():
        assert parameters[name].default == default, name
    first = list(parameters)[1:5]
    assert first == ["config", "hidden_size", "num_attention_heads", "num_key_value_heads"]


@pytest.mark.parametrize("fused", [False, True])
def test_4_q_k_and_v_are_the_product_plus_the_bias(fused: bool) -> None:
    made = layer(run={"fused_qkv": fused}, qkv_bias=True)
    hidden = tokens(5)
    if fused:
        whole = hidden @ made.qkv_proj.Wqkv.weight.T + made.qkv_proj.Wqkv.bias
        expected = whole.split(made.qkv_proj.row_counts, dim=-1)
    else:
        parts = (made.qkv_proj.q_proj, made.qkv_proj.k_proj, made.qkv_proj.v_proj)
        expected = tuple(hidden @ part.weight.T + part.bias for part in parts)
    for got, want in zip(made.qkv_proj(hidden), expected, strict=True):
        assert relative_error(got, want) <= ROUNDOFF


@pytest.mark.parametrize("fused", [False, True])
def test_4_biases_are_parameters_and_get_gradients(fused: bool) -> None:
    made = layer(run={"fused_qkv": fused}, qkv_bias=True, o_bias=True)
    made.requires_grad_(True)
    with torch.enable_grad():
        made(tokens(5), positions(5) >= 0).hidden_states.square().sum().backward()
    biases = {name: p for name, p in made.named_parameters() if name.endswith("bias")}
    assert len(biases) == (2 if fused else 4)
    for name, bias in biases.items():
        assert bias.grad is not None, name
        if name != "qkv_proj.k_proj.bias":  # Without RoPE a bias of k moves all scores alike.
            assert float(bias.grad.abs().max()) > 1e-3, name


def test_5_tensors_have_the_documented_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer(learned_sinks_size=1, rotary_emb=RotaryEmbedding(WIDTH))
    hidden, at = tokens(5), positions(5)
    flat = made.qkv_proj(hidden)
    widths = [HEADS * WIDTH, KV_HEADS * WIDTH, KV_HEADS * WIDTH]
    assert [t.shape for t in flat] == [(2, 5, width) for width in widths]
    q, k, v, cos, sin = made.prep_qkv_tensors(hidden, at)
    assert q.shape == (2, HEADS, 5, WIDTH)
    assert k.shape == v.shape == (2, KV_HEADS, 5, WIDTH)
    assert cos is not None
    assert sin is not None
    scores = native.attention_scores(q, k, made.score_rule)
    assert scores.shape == (2, KV_HEADS, HEADS // KV_HEADS, 5, 5)  # Query heads by KV head.
    seen = {}
    original = native.context_encoding

    def watch(*arguments: Any) -> Tensor:
        seen["heads"] = original(*arguments)
        return seen["heads"]

    monkeypatch.setattr(native, "context_encoding", watch)
    output = made(hidden, at >= 0, at)
    assert seen["heads"].shape == (2, HEADS, 5, WIDTH)
    assert output.hidden_states.shape == (2, 5, HIDDEN)
    assert [t.shape for t in output.present_key_value] == [(2, KV_HEADS, 5, WIDTH)] * 2


def test_6_the_quick_reference_of_a_cached_step_works() -> None:
    made = NeuronAttentionBase(model(), HIDDEN, HEADS, KV_HEADS, WIDTH, learned_sinks_size=1)
    cached = made(tokens(4), positions(4) >= 0).present_key_value
    mask = torch.ones(2, 1, 2, 2, dtype=torch.bool).tril()
    output = made(
        tokens(2),
        past_key_value=cached,
        position_ids=positions(2, 4),
        active_mask=mask,
    )
    hidden, kv, *_ = output
    assert hidden.shape == (2, 2, HIDDEN)
    assert kv[0].shape == (2, KV_HEADS, 2, WIDTH)
