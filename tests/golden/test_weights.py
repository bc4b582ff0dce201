from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import LAYERS, identical, integer_weights, normal, sampled, small_integers

from golden import (
    AttentionConfig,
    ConfigError,
    QKNorm,
    ShapeError,
    fuse_qkv,
    make_weights,
    split_qkv,
    weight_shapes,
)


def layer(**changes: Any) -> AttentionConfig:
    defaults: dict[str, Any] = {
        "hidden_size": 10,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 4,
    }
    return AttentionConfig(**(defaults | changes))


PROJECTIONS = {"q_proj": (24, 10), "k_proj": (8, 10), "v_proj": (8, 10), "o_proj": (10, 24)}


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({}, {}),
        ({"qkv_bias": True}, {"q_bias": (24,), "k_bias": (8,), "v_bias": (8,)}),
        ({"o_bias": True}, {"o_bias": (10,)}),
        ({"learned_sinks_size": 1}, {"sinks": (6,)}),
        ({"qk_norm": QKNorm(weighted=False)}, {}),
        ({"qk_norm": QKNorm()}, {"q_norm": (4,), "k_norm": (4,)}),
        ({"qk_norm": QKNorm(scope="projection")}, {"q_norm": (24,), "k_norm": (8,)}),
        (
            {"qk_norm": QKNorm(kind="layer")},
            {"q_norm": (4,), "k_norm": (4,), "q_norm_bias": (4,), "k_norm_bias": (4,)},
        ),
        ({"qk_norm": QKNorm(kind="layer", weighted=False)}, {}),
    ],
    ids=[
        "plain",
        "qkv-bias",
        "o-bias",
        "sinks",
        "norm-without-weight",
        "rms-per-head",
        "rms-flat",
        "layer-norm",
        "layer-norm-without-weight",
    ],
)
def test_a_layer_has_the_arrays_its_configuration_asks_for(
    changes: dict[str, Any], more: dict[str, tuple[int, ...]]
) -> None:
    assert weight_shapes(layer(**changes)) == PROJECTIONS | more


def test_arrays_of_every_field_are_widened_to_float64() -> None:
    config = layer(qkv_bias=True, o_bias=True, learned_sinks_size=1, qk_norm=QKNorm(kind="layer"))
    shapes = weight_shapes(config)
    narrow = {name: normal(1, *shape).astype(np.float32) for name, shape in shapes.items()}
    weights = make_weights(config, **narrow)
    assert {field.name for field in dataclasses.fields(weights)} == set(shapes)
    for name, array in narrow.items():
        assert identical(getattr(weights, name), array.astype(np.float64))


def test_arrays_a_layer_does_not_have_are_none() -> None:
    config = layer()
    weights = make_weights(config, **{n: np.ones(s) for n, s in weight_shapes(config).items()})
    absent = {f.name for f in dataclasses.fields(weights)} - set(PROJECTIONS)
    assert all(getattr(weights, name) is None for name in absent)


def test_missing_and_unused_arrays_are_both_named() -> None:
    config = layer(qkv_bias=True)
    arrays = {name: np.ones(shape) for name, shape in weight_shapes(config).items()}
    del arrays["v_bias"], arrays["k_proj"]
    message = (
        "weights must be exactly those of weight_shapes(config); "
        "missing: k_proj, v_bias; not used: bias, sinks"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_weights(config, **arrays, sinks=np.ones(6), bias=np.ones(3))
    with pytest.raises(ConfigError, match=re.escape("missing: none; not used: sinks")):
        make_weights(layer(), **{n: np.ones(s) for n, s in PROJECTIONS.items()}, sinks=np.ones(6))


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("q_proj", np.ones((10, 24)), "q_proj must have shape (24, 10), (out, in), got (10, 24)"),
        ("k_proj", np.ones((8, 11)), "k_proj must have shape (8, 10), (out, in), got (8, 11)"),
        ("o_proj", np.ones(24), "o_proj must have shape (10, 24), (out, in), got (24,)"),
        ("v_proj", np.ones((8, 10), dtype=bool), "v_proj must hold real numbers, got dtype bool"),
        ("v_proj", [["1"] * 10] * 8, "v_proj must hold real numbers, got dtype <U1"),
    ],
    ids=["transposed", "wrong-width", "flat", "bool", "text"],
)
def test_an_array_that_does_not_fit_is_named_with_both_shapes(
    name: str, array: Any, message: str
) -> None:
    arrays: dict[str, Any] = {n: np.ones(s) for n, s in PROJECTIONS.items()}
    with pytest.raises(ShapeError, match=re.escape(message)):
        make_weights(layer(), **(arrays | {name: array}))


@sampled
@given(
    name=st.sampled_from(sorted(LAYERS)),
    bias=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_fusing_and_splitting_return_the_same_arrays(name: str, bias: bool, seed: int) -> None:
    config = dataclasses.replace(LAYERS[name], qkv_bias=bias)
    shapes = weight_shapes(config).items()
    arrays = {n: normal(seed + i, *s) for i, (n, s) in enumerate(shapes)}
    weights = make_weights(config, **arrays)
    matrix, fused_bias = fuse_qkv(weights)
    assert matrix.shape == (config.q_size + 2 * config.kv_size, config.hidden_size)
    parts = (weights.q_proj, weights.k_proj, weights.v_proj)
    assert all(map(identical, split_qkv(config, matrix), parts))
    if not bias:
        assert fused_bias is None
        return
    assert fused_bias is not None
    assert weights.q_bias is not None
    assert weights.k_bias is not None
    assert weights.v_bias is not None
    biases = (weights.q_bias, weights.k_bias, weights.v_bias)
    assert all(map(identical, split_qkv(config, fused_bias), biases))


def test_one_product_with_the_fused_matrix_is_the_three_products() -> None:
    weights = integer_weights(layer())
    hidden = small_integers(2, 3, 10)
    matrix, _ = fuse_qkv(weights)
    whole = hidden @ matrix.T
    assert identical(whole[:, :24], hidden @ weights.q_proj.T)
    assert identical(whole[:, 24:32], hidden @ weights.k_proj.T)
    assert identical(whole[:, 32:], hidden @ weights.v_proj.T)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((24, 10), "fused must have shape (40, 10), rows of q, k, v, got (24, 10)"),
        ((40, 9), "fused must have shape (40, 10), rows of q, k, v, got (40, 9)"),
        ((41,), "fused must have shape (40), rows of q, k, v, got (41,)"),
        ((1, 40, 10), "fused must have shape (40, 10), rows of q, k, v, got (1, 40, 10)"),
        ((), "fused must have shape (40, 10), rows of q, k, v, got ()"),
    ],
    ids=str,
)
def test_a_fused_array_of_other_rows_is_not_split(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ShapeError, match=re.escape(message)):
        split_qkv(layer(), np.ones(shape))
