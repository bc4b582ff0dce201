"""Each feature of the layer against the plain definition, and decode against prefill."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from impl_layers import (
    HEADS,
    KV_HEADS,
    ROUNDOFF,
    WIDTH,
    attend_plainly,
    layer,
    positions,
    relative_error,
    tokens,
)

from impl import (
    L2Norm,
    QKNormPlacement,
    QKNormScope,
    RMSNorm,
    RotaryEmbedding,
    apply_rotary_pos_emb,
)

DOUBLE = torch.float64


def rotary() -> RotaryEmbedding:
    return RotaryEmbedding(WIDTH)


def merged(heads: torch.Tensor) -> torch.Tensor:
    return heads.transpose(1, 2).flatten(2)


def causal(_b: int, i: int, j: int) -> bool:
    return j <= i


FEATURES = {
    "nope": ({}, {}),
    "rope": ({"rotary_emb": rotary()}, {}),
    "partial rope": (
        {"rotary_emb": RotaryEmbedding(WIDTH, rope_parameters={"partial_rotary_factor": 0.5})},
        {},
    ),
    "polar": ({"rope_theta": 5e5}, {"use_polar_compatible_rope": True}),
    "window": ({"rotary_emb": rotary(), "sliding_window": 5}, {}),
    "window 1": ({"sliding_window": 1}, {}),
    "window and polar": (
        {"rope_theta": 5e5, "sliding_window": 5},
        {"use_polar_compatible_rope": True},
    ),
    "chunk": ({"rotary_emb": rotary(), "attention_chunk_size": 4}, {}),
    "chunk and polar": (
        {"rope_theta": 5e5, "attention_chunk_size": 4},
        {"use_polar_compatible_rope": True},
    ),
    "chunk beyond seq_len": ({"rotary_emb": rotary(), "attention_chunk_size": 32}, {}),
    "sink": ({"rotary_emb": rotary(), "learned_sinks_size": 1}, {}),
    "sink and window": (
        {"rotary_emb": rotary(), "learned_sinks_size": 1, "sliding_window": 3},
        {},
    ),
    "softcap": ({"rotary_emb": rotary(), "attn_logit_softcapping": 1.5}, {}),
    "scale": ({"rotary_emb": rotary(), "softmax_scale": 1.7}, {}),
    "bias and clip": ({"qkv_bias": True, "o_bias": True, "clip_qkv": 1.0}, {}),
    "temperature": ({"attn_temperature_tuning": True, "floor_scale": 3, "attn_scale": 0.7}, {}),
    "head norm": (
        {
            "rotary_emb": rotary(),
            "q_layernorm": RMSNorm(WIDTH, dtype=DOUBLE),
            "k_layernorm": RMSNorm(WIDTH, dtype=DOUBLE),
        },
        {},
    ),
    "flat norm": (
        {
            "q_layernorm": RMSNorm(WIDTH * HEADS, dtype=DOUBLE),
            "k_layernorm": RMSNorm(WIDTH * KV_HEADS, dtype=DOUBLE),
            "qk_layernorm_scope": QKNormScope.PROJECTION,
        },
        {},
    ),
    "l2 norm after rope": (
        {
            "rotary_emb": rotary(),
            "use_qk_norm": True,
            "rms_norm_eps": 1e-5,
            "qk_norm_placement": QKNormPlacement.POST_ROPE,
        },
        {},
    ),
}


@pytest.mark.parametrize(("features", "call"), FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("start", [0, 6])
def test_a_decode_step_gives_the_row_that_prefill_gives(
    features: dict[str, Any], call: dict[str, Any], start: int
) -> None:
    seq_len, slots = 11, 24
    made = layer(run={"fused_qkv": True}, **features)
    hidden, at = tokens(seq_len), positions(seq_len, start)
    everything = torch.ones(2, seq_len, dtype=torch.bool)
    whole = made(hidden, everything, at, **call)
    k, v = whole.present_key_value
    for step in (1, 4, seq_len - 1):
        caches = [torch.randn(2, KV_HEADS, slots, WIDTH, dtype=DOUBLE) for _ in range(2)]
        held = torch.zeros(2, slots, dtype=torch.bool)
        held[:, start : start + step] = True
        for cache, new in zip(caches, (k, v), strict=True):
            cache[:, :, start : start + step] = new[:, :, :step]
        got = made(
            hidden[:, step : step + 1],
            held,
            at[:, step : step + 1],
            tuple(caches),
            **call,
        )
        expected = whole.hidden_states[:, step : step + 1]
        assert relative_error(got.hidden_states, expected) <= ROUNDOFF
        for new, row in zip(got.present_key_value, (k, v), strict=True):
            assert relative_error(new, row[:, :, step : step + 1]) <= ROUNDOFF


@pytest.mark.parametrize(
    ("features", "sees"),
    [
        ({}, causal),
        ({"sliding_window": 3}, lambda _b, i, j: j <= i and i - j < 3),
        ({"attention_chunk_size": 4}, lambda _b, i, j: j <= i and (i + 6) // 4 == (j + 6) // 4),
        ({"learned_sinks_size": 1}, causal),
        ({"attn_logit_softcapping": 0.8}, causal),
        ({"softmax_scale": 0.9}, causal),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_prefill_is_attention_as_defined(
    features: dict[str, Any], sees: Callable[[int, int, int], bool], fused: bool
) -> None:
    seq_len, start = 10, 6
    made = layer(run={"fused_qkv": fused}, rotary_emb=rotary(), qkv_bias=True, **features)
    hidden, at = tokens(seq_len), positions(seq_len, start)
    got = made(hidden, torch.ones(2, seq_len, dtype=torch.bool), at)
    q, k, v, *_ = made.prep_qkv_tensors(hidden, at)
    heads = attend_plainly(
        q,
        k,
        v,
        sees,
        divisor=features.get("softmax_scale", math.sqrt(WIDTH)),
        sink=made.get_learned_sinks(),
        softcap=features.get("attn_logit_softcapping"),
    )
    assert relative_error(got.hidden_states, made.o_proj(merged(heads))) <= ROUNDOFF


def test_query_head_reads_the_kv_head_of_its_group() -> None:
    made = layer()
    made.qkv_proj.k_proj.weight.zero_()  # Uniform weights: each head returns the mean of its v.
    seq_len = 4
    hidden = tokens(seq_len)
    _, _, v, *_ = made.prep_qkv_tensors(hidden, positions(seq_len))
    heads = made.perform_prefill(*made.prep_qkv_tensors(hidden, positions(seq_len))[:3], None,
                                 positions(seq_len))  # fmt: skip
    for h in range(HEADS):
        expected = v[:, h // (HEADS // KV_HEADS)].mean(dim=1, keepdim=True)
        assert relative_error(heads[:, h], expected.expand(2, seq_len, WIDTH)) <= ROUNDOFF


def test_a_sink_takes_exactly_its_share() -> None:
    made = layer(learned_sinks_size=1)
    made.qkv_proj.k_proj.weight.zero_()
    sink = made.learned_sinks.sink
    v = torch.ones(2, KV_HEADS, 5, WIDTH, dtype=DOUBLE)
    q, k, *_ = made.prep_qkv_tensors(tokens(5), positions(5))
    got = made.perform_prefill(q, k, v, None, positions(5))
    expected = 5 / (5 + sink.exp())
    assert relative_error(got, expected.view(1, HEADS, 1, 1).expand(got.shape)) <= ROUNDOFF


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sink_far_above_the_scores_takes_everything(dtype: torch.dtype) -> None:
    made = layer(dtype, learned_sinks_size=1)
    made.learned_sinks.sink.fill_(500.0)  # exp(500) is not a float32.
    got = made(tokens(4)).hidden_states
    assert torch.equal(got, torch.zeros_like(got))


@pytest.mark.parametrize("features", [{}, {"learned_sinks_size": 1}])
def test_a_row_that_sees_no_key_is_zero(features: dict[str, Any]) -> None:
    made = layer(sliding_window=4, **features)
    at = torch.tensor([[0, 1, 2, -1], [-1, -1, 0, 1]])
    got = made(tokens(4), position_ids=at).hidden_states
    empty = at < 0
    assert torch.equal(got[empty], torch.zeros_like(got[empty]))
    assert got[~empty].abs().min() > 0


def test_full_mask_of_false_gives_zeros_not_nan() -> None:
    got = layer()(tokens(4), torch.zeros(2, 1, 4, 4, dtype=torch.bool)).hidden_states
    assert torch.equal(got, torch.zeros_like(got))


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("window", [None, 3])
def test_what_unused_cache_slots_hold_does_not_matter(garbage: float, window: int | None) -> None:
    made = layer(sliding_window=window, rotary_emb=rotary())
    hidden, at = tokens(1), positions(1, 5)
    k, v = torch.zeros(2, KV_HEADS, 12, WIDTH, dtype=DOUBLE).normal_(), None
    v = k.roll(1, -1)
    clean = made(hidden, position_ids=at, past_key_value=(k, v)).hidden_states
    k[:, :, 5:], v[:, :, 5:] = garbage, garbage
    if window:
        k[:, :, :2], v[:, :, :2] = garbage, garbage
    assert torch.equal(made(hidden, position_ids=at, past_key_value=(k, v)).hidden_states, clean)


def test_padding_tokens_do_not_matter() -> None:
    made = layer(rotary_emb=rotary(), learned_sinks_size=1)
    keep = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    hidden = tokens(5)
    got = made(hidden, keep).hidden_states
    hidden[0, 3:] = float("nan")
    assert torch.equal(made(hidden, keep).hidden_states[keep], got[keep])
    alone = made(hidden[:1, :3], keep[:1, :3]).hidden_states
    assert relative_error(got[:1, :3], alone) <= ROUNDOFF


def test_batch_rows_do_not_see_each_other() -> None:
    made = layer(rotary_emb=rotary(), sliding_window=4)
    hidden = tokens(6)
    got = made(hidden).hidden_states
    hidden[1] = tokens(6, seed=9)[1]
    assert torch.equal(made(hidden).hidden_states[0], got[0])


def test_no_mask_on_a_full_layer_attends_in_both_directions() -> None:
    made = layer()
    hidden = tokens(4)
    q, k, v, *_ = made.prep_qkv_tensors(hidden, positions(4))
    heads = attend_plainly(q, k, v, lambda *_: True, divisor=math.sqrt(WIDTH))
    assert relative_error(made(hidden).hidden_states, made.o_proj(merged(heads))) <= ROUNDOFF


def test_a_chunk_not_below_seq_len_still_limits_by_position(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = layer(attention_chunk_size=32)
    assert made.attention_chunk_size is None
    assert "not below seq_len" in caplog.text
    limited = layer(run={"seq_len": 64}, attention_chunk_size=32)
    hidden, at = tokens(6), positions(6, 29)
    assert torch.equal(
        made(hidden, position_ids=at).hidden_states, limited(hidden, position_ids=at).hidden_states
    )


def test_several_tokens_decode_under_one_softmax() -> None:
    made = layer(rotary_emb=rotary(), sliding_window=5, learned_sinks_size=1)
    hidden, at = tokens(10), positions(10)
    whole = made(hidden).hidden_states
    k, v = made(hidden).present_key_value
    tril = torch.ones(2, 1, 3, 3).tril().bool()
    got = made(
        hidden[:, 7:],
        position_ids=at[:, 7:],
        past_key_value=(k[:, :, :7], v[:, :, :7]),
        active_mask=tril,
    )
    assert relative_error(got.hidden_states, whole[:, 7:]) <= ROUNDOFF


def test_transposed_keys_decode_alike() -> None:
    plain, columns = layer(rotary_emb=rotary()), layer(
        run={"k_cache_transposed": True}, rotary_emb=rotary()
    )  # fmt: skip
    k = torch.zeros(2, KV_HEADS, 12, WIDTH, dtype=DOUBLE).normal_()
    arguments = {"hidden_states": tokens(1), "position_ids": positions(1, 9)}
    expected = plain(past_key_value=(k, k.flip(-1)), **arguments).hidden_states
    got = columns(past_key_value=(k.transpose(2, 3), k.flip(-1)), **arguments).hidden_states
    assert relative_error(got, expected) <= ROUNDOFF
    assert not layer(run={"k_cache_transposed": True}, sliding_window=4).k_cache_transposed


def test_values_are_neither_normed_nor_rotated_and_keys_are_cached_after_both() -> None:
    norm = RMSNorm(WIDTH, dtype=DOUBLE)
    made = layer(rotary_emb=rotary(), q_layernorm=norm, k_layernorm=norm)
    hidden, at = tokens(5), positions(5, 3)
    k, v = made(hidden, position_ids=at).present_key_value
    flat_k = made.qkv_proj.k_proj(hidden).unflatten(-1, (KV_HEADS, WIDTH)).transpose(1, 2)
    flat_v = made.qkv_proj.v_proj(hidden).unflatten(-1, (KV_HEADS, WIDTH)).transpose(1, 2)
    normed = made.k_layernorm(flat_k)
    assert torch.equal(v, flat_v)
    assert torch.equal(k, apply_rotary_pos_emb(normed, normed, *made.rotary_emb(k, at))[1])


def test_norms_before_the_split_see_the_flat_projection() -> None:
    made = layer(use_qk_norm=True, rms_norm_eps=1e-5)
    hidden = tokens(4)
    q, k, *_ = made.prep_qkv_tensors(hidden, positions(4))
    assert torch.equal(merged(q), L2Norm(1e-5)(made.qkv_proj.q_proj(hidden)))
    assert torch.equal(merged(k), L2Norm(1e-5)(made.qkv_proj.k_proj(hidden)))


def test_weighted_norms_may_follow_the_rotation() -> None:
    norms = [RMSNorm(WIDTH, dtype=DOUBLE) for _ in range(2)]
    made = layer(
        rotary_emb=rotary(),
        q_layernorm=norms[0],
        k_layernorm=norms[1],
        qk_layernorm_placement=QKNormPlacement.POST_ROPE,
    )
    plain = layer(rotary_emb=rotary())
    plain.load_state_dict({n: p for n, p in made.state_dict().items() if "layernorm" not in n})
    hidden, at = tokens(4), positions(4)
    q, k, *_ = plain.prep_qkv_tensors(hidden, at)
    got_q, got_k, *_ = made.prep_qkv_tensors(hidden, at)
    assert torch.equal(got_q, norms[0](q))
    assert torch.equal(got_k, norms[1](k))


def test_norm_after_the_transpose_is_the_same_function() -> None:
    hidden, at = tokens(4), positions(4)
    results = [
        layer(
            q_layernorm=RMSNorm(WIDTH, dtype=DOUBLE),
            k_layernorm=RMSNorm(WIDTH, dtype=DOUBLE),
            post_transpose_layernorm=after,
        )(hidden, position_ids=at).hidden_states
        for after in (False, True)
    ]
    assert torch.equal(*results)


def test_the_configured_layernorm_is_used_where_a_layer_brings_none() -> None:
    made = layer(run={"qk_layernorm": True})
    assert isinstance(made.q_layernorm, torch.nn.LayerNorm)
    q, *_ = made.prep_qkv_tensors(tokens(3), positions(3))
    flat = made.qkv_proj.q_proj(tokens(3)).unflatten(-1, (HEADS, WIDTH))
    assert torch.equal(q, made.q_layernorm(flat).transpose(1, 2))


def test_clipping_follows_the_bias() -> None:
    made = layer(qkv_bias=True, clip_qkv=0.5)
    q, k, v, *_ = made.prep_qkv_tensors(tokens(4), positions(4))
    assert {float(t.abs().max()) for t in (q, k, v)} == {0.5}


def test_temperature_grows_with_the_position() -> None:
    made = layer(attn_temperature_tuning=True, floor_scale=4, attn_scale=0.1)
    plain = layer()
    at = torch.tensor([[0, 2, 3, 6], [7, 11, 100, -1]])
    hidden = tokens(4)
    q, k, *_ = plain.prep_qkv_tensors(hidden, at)
    got_q, got_k, *_ = made.prep_qkv_tensors(hidden, at)
    factors = torch.tensor(
        [
            [math.log(max(p, 0) // 4 + (max(p, 0) % 4 == 3) + 1) * 0.1 + 1 for p in row]
            for row in at
        ],
        dtype=DOUBLE,
    )
    assert relative_error(got_q, q * factors[:, None, :, None]) <= ROUNDOFF
    assert torch.equal(got_k, k)


@pytest.mark.parametrize("fused", [False, True])
def test_fused_and_separate_projections_agree(fused: bool) -> None:
    separate = layer(qkv_bias=True, rotary_emb=rotary())
    other = layer(run={"fused_qkv": fused}, qkv_bias=True, rotary_emb=rotary(), seed=5)
    other.load_state_dict(separate.state_dict())
    hidden = tokens(5)
    expected = separate(hidden).hidden_states
    assert relative_error(other(hidden).hidden_states, expected) <= ROUNDOFF


@pytest.mark.parametrize("sinks", [None, 1])
def test_gradients_are_those_of_the_function_even_with_empty_rows(sinks: int | None) -> None:
    made = layer(sliding_window=3, learned_sinks_size=sinks, attn_logit_softcapping=2.0)
    at = torch.tensor([[0, 1, 2, 3, -1]])
    q, k, v, *_ = made.prep_qkv_tensors(tokens(5, batch=1), at)
    cached = tuple(t.roll(1, -1) for t in (k, v))
    leaves = [t.contiguous().requires_grad_() for t in (q, k, v)]

    def prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return made.perform_prefill(q, k, v, None, at)

    def decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        one = slice(3, 4)
        return made.compute_for_token_gen(
            q[:, :, one], k[:, :, one], v[:, :, one], at[:, one], cached, None, None
        )

    with torch.enable_grad():
        for function in (prefill, decode):
            assert torch.autograd.gradcheck(function, leaves)
