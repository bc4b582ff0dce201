"""The module's interface: routing, arguments, caches, and what it refuses."""

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

from impl import (
    AttentionError,
    ConfigError,
    KVCacheManager,
    NeuronAttentionBase,
    QKNormPlacement,
    QKNormScope,
    RMSNorm,
    RotaryEmbedding,
    ShapeError,
)

ROUTES = (
    "chunked_attention_forward",
    "chunked_attention_with_context_parallel_forward",
    "windowed_attention_forward",
    "standard_causal_attention_forward",
)


def rotary() -> RotaryEmbedding:
    return RotaryEmbedding(WIDTH)


def past(slots: int = 8, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(2, KV_HEADS, slots, WIDTH, dtype=dtype).normal_() for _ in range(2))


@pytest.mark.parametrize(
    ("features", "cp_degree", "route"),
    [
        ({"attention_chunk_size": 4}, 1, ROUTES[0]),
        ({"attention_chunk_size": 4}, 2, ROUTES[1]),
        ({"sliding_window": 4}, 1, ROUTES[2]),
        ({}, 1, ROUTES[3]),
        ({"attention_chunk_size": 32}, 1, ROUTES[3]),
    ],
)
def test_forward_routes_by_chunk_then_window(
    features: dict[str, Any], cp_degree: int, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = layer(**features)
    made.cp_degree = cp_degree
    taken = []
    for name in ROUTES:
        monkeypatch.setattr(made, name, lambda _, name=name: taken.append(name))
    made(tokens(3))
    assert taken == [route]


def test_forward_takes_the_documented_arguments_in_order() -> None:
    names = list(inspect.signature(NeuronAttentionBase.forward).parameters)
    assert names == [
        "self",
        "hidden_states",
        "attention_mask",
        "position_ids",
        "past_key_value",
        "active_mask",
        "adapter_ids",
        "cos_cache",
        "sin_cache",
        "rmsnorm",
        "rotary_position_ids",
        "kv_mgr",
        "get_kv_per_layer",
        "update_kv_per_layer",
        "residual",
        "windowed_context_encoding_window_idx",
        "kwargs",
    ]


def test_the_quick_reference_example_works() -> None:
    made = NeuronAttentionBase(model(), HIDDEN, HEADS, KV_HEADS, learned_sinks_size=1)
    output = made(tokens(4), None, positions(4))
    attn_out, kv, cos_cache, sin_cache = output
    assert attn_out is output[0] is output.hidden_states
    assert kv is output[1] is output.present_key_value
    assert attn_out.shape == (2, 4, HIDDEN)
    assert kv[0].shape == kv[1].shape == (2, KV_HEADS, 4, WIDTH)
    assert cos_cache is None
    assert sin_cache is None


def test_head_dim_defaults_to_the_hidden_size_shared_by_heads() -> None:
    assert NeuronAttentionBase(model(), HIDDEN, HEADS, KV_HEADS).head_dim == HIDDEN // HEADS


def test_residual_is_returned_unchanged() -> None:
    residual = tokens(4, seed=3)
    output = layer()(tokens(4), residual=residual)
    assert output.residual is residual
    assert torch.equal(output.hidden_states, layer()(tokens(4)).hidden_states)


FUSED = {"qkv_kernel_enabled": True}


def input_norm(width: int = HIDDEN) -> RMSNorm:
    norm = RMSNorm(width, dtype=torch.float64)
    norm.weight.copy_(torch.linspace(-1.0, 2.0, width))
    return norm


@pytest.mark.parametrize("features", [{}, {"sliding_window": 3}, {"attention_chunk_size": 4}])
def test_the_qkv_kernel_adds_the_residual_and_then_norms_the_sum(features: dict[str, Any]) -> None:
    fused, plain = layer(run=FUSED, **features), layer(**features)
    norm, residual = input_norm(), tokens(4, seed=3)
    stream = tokens(4) + residual
    got = fused(tokens(4), residual=residual, rmsnorm=norm)
    assert torch.equal(got.residual, stream)
    assert torch.equal(got.hidden_states, plain(norm(stream)).hidden_states)
    without = fused(tokens(4), rmsnorm=norm)
    assert without.residual is None
    assert torch.equal(without.hidden_states, plain(norm(tokens(4))).hidden_states)
    added = fused(tokens(4), residual=residual)
    assert torch.equal(added.hidden_states, plain(stream).hidden_states)


def test_a_decode_step_fuses_the_same() -> None:
    fused, plain = layer(run=FUSED), layer()
    call = {"position_ids": positions(1, 3), "past_key_value": past()}
    norm, residual = input_norm(), tokens(1, seed=3)
    got = fused(tokens(1), residual=residual, rmsnorm=norm, **call)
    expected = plain(norm(tokens(1) + residual), **call)
    assert torch.equal(got.hidden_states, expected.hidden_states)


def test_the_native_path_leaves_norm_and_residual_to_the_caller() -> None:
    residual = tokens(4, seed=3)
    got = layer()(tokens(4), residual=residual, rmsnorm=input_norm())
    assert got.residual is residual
    assert torch.equal(got.hidden_states, layer()(tokens(4)).hidden_states)


def test_the_residual_stream_keeps_the_callers_dtype() -> None:
    made = layer(torch.bfloat16, run=FUSED)
    residual = tokens(4, dtype=torch.float32, seed=3)
    got = made(tokens(4, dtype=torch.float32), residual=residual)
    assert torch.equal(got.residual, tokens(4, dtype=torch.float32) + residual)


@pytest.mark.parametrize("fused", [False, True])
def test_an_eagle3_draft_reads_twice_the_width_it_writes(fused: bool) -> None:
    draft = {"is_eagle3": True, "is_eagle_draft": True, "fused_qkv": fused}
    made = layer(run=draft, rotary_emb=rotary(), qkv_bias=True)
    wide = torch.cat((tokens(5), tokens(5, seed=4)), dim=-1)
    output = made(wide)
    assert output.hidden_states.shape == (2, 5, HIDDEN)
    # What a layer of the plain width computes from either half adds up before the bias.
    plain = layer(rotary_emb=rotary(), qkv_bias=True)
    q, *_ = made.prep_qkv_tensors(wide, positions(5))
    state = made.state_dict()
    halves = []
    for half in range(2):
        for name, parameter in plain.named_parameters():
            if name.startswith("qkv_proj"):
                part, kind = name.split(".")[1:]
                rows = state.get(name)
                if fused:
                    spans = dict(zip(("q_proj", "k_proj", "v_proj"),
                                 state[f"qkv_proj.Wqkv.{kind}"].split(made.qkv_proj.row_counts),
                                 strict=True))  # fmt: skip
                    rows = spans[part]
                columns = slice(half * HIDDEN, (half + 1) * HIDDEN)
                parameter.copy_(rows[:, columns] if kind == "weight" else rows * half)
        halves.append(plain.prep_qkv_tensors(wide.chunk(2, dim=-1)[half], positions(5))[0])
    assert relative_error(halves[0] + halves[1], q) <= ROUNDOFF
    with pytest.raises(ShapeError, match=f"seq_len, {2 * HIDDEN}"):
        made(tokens(5))
    for alone in ({"is_eagle3": True}, {"is_eagle_draft": True}):
        assert layer(run=alone).input_size == HIDDEN


@pytest.mark.parametrize("polar", [False, True])
def test_rotary_caches_are_returned_and_reused(polar: bool) -> None:
    made = layer(rotary_emb=rotary(), rope_theta=5e5)
    call = {"use_polar_compatible_rope": polar, "position_ids": positions(4, 3)}
    first = made(tokens(4), **call)
    width = WIDTH // 2 if polar else WIDTH
    assert first.cos_cache.shape == first.sin_cache.shape == (2, 4, width)
    again = made(tokens(4), cos_cache=first.cos_cache, sin_cache=first.sin_cache, **call)
    assert again.cos_cache is first.cos_cache
    assert torch.equal(again.hidden_states, first.hidden_states)
    ones = torch.ones_like(first.cos_cache)
    still = made(tokens(4), cos_cache=ones, sin_cache=0 * ones, **call)
    assert torch.equal(still.hidden_states, layer()(tokens(4)).hidden_states)


def test_a_layer_without_rope_passes_the_caches_on() -> None:
    cos = torch.ones(2, 4, WIDTH, dtype=torch.float64)
    output = layer()(tokens(4), cos_cache=cos, sin_cache=cos)
    assert output.cos_cache is output.sin_cache is cos


def test_rotary_positions_replace_positions_for_rope_only() -> None:
    made = layer(rotary_emb=rotary(), sliding_window=3)
    spread, at = 5 * positions(5), positions(5)
    got = made(tokens(5), position_ids=at, rotary_position_ids=spread)
    unlimited = layer(rotary_emb=rotary())
    mask = made.options.sliding_window
    allowed = (at[:, :, None] >= at[:, None]) & (at[:, :, None] - at[:, None] < mask)
    expected = unlimited(tokens(5), allowed[:, None], spread)
    assert torch.equal(got.hidden_states, expected.hidden_states)


def test_polar_wins_over_the_rotary_embedding() -> None:
    both = layer(rotary_emb=rotary(), rope_theta=5e5)
    polar = layer(rope_theta=5e5)
    got = [m(tokens(4), use_polar_compatible_rope=True).hidden_states for m in (both, polar)]
    assert torch.equal(*got)
    assert not torch.equal(got[0], both(tokens(4)).hidden_states)


def test_polar_rope_takes_its_scaling_from_the_configuration() -> None:
    parameters = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.5,
        "original_max_position_embeddings": 64,
    }
    made = layer(config=model(rope_parameters=parameters), rope_theta=5e5, use_scaled_rope=True)
    expected = RotaryEmbedding(WIDTH, rope_parameters={**parameters, "rope_theta": 5e5})
    assert torch.equal(made.polar_rotary_emb.inv_freq, expected.inv_freq)


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 4},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        {"rope_type": "proportional", "partial_rotary_factor": 0.5},
        {"rope_type": "default", "mrope_section": [2, 1, 1]},
    ],
)
@pytest.mark.parametrize(
    "features", [{}, {"sliding_window": 3}, {"attention_chunk_size": 4}], ids=str
)
def test_polar_rope_is_half_rope_with_its_channels_reordered(
    parameters: dict[str, Any], features: dict[str, Any]
) -> None:
    config = model(rope_parameters=parameters)
    polar = layer(config=config, rope_theta=1e4, use_scaled_rope=True, **features)
    half = layer(rotary_emb=RotaryEmbedding(WIDTH, rope_parameters=parameters), **features)
    rotary_dim = polar.polar_rotary_emb.rotary_dim
    order = torch.arange(WIDTH)
    order[:rotary_dim] = (
        torch.arange(rotary_dim).view(2, -1).T.flatten()
    )  # 2i from i, 2i+1 from i+r/2
    for name in ("q_proj", "k_proj"):
        weight = getattr(half.qkv_proj, name).weight
        rows = weight.unflatten(0, (-1, WIDTH))
        getattr(polar.qkv_proj, name).weight.copy_(rows[:, order].flatten(0, 1))
    at = positions(9, 3)
    expected = half(tokens(9), position_ids=at).hidden_states
    got = polar(tokens(9), position_ids=at, use_polar_compatible_rope=True).hidden_states
    assert relative_error(got, expected) <= ROUNDOFF


def test_polar_rope_without_scaling_keeps_the_share_that_turns() -> None:
    scaled = {"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.5}
    made = layer(config=model(rope_parameters=scaled), rope_theta=1e4)
    assert made.polar_rotary_emb.frequencies.inv_freq == (1.0, 0.01)
    share = {"rope_type": "proportional", "factor": 4.0, "partial_rotary_factor": 0.5}
    made = layer(config=model(rope_parameters=share), rope_theta=1e4)
    assert made.polar_rotary_emb.frequencies.inv_freq == (1.0, 0.1, 0.0, 0.0)


def test_rotary_positions_may_have_several_axes() -> None:
    parameters = {"mrope_section": [2, 1, 1]}
    made = layer(rotary_emb=RotaryEmbedding(WIDTH, rope_parameters=parameters), sliding_window=3)
    axes = torch.stack([positions(5), 2 * positions(5), positions(5) + 7])
    call = {"position_ids": positions(5), "rotary_position_ids": axes}
    output = made(tokens(5), **call)
    cos, sin = made.rotary_emb(tokens(5), axes)
    again = made(tokens(5), positions(5) >= 0, positions(5), cos_cache=cos, sin_cache=sin)
    assert torch.equal(output.hidden_states, again.hidden_states)
    assert not torch.equal(output.hidden_states, made(tokens(5)).hidden_states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [{}, {"sliding_window": 3}, {"attention_chunk_size": 4}])
def test_every_path_casts_the_input_and_returns_its_dtype(
    dtype: torch.dtype, features: dict[str, Any]
) -> None:
    made = layer(dtype, rotary_emb=rotary(), **features)
    output = made(tokens(5))
    assert output.hidden_states.dtype is torch.float64
    assert output.present_key_value[0].dtype is output.cos_cache.dtype is dtype


def test_attention_dtype_overrides_the_models() -> None:
    made = layer(torch.bfloat16, run={"attention_dtype": torch.float32})
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    assert made(tokens(3, dtype=torch.bfloat16)).hidden_states.dtype is torch.bfloat16


def test_sinks_start_at_zero_and_do_not_train() -> None:
    made = NeuronAttentionBase(model(), HIDDEN, HEADS, KV_HEADS, learned_sinks_size=1)
    assert torch.equal(made.learned_sinks.get_sink(), torch.zeros(HEADS, dtype=torch.float64))
    assert not made.learned_sinks.sink.requires_grad
    assert made.tkg_learned_sinks is None


@pytest.mark.parametrize(
    ("cp", "dp", "prefill", "own"),
    [
        (2, 1, True, False),
        (2, 1, False, True),
        (2, 1, None, False),
        (1, 1, False, False),
        (2, 2, False, False),
    ],
)
def test_decode_has_its_own_sinks_only_where_the_phases_shard_unlike(
    cp: int, dp: int, prefill: bool | None, own: bool
) -> None:
    made = layer(learned_sinks_size=1)
    made.tkg_learned_sinks = layer(learned_sinks_size=1).learned_sinks
    made.cp_degree, made.dp_degree = cp, dp
    expected = made.tkg_learned_sinks if own else made.learned_sinks
    assert made.get_learned_sinks(prefill) is expected.sink
    assert layer().get_learned_sinks(prefill) is None


@pytest.mark.parametrize(
    ("run", "features", "error", "words"),
    [
        ({}, {"learned_sinks_size": 2}, ConfigError, "learned_sinks_size must be 1 or None, got 2"),
        (
            {},
            {"learned_sinks_size": 1, "attention_chunk_size": 4},
            ConfigError,
            "learned sinks are not supported for chunked attention",
        ),
        ({}, {"q_layernorm": RMSNorm(WIDTH)}, ConfigError, "got q_layernorm alone"),
        ({}, {"k_layernorm": RMSNorm(WIDTH)}, ConfigError, "got k_layernorm alone"),
        ({}, {"sliding_window": 4, "attention_chunk_size": 4}, ConfigError, "windowed or chunked"),
        ({}, {"sliding_window": 0}, ConfigError, "sliding_window must be positive"),
        ({}, {"softmax_scale": -1.0}, ConfigError, "softmax_scale"),
        ({}, {"attn_logit_softcapping": 0.0}, ConfigError, "attn_logit_softcapping"),
        ({}, {"clip_qkv": -1.0}, ConfigError, "clip_qkv"),
        ({}, {"use_qk_norm": True}, ConfigError, "rms_norm_eps"),
        ({}, {"use_scaled_rope": True, "rope_theta": 1e4}, ConfigError, "use_scaled_rope"),
        (
            {},
            {"attn_temperature_tuning": True, "rotary_emb": rotary()},
            ConfigError,
            "layers without RoPE",
        ),
        (
            {},
            {
                "qk_layernorm_scope": QKNormScope.PROJECTION,
                "qk_layernorm_placement": QKNormPlacement.POST_ROPE,
            },
            ConfigError,
            "qk_layernorm_placement",
        ),
        (
            {"qkv_cte_nki_kernel_fuse_rope": True},
            {"use_qk_norm": True, "rms_norm_eps": 1e-6},
            ConfigError,
            "qkv_cte_nki_kernel_fuse_rope",
        ),
        ({"padding_side": "left"}, {"attention_chunk_size": 4}, ConfigError, "padding_side"),
        ({"tp_degree": 2}, {}, ConfigError, "number of ranks .* got 2 and none started"),
        (
            {"is_prefix_caching": True},
            {"attention_chunk_size": 4},
            ConfigError,
            "is_prefix_caching",
        ),
        ({"lora_config": {"rank": 4}}, {}, ConfigError, "LoraServingConfig or None, got dict"),
        ({}, {"num_cores_per_group": 2}, ConfigError, "flash_decoding_enabled must be True"),
        (
            {"flash_decoding_enabled": True},
            {"num_cores_per_group": 2},
            ConfigError,
            "num_cores_per_group must be tp_degree / num_key_value_heads",
        ),
        (
            {"flash_decoding_enabled": True, "tp_degree": 4},
            {"num_cores_per_group": 2, "sliding_window": 4},
            ConfigError,
            "sliding_window must be None when num_cores_per_group is 2",
        ),
        (
            {"flash_decoding_enabled": True, "tp_degree": 4, "cp_degree": 2},
            {"num_cores_per_group": 2},
            ConfigError,
            "cp_degree and attention_dp_degree must be 1",
        ),
    ],
)
def test_construction_refuses(
    run: dict[str, Any], features: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        layer(run=run, **features)


@pytest.mark.parametrize(
    ("features", "call", "error", "words"),
    [
        ({}, {"adapter_ids": torch.zeros(2)}, ShapeError, "adapter_ids must be None"),
        ({}, {"residual": torch.zeros(2, 4, HIDDEN)}, ShapeError, "residual must have the shape"),
        (
            {},
            {"windowed_context_encoding_window_idx": 0},
            AttentionError,
            "be negative without windowed_context_encoding_size",
        ),
        ({}, {"sinks": torch.zeros(2)}, AttentionError, r"got \['sinks'\]"),
        ({}, {"hidden_states": torch.zeros(2, 3, 7)}, ShapeError, r"got \(2, 3, 7\)"),
        ({}, {"position_ids": torch.zeros(2, 4, dtype=torch.int64)}, ShapeError, r"\(2, 3\)"),
        ({}, {"position_ids": torch.zeros(2, 3)}, ShapeError, "position_ids must be integer"),
        ({}, {"cos_cache": torch.zeros(2, 3, 8)}, ShapeError, "given together"),
        (
            {"rotary_emb": rotary()},
            {"cos_cache": torch.zeros(2, 3, 4), "sin_cache": torch.zeros(2, 3, 4)},
            ShapeError,
            "another RoPE",
        ),
        ({}, {"use_polar_compatible_rope": True}, ConfigError, "rope_theta"),
        (
            {"rope_theta": 1e4, "attn_temperature_tuning": True},
            {"use_polar_compatible_rope": True},
            ConfigError,
            "attn_temperature_tuning",
        ),
        ({}, {"past_key_value": past()}, ShapeError, "position_ids must be given with cached keys"),
        (
            {},
            {"past_key_value": past(), "position_ids": positions(3, 4)},
            ShapeError,
            "active_mask must be given for a decode step of 3 tokens",
        ),
        (
            {},
            {"active_mask": torch.ones(2, 1, 3, 3, dtype=torch.bool)},
            ShapeError,
            "active_mask must be None without cached keys",
        ),
        (
            {"attention_chunk_size": 4},
            {"past_key_value": past(), "position_ids": positions(3, 4)},
            NotImplementedError,
            "hold one token",
        ),
        (
            {},
            {
                "past_key_value": tuple(t.transpose(1, 2) for t in past()),
                "position_ids": positions(3, 4),
                "active_mask": torch.ones(2, 1, 3, 3, dtype=torch.bool),
            },
            ShapeError,
            "is it BHSD",
        ),
        (
            {},
            {
                "past_key_value": past(dtype=torch.float32),
                "position_ids": positions(3, 4),
                "active_mask": torch.ones(2, 1, 3, 3, dtype=torch.bool),
            },
            ShapeError,
            "must be torch.float64, got torch.float32",
        ),
        (
            {},
            {
                "past_key_value": past(slots=0),
                "position_ids": positions(3, 0),
                "active_mask": torch.ones(2, 1, 3, 3, dtype=torch.bool),
            },
            ShapeError,
            r"have shape \(2, 2, 1, 8\), got \(2, 2, 0, 8\)",
        ),
        ({}, {"get_kv_per_layer": True}, ShapeError, "kv_mgr and idx must be given"),
        ({}, {"update_kv_per_layer": True}, ShapeError, "kv_mgr and idx must be given"),
    ],
)
def test_forward_refuses(
    features: dict[str, Any], call: dict[str, Any], error: type[Exception], words: str
) -> None:
    made = layer(**features)
    with pytest.raises(error, match=words):
        made(**{"hidden_states": tokens(3), **call})


def test_every_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="got 2"):
        layer(learned_sinks_size=2)
    with pytest.raises(ValueError, match="torchrun"):
        layer(run={"tp_degree": 2})


def test_layer_reads_and_writes_its_own_cache() -> None:
    made, manager = layer(rotary_emb=rotary()), KVCacheManager(model())
    hidden, at = tokens(6), positions(6)
    whole = made(hidden, torch.ones(2, 6, dtype=torch.bool), at).hidden_states
    first = made(
        hidden[:, :4],
        torch.ones(2, 4, dtype=torch.bool),
        at[:, :4],
        kv_mgr=manager,
        update_kv_per_layer=True,
        idx=0,
    )
    manager.store(0, first.present_key_value)
    for t in (4, 5):
        step = made(
            hidden[:, t : t + 1],
            position_ids=at[:, t : t + 1],
            kv_mgr=manager,
            get_kv_per_layer=True,
            update_kv_per_layer=True,
            idx=0,
            seq_len=8,
        )
        manager.store(0, step.present_key_value)
        assert relative_error(step.hidden_states, whole[:, t : t + 1]) <= ROUNDOFF
