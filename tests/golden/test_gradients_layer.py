from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import golden.gradients.heads
import golden.gradients.layer
from conformance.certify.layer_formula import LayerCase, layer
from conformance.certify.layer_gradient_formula import layer_gradients
from conformance.certify.tracked import Tracked, gamma
from golden import (
    Array,
    AttentionConfig,
    AttentionWeights,
    ConfigError,
    QKNorm,
    RopeConfig,
    ShapeError,
    TemperatureTuning,
    context_encoding,
    empty_cache,
    filled_cache,
    fuse_qkv,
    make_weights,
    token_generation,
    weight_shapes,
)
from golden.gradients import LayerGradients, context_encoding_vjp, token_generation_vjp
from golden.gradients.steps import Summed, projection_vjp
from tests.golden import torch_layers
from tests.golden.layers import (
    EVERYTHING,
    LAYERS,
    assert_within,
    identical,
    normal,
    sampled,
    small_integers,
)
from tests.golden.test_gradients_attention import TORCH, named, on_grid


def layer_case(config: AttentionConfig, seed: int, *, decode: bool) -> LayerCase:
    """Two rows of five tokens, the last of the second padded; or two tokens over a cache."""
    shapes = weight_shapes(config)
    weights = {
        name: normal(seed + index, *shapes[name], size=1.0 if len(shapes[name]) == 1 else 0.4)
        for index, name in enumerate(sorted(shapes))
    }
    if not decode:
        positions = np.tile(np.arange(3, 8), (2, 1))
        positions[1, -1] = -1
        hidden = normal(seed + 50, 2, 5, config.hidden_size)
        return LayerCase(config=config, weights=weights, hidden_states=hidden, positions=positions)
    lengths = np.array([3, 4])
    shape = (2, config.num_key_value_heads, 7, config.head_dim)
    return LayerCase(
        config=config,
        weights=weights,
        hidden_states=normal(seed + 50, 2, 2, config.hidden_size),
        positions=lengths[:, None] + np.arange(2),
        k_cache=normal(seed + 51, *shape),
        v_cache=normal(seed + 52, *shape),
        lengths=lengths,
    )


def vjp(case: LayerCase, d_output: Array, **d_cache: Array) -> LayerGradients:
    weights = make_weights(case.config, **case.weights)
    if case.lengths is None:
        return context_encoding_vjp(
            case.config, weights, case.hidden_states, d_output, position_ids=case.positions
        )
    cache = filled_cache(case.config, case.k_cache, case.v_cache, case.lengths)
    return token_generation_vjp(
        case.config,
        weights,
        case.hidden_states,
        d_output,
        position_ids=case.positions,
        cache=cache,
        **d_cache,
    )


def found(gradients: LayerGradients, name: str) -> Array:
    holder = gradients if hasattr(gradients, name) else gradients.weights
    array: Array = getattr(holder, name)
    return array


def cotangents(case: LayerCase) -> tuple[Array, dict[str, Array]]:
    d_output = normal(90, *case.hidden_states.shape)
    if case.k_cache is None:
        return d_output, {}
    return d_output, {
        "d_cache_k": normal(91, *case.k_cache.shape),
        "d_cache_v": normal(92, *case.k_cache.shape),
    }


def gradient_formulas(case: LayerCase, *, levelled: bool = True) -> dict[str, Tracked]:
    d_output, d_cache = cotangents(case)
    forward = layer(case, "float64")
    return layer_gradients(case, forward, d_output, **d_cache, levelled=levelled)


def autograd(case: LayerCase) -> dict[str, Array]:
    leaves = {name: torch_layers.leaf(array) for name, array in case.weights.items()}
    hidden = torch_layers.leaf(case.hidden_states)
    visible = torch.from_numpy(np.array(layer(case, "float64").visible))
    positions = torch.from_numpy(case.positions)
    d_output, d_cache = cotangents(case)
    if case.k_cache is None or case.v_cache is None:
        output, _, _ = torch_layers.layer(case.config, leaves, hidden, positions, visible)
        output.backward(torch.from_numpy(d_output))
        return {name: torch_layers.gradient(x) for name, x in leaves.items()} | {
            "hidden_states": torch_layers.gradient(hidden)
        }
    caches = torch_layers.leaf(case.k_cache), torch_layers.leaf(case.v_cache)
    output, k, v = torch_layers.layer(case.config, leaves, hidden, positions, visible, caches)
    torch.autograd.backward(
        [output, k, v],
        [torch.from_numpy(d) for d in (d_output, d_cache["d_cache_k"], d_cache["d_cache_v"])],
    )
    return {name: torch_layers.gradient(x) for name, x in leaves.items()} | {
        "hidden_states": torch_layers.gradient(hidden),
        "cache_k": torch_layers.gradient(caches[0]),
        "cache_v": torch_layers.gradient(caches[1]),
    }


def check_against_autograd(case: LayerCase) -> None:
    d_output, d_cache = cotangents(case)
    got, want = vjp(case, d_output, **d_cache), autograd(case)
    formulas, plain = gradient_formulas(case), gradient_formulas(case, levelled=False)
    assert formulas.keys() == want.keys()
    for name, expected in want.items():
        limit = formulas[name].error + TORCH * plain[name].error
        try:
            assert_within(found(got, name), expected, limit)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@st.composite
def configs(draw: st.DrawFn) -> AttentionConfig:
    rope = draw(
        st.sampled_from(
            [
                None,
                RopeConfig(),
                RopeConfig(pairing="interleaved"),
                RopeConfig(rotary_dim=2, theta=100.0),
            ]
        )
    )
    kind = draw(st.sampled_from(["rms", "layer"]))
    weighted = draw(st.booleans())
    offset = 1.0 if weighted and draw(st.booleans()) else 0.0
    norms = [
        QKNorm(kind=kind, scope=scope, placement=placement, weighted=weighted, weight_offset=offset)
        for scope, placement in (
            ("head", "pre_rope"),
            ("head", "post_rope"),
            ("projection", "pre_rope"),
        )
    ]
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2)]))
    span = draw(st.sampled_from([{}, {"sliding_window": 3}, {"attention_chunk_size": 4}]))
    return AttentionConfig(
        hidden_size=6,
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=4,
        qkv_bias=draw(st.booleans()),
        o_bias=draw(st.booleans()),
        clip_qkv=draw(st.sampled_from([None, 0.9])),
        qk_norm=draw(st.sampled_from([None, *norms])),
        rope=rope,
        softmax_scale=draw(st.sampled_from([0.0, 0.9])),
        softcap=draw(st.sampled_from([None, 1.3])),
        learned_sinks_size=draw(st.sampled_from([None, 1])),
        temperature_tuning=draw(
            st.sampled_from([None, TemperatureTuning(floor_scale=2.0, attn_scale=0.5)])
        ),
        **span,
    )


@sampled
@given(config=configs(), seed=st.integers(0, 2**16), decode=st.booleans())
def test_gradients_of_any_layer_are_those_of_autograd(
    config: AttentionConfig, seed: int, decode: bool
) -> None:
    check_against_autograd(layer_case(config, seed, decode=decode))


def rms_only(norm: Any, weight: Any, unit: Array, scale: Array, d: Array, *_: Any) -> Any:
    g = d if weight is None else d * (norm.weight_offset + weight)
    d_x = scale * (g - unit * (g * unit).mean(axis=-1, keepdims=True))
    return d_x, (d * unit).sum(axis=(0, 1, 2)), d.sum(axis=(0, 1, 2))


def scale_is_a_constant(
    norm: Any, weight: Any, unit: Array, scale: Array, d: Array, *_: Any
) -> Any:
    g = d if weight is None else d * (norm.weight_offset + weight)
    d_x = scale * (g - g.mean(axis=-1, keepdims=True))
    return d_x, (d * unit).sum(axis=(0, 1, 2)), d.sum(axis=(0, 1, 2))


def turned_forward(d: Array, cos: Array, sin: Array, *, pairing: str, **_: Any) -> Array:
    return golden.rotate(d, cos, sin, pairing=pairing)


def clip_ignored(x: Array, bound: float, d: Array) -> Array:
    return d


def no_temperature(tuning: Any, positions: Any) -> Array:
    return np.ones(positions.shape)


def first_batch_row_only(x: Array, weight: Array, d: Array) -> tuple[Summed, Summed]:
    (d_x, of_x), (_, of_weight) = projection_vjp(x, weight, d)
    return (d_x, of_x), (d[0].T @ x[0], of_weight)


def all_to_the_cache(after: Any, positions: Any, d_after: Array) -> tuple[Array, Array]:
    shape = (*d_after.shape[:2], positions.shape[1], d_after.shape[3])
    return np.zeros(shape), d_after


@pytest.mark.parametrize(
    ("name", "defect"),
    [
        ("heads.norm_vjp", rms_only),
        ("heads.norm_vjp", scale_is_a_constant),
        ("heads.rotate_vjp", turned_forward),
        ("heads.clip_vjp", clip_ignored),
        ("heads.temperature_factor", no_temperature),
        ("heads.projection_vjp", first_batch_row_only),
        ("layer.part_written", all_to_the_cache),
    ],
    ids=named,
)
def test_the_comparison_with_autograd_sees_a_defect(
    name: str, defect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = layer_case(EVERYTHING, 0, decode=True)
    check_against_autograd(case)
    monkeypatch.setattr(f"golden.gradients.{name}", defect)
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_against_autograd(case)


# Central differences


def changed(case: LayerCase, name: str, by: Array) -> LayerCase:
    if name in case.weights:
        return replace(case, weights={**case.weights, name: case.weights[name] + by})
    field = {"cache_k": "k_cache", "cache_v": "v_cache"}.get(name, name)
    return replace(case, **{field: getattr(case, field) + by})


def gridded(case: LayerCase) -> LayerCase:
    arrays = {
        name: on_grid(getattr(case, name))
        for name in ("hidden_states", "k_cache", "v_cache")
        if getattr(case, name) is not None
    }
    weights = {name: on_grid(array) for name, array in case.weights.items()}
    return replace(case, weights=weights, **arrays)


def weighted_output(case: LayerCase) -> float:
    """Return the scalar whose gradient the vector-Jacobian product is."""
    d_output, d_cache = cotangents(case)
    weights = make_weights(case.config, **case.weights)
    if case.lengths is None:
        result = context_encoding(
            case.config, weights, case.hidden_states, position_ids=case.positions
        )
        return float((d_output * result.output).sum())
    cache = filled_cache(case.config, case.k_cache, case.v_cache, case.lengths)
    result = token_generation(
        case.config, weights, case.hidden_states, position_ids=case.positions, cache=cache
    )
    caches = (d_cache["d_cache_k"] * result.cache.k).sum()
    return float(
        (d_output * result.output).sum() + caches + (d_cache["d_cache_v"] * result.cache.v).sum()
    )


def roundoff_of(case: LayerCase) -> float:
    """Bound the roundoff of `weighted_output`."""
    d_output, d_cache = cotangents(case)
    exact = layer(case, "float64")
    parts = [(d_output, exact.output)]
    if d_cache:
        parts += [(d_cache["d_cache_k"], exact.k), (d_cache["d_cache_v"], exact.v)]
    terms = sum(d.size for d, _ in parts)
    return sum(float((np.abs(d) * (one.error + gamma(terms) * one.size)).sum()) for d, one in parts)


def step_within_clip(case: LayerCase) -> float:
    """Return a power of 2 so small that no entry changed by it crosses the clip's bound.

    A step of `h` in every entry of one array changes a projection by at most `h` times the sum of
    what it is multiplied with: a row of weights, a token, or 1 for a bias.
    """
    if case.config.clip_qkv is None:
        return 1.0
    stages = layer(case, "float64").stages
    distance = min(
        float(np.abs(stages[f"{name}_flat"].size - case.config.clip_qkv).min()) for name in "qkv"
    )
    rows = [np.abs(case.weights[f"{name}_proj"]).sum(axis=1).max() for name in "qkv"]
    reach = max(1.0, np.abs(case.hidden_states).sum(axis=-1).max(), *rows)
    return float(2.0 ** np.floor(np.log2(distance / (2.0 * reach))))


@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
@pytest.mark.parametrize("name", [*LAYERS, "everything"])
def test_gradients_are_central_differences(name: str, decode: bool) -> None:
    """The error model of the attention's test, with steps too short to reach the clip's kink."""
    config = EVERYTHING if name == "everything" else LAYERS[name]
    case = gridded(layer_case(config, 5, decode=decode))
    d_output, d_cache = cotangents(case)
    got = vjp(case, d_output, **d_cache)
    roundoff = 2.0 * roundoff_of(case)
    h = min(2.0 ** np.round(np.log2(roundoff) / 5.0), step_within_clip(case))
    for argument in gradient_formulas(case):
        gradient = found(got, argument)
        direction = small_integers(6, *gradient.shape, largest=1)

        def difference(
            step: float, argument: str = argument, direction: Array = direction
        ) -> float:
            above, below = (
                weighted_output(changed(case, argument, sign * step * direction))
                for sign in (1.0, -1.0)
            )
            return (above - below) / (2.0 * step)

        d1, d2, d4 = difference(h), difference(h / 2), difference(h / 4)
        coarse, fine = (4 * d2 - d1) / 3, (4 * d4 - d2) / 3
        product = float((gradient * direction).sum())
        limit = abs(coarse - fine) + 6.0 * roundoff / h
        assert abs(product - fine) <= limit, f"{argument}: {product}, {fine}, limit {limit}"
        assert limit <= 1e-4 * (1.0 + np.abs(gradient).sum()), "the differences say too little"


# Rules


def test_g6_the_clips_gradient_passes_up_to_and_at_the_bound_and_stops_beyond() -> None:
    x = np.array([-2.0, -1.5, -1.0, 0.0, 1.5, np.nextafter(1.5, 2.0)])
    got = golden.gradients.steps.clip_vjp(x, 1.5, np.arange(1.0, 7.0))
    assert got.tolist() == [0.0, 2.0, 3.0, 4.0, 5.0, 0.0]
    leaf = torch_layers.leaf(x)
    torch.clamp(leaf, -1.5, 1.5).backward(torch.arange(1.0, 7.0, dtype=torch.float64))
    assert identical(got, torch_layers.gradient(leaf))


@pytest.mark.parametrize("junk", [np.nan, np.inf, 1e300])
@pytest.mark.parametrize("name", ["gqa-bias-rms", "window-sinks", "layer-norm-projection"])
def test_g11_padding_may_hold_anything_and_its_cotangent_reaches_only_the_bias(
    name: str, junk: float
) -> None:
    case = layer_case(LAYERS[name], 7, decode=False)
    hidden = case.hidden_states.copy()
    hidden[1, -1] = junk
    d_output, _ = cotangents(case)
    clean, got = vjp(case, d_output), vjp(replace(case, hidden_states=hidden), d_output)
    assert identical(clean.hidden_states, got.hidden_states)
    assert not got.hidden_states[1, -1].any()
    for field in weight_shapes(case.config):
        assert identical(found(clean, field), found(got, field))
    silent = d_output.copy()
    silent[1, -1] = 0.0
    without = vjp(case, silent)
    for field in weight_shapes(case.config):
        same = identical(found(clean, field), found(without, field))
        assert same == (field != "o_bias")


def test_g12_slots_that_the_call_writes_owe_nothing_to_the_cache_before() -> None:
    case = layer_case(LAYERS["mha"], 8, decode=True)
    d_output, d_cache = cotangents(case)
    got = vjp(case, d_output, **d_cache)
    assert got.cache_k is not None
    for row in range(2):
        written = case.positions[row]
        assert not got.cache_k[row, :, written].any()
        free = np.setdiff1d(np.arange(7), np.arange(written[-1] + 1))
        assert identical(got.cache_k[row][:, free], d_cache["d_cache_k"][row][:, free])


def test_two_tokens_for_one_slot_are_refused() -> None:
    case = layer_case(LAYERS["mha"], 8, decode=True)
    case = replace(case, positions=np.array([[3, 3], [4, 4]]))
    with pytest.raises(ConfigError, match=r"positions must differ within a row, got \[3, 3\]"):
        vjp(case, np.zeros((2, 2, 8)), d_cache_k=normal(9, 2, 2, 7, 4))


def test_prefill_into_a_cache_passes_its_cotangent_to_tokens_and_free_slots() -> None:
    config = LAYERS["mha"]
    case = layer_case(config, 9, decode=False)
    weights = make_weights(config, **case.weights)
    d_k, d_v = normal(1, 2, 2, 9, 4), normal(2, 2, 2, 9, 4)
    got = context_encoding_vjp(
        config,
        weights,
        case.hidden_states,
        np.zeros((2, 5, 8)),
        position_ids=case.positions,
        cache=empty_cache(config, batch=2, max_length=9),
        d_cache_k=d_k,
        d_cache_v=d_v,
    )
    assert got.cache_v is not None
    assert identical(got.cache_v[0, :, :3], d_v[0, :, :3])
    assert not got.cache_v[0, :, 3:8].any()
    assert identical(got.cache_v[1, :, 7], d_v[1, :, 7])  # its token is padding
    tokens = d_v[:, :, 3:8].swapaxes(1, 2).reshape(2, 5, 8)
    tokens[1, -1] = 0.0
    d_v_proj = tokens.reshape(10, 8).T @ case.hidden_states.reshape(10, 8)
    errors = gamma(12) * np.abs(tokens.reshape(10, 8)).T @ np.abs(case.hidden_states.reshape(10, 8))
    assert_within(got.weights.v_proj, d_v_proj, 2.0 * errors)


# Metamorphic


def together(parts: list[AttentionWeights], field: str) -> Array:
    arrays = [getattr(part, field) for part in parts]
    return np.sum(arrays, axis=0)


@pytest.mark.parametrize("cuts", [(4,), (1, 5), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("name", [*LAYERS, "everything"])
def test_gradients_through_prefill_then_decode_are_those_of_one_prefill(
    name: str, cuts: tuple[int, ...]
) -> None:
    config = EVERYTHING if name == "everything" else LAYERS[name]
    case = layer_case(config, 11, decode=False)
    hidden, d_output = normal(12, 1, 6, config.hidden_size), normal(13, 1, 6, config.hidden_size)
    positions = np.arange(6)[None]
    case = replace(case, hidden_states=hidden, positions=positions)
    weights = make_weights(config, **case.weights)
    whole = vjp(case, d_output)

    steps = list(zip((0, *cuts), (*cuts, 6), strict=True))
    caches = [empty_cache(config, batch=1, max_length=6)]
    for start, stop in steps:
        part = {"position_ids": positions[:, start:stop], "cache": caches[-1]}
        caches.append(token_generation(config, weights, hidden[:, start:stop], **part).cache)
    d_cache: dict[str, Array] = {}
    parts, d_hidden = [], np.zeros_like(hidden)
    for (start, stop), cache in reversed(list(zip(steps, caches[:-1], strict=True))):
        got = token_generation_vjp(
            config,
            weights,
            hidden[:, start:stop],
            d_output[:, start:stop],
            position_ids=positions[:, start:stop],
            cache=cache,
            **d_cache,
        )
        assert got.cache_k is not None
        assert got.cache_v is not None
        d_cache = {"d_cache_k": got.cache_k, "d_cache_v": got.cache_v}
        d_hidden[:, start:stop] = got.hidden_states
        parts.append(got.weights)
    formulas = layer_gradients(case, layer(case, "float64"), d_output)
    # either way errs within the bound; what the steps add up apart has one rounding more a step
    for field in weight_shapes(config):
        slack = gamma(len(steps)) * np.sum([np.abs(getattr(p, field)) for p in parts], axis=0)
        bound = 2.0 * formulas[field].error + slack
        assert_within(together(parts, field), getattr(whole.weights, field), bound)
    assert_within(d_hidden, whole.hidden_states, 2.0 * formulas["hidden_states"].error)


@sampled
@given(config=configs(), seed=st.integers(0, 2**16), order=st.permutations(range(2)))
def test_layers_with_their_kv_groups_in_another_order_are_the_same_layer(
    config: AttentionConfig, seed: int, order: list[int]
) -> None:
    if config.qk_norm is not None and config.qk_norm.scope == "projection":
        config = replace(config, qk_norm=None)
    config = replace(config, num_attention_heads=4, num_key_value_heads=2)
    case = layer_case(config, seed, decode=False)
    heads = [2 * group + member for group in order for member in range(2)]
    q_rows = [4 * head + c for head in heads for c in range(4)]
    kv_rows = [4 * group + c for group in order for c in range(4)]
    rows = {"q_proj": q_rows, "q_bias": q_rows, "sinks": heads}
    rows |= dict.fromkeys(("k_proj", "k_bias", "v_proj", "v_bias"), kv_rows)

    def moved(field: str, array: Array) -> Array:
        if field == "o_proj":
            return array[:, q_rows]
        return array[rows[field]] if field in rows else array

    permuted = replace(case, weights={name: moved(name, w) for name, w in case.weights.items()})
    d_output, _ = cotangents(case)
    got, want = vjp(permuted, d_output), vjp(case, d_output)
    formulas = gradient_formulas(case)
    assert_within(got.hidden_states, want.hidden_states, 2.0 * formulas["hidden_states"].error)
    for field in weight_shapes(config):
        bound = 2.0 * moved(field, formulas[field].error)
        assert_within(found(got, field), moved(field, found(want, field)), bound)
    outputs = [
        context_encoding(
            config,
            make_weights(config, **one.weights),
            one.hidden_states,
            position_ids=one.positions,
        ).output
        for one in (permuted, case)
    ]
    assert_within(outputs[0], outputs[1], 2.0 * layer(case, "float64").output.error)


@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_of_a_batch_is_the_sum_over_its_rows(name: str) -> None:
    case = layer_case(LAYERS[name], 14, decode=False)
    d_output, _ = cotangents(case)
    whole = vjp(case, d_output)
    parts = [
        vjp(
            replace(
                case,
                hidden_states=case.hidden_states[row : row + 1],
                positions=case.positions[row : row + 1],
            ),
            d_output[row : row + 1],
        )
        for row in range(2)
    ]
    formulas = gradient_formulas(case)
    rows = np.concatenate([part.hidden_states for part in parts])
    assert_within(rows, whole.hidden_states, 2.0 * formulas["hidden_states"].error)
    for field in weight_shapes(case.config):
        summed = together([part.weights for part in parts], field)
        assert_within(summed, found(whole, field), 2.0 * formulas[field].error)


def test_the_gradient_of_a_fused_projection_is_the_fused_gradient() -> None:
    case = layer_case(LAYERS["gqa-bias-rms"], 15, decode=False)
    d_output, _ = cotangents(case)
    got = vjp(case, d_output)
    fused = vjp(replace(case, config=replace(case.config, fused_qkv=True)), d_output)
    matrix, bias = fuse_qkv(got.weights)
    again, bias_again = fuse_qkv(fused.weights)
    assert bias is not None
    assert bias_again is not None
    assert identical(matrix, again)
    assert identical(bias, bias_again)


# Inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Widened(AttentionConfig):
    novelty: float = 0.0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden_states": np.zeros((2, 5, 7))}, ShapeError, r"hidden_states must have shape"),
        ({"d_output": np.zeros((2, 4, 8))}, ShapeError, r"d_output must have shape \(2, 5, 8\)"),
        ({"d_cache_k": np.zeros((2, 2, 3, 4))}, ShapeError, r"d_cache_k must have shape"),
        ({"cache": None}, ConfigError, "cache must be a ContiguousCache for gradients"),
        (
            {
                "config": Widened(
                    hidden_size=8, num_attention_heads=2, num_key_value_heads=2, novelty=1.0
                )
            },
            ConfigError,
            "novelty must be 0.0 for gradients, got 1.0",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    config = LAYERS["mha"]
    case = layer_case(config, 0, decode=False)
    arguments = {
        "config": config,
        "weights": make_weights(config, **case.weights),
        "hidden_states": case.hidden_states,
        "d_output": case.hidden_states,
        "position_ids": case.positions,
        "cache": empty_cache(config, batch=2, max_length=9),
    } | changes
    with pytest.raises(error, match=message):
        token_generation_vjp(**arguments)
