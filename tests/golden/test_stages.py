from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layers import LAYERS, identical, integer_weights, normal, small_integers

import golden
from golden import (
    STAGES,
    Accumulation,
    Array,
    AttentionConfig,
    Capture,
    LinearScaling,
    Observer,
    QKNorm,
    RopeConfig,
    TemperatureTuning,
    context_encoding,
    empty_cache,
    token_generation,
    unobserved,
)

BATCH, LENGTH, SLOTS = 2, 3, 7


def everything(norm: QKNorm | None = None) -> AttentionConfig:
    """Return a layer that passes through every stage; its sizes all differ."""
    return AttentionConfig(
        hidden_size=10,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        qkv_bias=True,
        o_bias=True,
        clip_qkv=5.0,
        qk_norm=norm or QKNorm(weight_offset=3.0),  # integer weights hold zeros
        rope=RopeConfig(rotary_dim=4, scaling=LinearScaling(factor=2.0)),
        softmax_scale=2.0**-5,
        softcap=4.0,
        sliding_window=4,
        learned_sinks_size=1,
        temperature_tuning=TemperatureTuning(floor_scale=2.0),
    )


def encode(config: AttentionConfig, observe: Observer, *, decode: bool = False) -> Array:
    weights = integer_weights(config)
    states = small_integers(5, BATCH, LENGTH, config.hidden_size)
    step: Any = token_generation if decode else context_encoding
    cache = empty_cache(config, batch=BATCH, max_length=SLOTS)
    output: Array = step(
        config, weights, states, position_ids=np.arange(3), cache=cache, observe=observe
    ).output
    return output


def stage_shapes(kv_len: int, *, flat_norm: bool = False) -> dict[str, tuple[int, ...]]:
    q_flat, kv_flat = (BATCH, LENGTH, 48), (BATCH, LENGTH, 16)
    q_heads, kv_heads = (BATCH, 6, LENGTH, 8), (BATCH, 2, LENGTH, 8)
    q_norm, k_norm = (q_flat, kv_flat) if flat_norm else (q_heads, kv_heads)
    pairs, dials, square = (2,), (BATCH, LENGTH, 2), (BATCH, 6, LENGTH, kv_len)
    return {
        "q_product": q_flat,
        "k_product": kv_flat,
        "v_product": kv_flat,
        "q_proj": q_flat,
        "k_proj": kv_flat,
        "v_proj": kv_flat,
        "q_clip": q_flat,
        "k_clip": kv_flat,
        "v_clip": kv_flat,
        "q_norm_scale": (*q_norm[:-1], 1),
        "k_norm_scale": (*k_norm[:-1], 1),
        "q_norm_unit": q_norm,
        "k_norm_unit": k_norm,
        "q_norm": q_norm,
        "k_norm": k_norm,
        "rope_exponents": pairs,
        "rope_powers": pairs,
        "rope_frequencies": pairs,
        "rope_scaled_frequencies": pairs,
        "rope_angles": dials,
        "rope_cos": dials,
        "rope_sin": dials,
        "q_rope_cos": (*q_heads[:-1], 4),
        "k_rope_cos": (*kv_heads[:-1], 4),
        "q_rope_sin": (*q_heads[:-1], 4),
        "k_rope_sin": (*kv_heads[:-1], 4),
        "q_rope": q_heads,
        "k_rope": kv_heads,
        "q_temperature": q_heads,
        "k_cache": kv_heads,
        "v_cache": kv_heads,
        "qk": square,
        "scores": square,
        "softcap_ratio": square,
        "softcap_tanh": square,
        "softcap": square,
        "shifted_scores": square,
        "exp": square,
        "denominator": (*square[:-1], 1),
        "unnormalised_weights": square,
        "weights": square,
        "attn": q_heads,
        "o_product": (BATCH, LENGTH, 10),
        "o_proj": (BATCH, LENGTH, 10),
    }


@pytest.mark.parametrize("decode", [False, True], ids=["cte", "tkg"])
@pytest.mark.parametrize("flat_norm", [False, True], ids=["norm-per-head", "norm-flat"])
def test_every_stage_is_observed_with_its_documented_shape(decode: bool, flat_norm: bool) -> None:
    capture = Capture()
    encode(everything(QKNorm(scope="projection" if flat_norm else "head")), capture, decode=decode)
    expected = stage_shapes(SLOTS if decode else LENGTH, flat_norm=flat_norm)
    assert set(expected) == set(STAGES)
    assert {stage: value.shape for stage, value in capture.values.items()} == expected
    assert all(value.dtype == np.float64 for value in capture.values.values())


class Recorder:
    """Observer that notes the order of the stages."""

    def __init__(self) -> None:
        self.order: list[str] = []

    def __call__(
        self, stage: str, value: Array, accumulation: Accumulation | None = None, /
    ) -> Array:
        self.order.append(stage)
        return value


@pytest.mark.parametrize("decode", [False, True], ids=["cte", "tkg"])
def test_each_stage_is_observed_once(decode: bool) -> None:
    recorder = Recorder()
    encode(everything(), recorder, decode=decode)
    assert sorted(recorder.order) == sorted(STAGES)


@pytest.mark.parametrize("prefix", ["q_", "k_", "v_", "rope_", ""])
def test_the_stages_of_one_tensor_are_observed_in_the_order_of_stages(prefix: str) -> None:
    recorder = Recorder()
    encode(everything(), recorder)
    others = ("q_", "k_", "v_", "rope_")

    def mine(stage: str) -> bool:
        return stage.startswith(prefix) if prefix else not stage.startswith(others)

    assert list(filter(mine, recorder.order)) == list(filter(mine, STAGES))


def test_stages_are_observed_in_the_order_of_stages() -> None:
    recorder = Recorder()
    encode(everything(), recorder)
    assert recorder.order == list(STAGES)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_observes_no_stage_it_does_not_have(name: str) -> None:
    config, recorder = LAYERS[name], Recorder()
    encode(config, recorder)
    for field, stages in (
        (config.clip_qkv, {"q_clip", "k_clip", "v_clip"}),
        (config.qk_norm, {s for s in STAGES if "_norm" in s}),
        (config.rope, {s for s in STAGES if "rope" in s} - {"rope_scaled_frequencies"}),
        (config.softcap, {s for s in STAGES if "softcap" in s}),
        (config.temperature_tuning, {"q_temperature"}),
    ):
        assert (stages & set(recorder.order)) == (stages if field is not None else set())


@pytest.mark.parametrize("name", LAYERS)
def test_capturing_changes_no_bit(name: str) -> None:
    assert identical(encode(LAYERS[name], Capture()), encode(LAYERS[name], unobserved))


@pytest.mark.parametrize("decode", [False, True], ids=["cte", "tkg"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_rewrite_of_any_stage_takes_effect_downstream(stage: str, decode: bool) -> None:
    def lift(name: str, value: Array, accumulation: Accumulation | None = None, /) -> Array:
        if name != stage:
            return value
        lifted: Array = value.copy()
        # of one channel or key: a norm undoes a common factor, RoPE and softmax a common shift
        lifted[..., 0] = 1.5 * lifted[..., 0] + 0.5
        return lifted

    config = everything()
    plain, capture = encode(config, unobserved, decode=decode), Capture()

    def both(name: str, value: Array, accumulation: Accumulation | None = None, /) -> Array:
        return capture(name, lift(name, value))

    rewritten = encode(config, both, decode=decode)
    assert np.abs(rewritten - plain).max() > 1e-6 * np.abs(plain).max()
    assert identical(rewritten, capture.values["o_proj"])


@pytest.mark.parametrize("stage", ["k_cache", "v_cache"])
def test_a_rewrite_of_a_cache_stage_is_what_the_cache_holds(stage: str) -> None:
    def zero(name: str, value: Array, accumulation: Accumulation | None = None, /) -> Array:
        return 0.0 * value if name == stage else value

    config = LAYERS["mha"]
    states = small_integers(5, 1, 3, config.hidden_size)
    for step in (context_encoding, token_generation):
        cache = step(
            config,
            integer_weights(config),
            states,
            position_ids=[0, 1, 2],
            cache=empty_cache(config, batch=1, max_length=3),
            observe=zero,
        ).cache
        assert not (cache.k if stage == "k_cache" else cache.v).any()
        assert (cache.v if stage == "k_cache" else cache.k).any()


# Accumulations


def test_an_accumulation_has_the_length_of_its_sum_and_the_sum_of_squared_terms() -> None:
    found: dict[str, tuple[Array, Accumulation]] = {}
    capture = Capture()

    def keep(stage: str, value: Array, accumulation: Accumulation | None = None, /) -> Array:
        if accumulation is not None:
            found[stage] = (value, accumulation)
        return capture(stage, value)

    config = everything()
    encode(config, keep)
    values = capture.values
    lengths = {stage: accumulation.length for stage, (_, accumulation) in found.items()}
    assert lengths == {
        **dict.fromkeys(("q_product", "k_product", "v_product"), 10),
        **dict.fromkeys(("q_norm_scale", "k_norm_scale"), 8),
        "qk": 8,
        "denominator": LENGTH,
        "attn": LENGTH,
        "o_product": 48,
    }
    for value, accumulation in found.values():
        assert np.broadcast_shapes(accumulation.squares().shape, value.shape) == value.shape
    weights = integer_weights(config)
    states = small_integers(5, BATCH, LENGTH, 10)
    heads = values["attn"].swapaxes(1, 2).reshape(BATCH, LENGTH, 48)
    keys = values["k_cache"].repeat(3, axis=1)
    mixed = values["v_cache"].repeat(3, axis=1)
    shifted = values["shifted_scores"]
    first = values["softcap"][..., :1] - shifted[..., :1]  # less the row's largest: key 0 is seen
    assert np.isfinite(first).all()
    assert weights.sinks is not None
    sunk = np.exp(weights.sinks[:, None, None] - first)
    terms = {
        "q_product": states[:, :, None] * weights.q_proj,
        "v_product": states[:, :, None] * weights.v_proj,
        "qk": values["q_temperature"][:, :, :, None] * keys[:, :, None],
        "denominator": np.concatenate([values["exp"], sunk], axis=-1)[:, :, :, None],
        "attn": values["weights"][:, :, :, None] * mixed.swapaxes(-1, -2)[:, :, None],
        "o_product": heads[:, :, None] * weights.o_proj,
    }
    for stage, term in terms.items():
        want = np.square(term).sum(axis=-1)
        # squares, products and sums of at most 48 terms, all positive: 64 roundings a side
        error = np.abs(found[stage][1].squares() - want)
        assert (error <= 128 * 2.0**-53 * want).all(), stage
    counts = {stage: accumulation.count() for stage, (_, accumulation) in found.items()}
    visible = np.isfinite(shifted).sum(axis=-1, keepdims=True)
    nonzero = np.isfinite(shifted).astype(np.float64) @ (mixed != 0)  # zeros add nothing
    assert (nonzero < visible).any()
    np.testing.assert_array_equal(counts["attn"], nonzero)
    np.testing.assert_array_equal(counts["denominator"] + 0 * visible, visible + 1)  # the sink
    assert (counts["qk"], counts["o_product"]) == (8, 48)


# Capture


def test_capture_keeps_only_the_stages_asked_for() -> None:
    capture = Capture(frozenset({"qk", "weights"}))
    encode(everything(), capture)
    assert set(capture.values) == {"qk", "weights"}


def test_capture_keeps_copies_and_the_later_of_two_values() -> None:
    capture = Capture()
    first = normal(0, 2, 2)
    assert capture("qk", first) is first
    first[:] = 0.0
    assert capture.values["qk"].any()
    capture("qk", np.ones((1, 1)))
    assert identical(capture.values["qk"], np.ones((1, 1)))


def test_two_captures_share_nothing() -> None:
    one, two = Capture(), Capture()
    one("qk", np.ones(1))
    assert two.values == {}


def test_capture_names_the_stages_it_does_not_know() -> None:
    message = (
        "only must name stages of golden.STAGES, CALL_STAGES or GRADIENT_STAGES, got softmax, wq; "
        "known stages are q_product, "
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        Capture(frozenset({"wq", "softmax", "qk"}))


def test_unobserved_returns_the_value_itself() -> None:
    value = normal(0, 2)
    assert unobserved("qk", value) is value


# The package


def test_importing_golden_loads_neither_torch_nor_the_rest_of_the_project() -> None:
    root = Path(golden.__file__).parents[1]
    program = (
        "import sys, pkgutil, importlib, golden\n"
        "for module in pkgutil.walk_packages(golden.__path__, 'golden.'):\n"
        "    importlib.import_module(module.name)\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert {"golden", "numpy"} <= loaded
    assert not loaded & {"torch", "transformers", "impl", "conformance", "reports"}


def test_every_public_name_exists_once() -> None:
    assert len(golden.__all__) == len(set(golden.__all__))
    assert all(hasattr(golden, name) for name in golden.__all__)
