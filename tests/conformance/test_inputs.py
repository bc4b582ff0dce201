"""Inputs hang on the case's id alone, are exact in its dtype, and never hide a defect."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace

import numpy as np
import pytest

from conformance.case_ids import parse
from conformance.cases import DTYPES, REGIMES
from conformance.inputs import CoreInputs, LayerInputs, draw_core, draw_layer
from golden import FORMATS, Array, weight_shapes

LAYER = "h256-hq8-hkv2-d32-qkvbias-obias-sinks-norm_rms_pre_head_w_1em06_0-rope10000"
PREFILL = LAYER + "/cte-{}-b2-q96_57-{}-seed0"
DECODE = LAYER + "/tkg-{}-b2-kv96_57-steps3-{}-seed0"
CORE = "core-h256-hq8-hkv2-d32-sinks/cte-{}-b2-q96_57-{}-seed0"


def drawn(case_id: str) -> LayerInputs | CoreInputs:
    case = parse(case_id)
    return draw_core(case) if case.scope == "core" else draw_layer(case)


def arrays_of(inputs: LayerInputs | CoreInputs) -> dict[str, Array]:
    """Every array of the inputs by name, weights included."""
    values = {f.name: getattr(inputs, f.name) for f in fields(inputs)}
    weights = values.pop("weights", None)
    if weights is not None:
        values |= {f.name: getattr(weights, f.name) for f in fields(weights)}
    return {name: value for name, value in values.items() if value is not None}


def digest(case_id: str) -> str:
    found = hashlib.sha256()
    for name, array in sorted(arrays_of(drawn(case_id)).items()):
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


@pytest.mark.parametrize(
    ("case_id", "expected"),
    [
        (PREFILL.format("bf16", "gaussian"), "f8e053402c4f6f18"),
        (CORE.format("fp16", "integers"), "7c94c5438e290c36"),
    ],
)
def test_inputs_of_a_published_id_never_change(case_id: str, expected: str) -> None:
    assert digest(case_id) == expected


def test_inputs_depend_on_the_id_and_not_on_what_was_drawn_before() -> None:
    first = digest(DECODE.format("bf16", "gaussian"))
    for regime in REGIMES:
        drawn(CORE.format("fp32", regime))
    assert digest(DECODE.format("bf16", "gaussian")) == first


def test_every_part_of_the_id_changes_the_inputs() -> None:
    base = parse(PREFILL.format("bf16", "gaussian"))
    changed = [
        base,
        replace(base, seed=1),
        replace(base, dtype="float32"),
        replace(base, regime="peaked"),
        replace(base, config=replace(base.config, sliding_window=50)),
    ]
    hidden = [draw_layer(case).hidden_states.ravel()[:8].tobytes() for case in changed]
    assert len(set(hidden)) == len(changed)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("pattern", [PREFILL, DECODE, CORE], ids=["prefill", "decode", "core"])
def test_inputs_are_finite_signed_and_exact_in_the_dtype(
    pattern: str, dtype: str, regime: str
) -> None:
    case = parse(pattern.format(dtype, regime))
    assert case.dtype in DTYPES
    for name, array in arrays_of(drawn(case.id)).items():
        if array.dtype != np.float64:
            continue
        assert np.isfinite(array).all(), name
        np.testing.assert_array_equal(FORMATS[case.dtype].nearest(array), array, err_msg=name)
        if name not in ("sinks", "q_norm", "k_norm"):
            assert (array < 0).any(), name
            assert (array > 0).any(), name


@pytest.mark.parametrize("regime", REGIMES)
def test_no_regime_is_uniform_or_of_one_sign(regime: str) -> None:
    for name, array in arrays_of(drawn(CORE.format("fp32", regime))).items():
        if array.dtype != np.float64 or array.size < 1000:
            continue
        centred = array - array.mean()
        kurtosis = np.mean(centred**4) / np.mean(centred**2) ** 2
        # 1.8 for a uniform density, 3 for a normal one; the sparse integers here have 4.3
        assert kurtosis > 2.5, name
        # of a mean of zero; 6 deviations
        assert abs(array.mean()) < 6 * array.std() / np.sqrt(array.size), name


def spread(array: Array) -> float:
    return float(np.sqrt(np.mean(np.square(array))))


def assert_spread(array: Array, size: float) -> None:
    """Hold a root mean square to 6 of its own deviations, `size / sqrt(2 n)` for normal values."""
    assert abs(spread(array) - size) <= 6 * size / np.sqrt(2 * array.size)


def test_regimes_are_spread_as_their_description_says() -> None:
    found = {regime: arrays_of(drawn(CORE.format("fp32", regime))) for regime in REGIMES}
    plain = found["gaussian"]
    assert_spread(plain["q"], 1)
    assert_spread(found["peaked"]["q"], 4)
    assert_spread(found["large"]["q"], 6)
    assert_spread(found["large"]["k"], 6)
    outlier = found["outlier"]["k"]
    assert_spread(outlier[..., 0], 8)
    assert_spread(outlier[..., 1:], 1)
    integers = found["integers"]
    assert set(np.unique(integers["q"])) == {-2, -1, 0, 1, 2}
    logits = np.einsum("bhqd,bhkd->bhqk", found["large"]["q"][:, :2], found["large"]["k"]) / 32**0.5
    assert np.abs(logits).max() > 100


@pytest.mark.parametrize("regime", ["gaussian", "peaked", "large"])
def test_projections_give_queries_keys_and_values_of_the_wanted_size(regime: str) -> None:
    case = parse(f"h256-hq8-hkv2-d32/cte-fp32-b2-q97-{regime}-seed0")
    inputs = draw_layer(case)
    query, key = {"gaussian": (1, 1), "peaked": (4, 1), "large": (6, 6)}[regime]
    for name, size in (("q_proj", query), ("k_proj", key), ("v_proj", 1)):
        projected = inputs.hidden_states @ getattr(inputs.weights, name).T
        # at least 97 * 2 rows that share their 64 or more weights' rows: known to a few percent
        assert spread(projected) == pytest.approx(size, rel=0.1), name


def test_weights_are_those_the_layer_has() -> None:
    inputs = drawn(PREFILL.format("bf16", "gaussian"))
    assert isinstance(inputs, LayerInputs)
    for name, shape in weight_shapes(parse(PREFILL.format("bf16", "gaussian")).config).items():
        assert getattr(inputs.weights, name).shape == shape


def test_prompts_are_padded_on_the_right_and_decode_continues_each_row() -> None:
    prefill = drawn(PREFILL.format("bf16", "gaussian"))
    assert isinstance(prefill, LayerInputs)
    assert prefill.position_ids[0].tolist() == list(range(96))
    assert prefill.position_ids[1].tolist() == [*range(57), *[-1] * 39]
    decode = drawn(DECODE.format("bf16", "gaussian"))
    assert isinstance(decode, LayerInputs)
    assert decode.position_ids.tolist() == [[96, 97, 98], [57, 58, 59]]
    assert decode.cache_lengths is not None
    assert decode.cache_lengths.tolist() == [96, 57]


def test_cache_slots_without_a_token_hold_another_tokens_values() -> None:
    decode = drawn(DECODE.format("bf16", "gaussian"))
    assert isinstance(decode, LayerInputs)
    assert decode.k_cache is not None
    assert decode.v_cache is not None
    for cache in (decode.k_cache, decode.v_cache):
        assert (np.abs(cache[1, :, 60:]).max(axis=-1) > 0).all()


def test_prior_keys_come_before_the_queries_and_start_moves_both() -> None:
    prior = draw_core(parse("core-h64-hq4-hkv4-d16/cte-fp32-b1-q3-prior4-gaussian-seed0"))
    assert prior.q_positions.tolist() == [[4, 5, 6]]
    assert prior.kv_positions.tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    start = draw_core(parse("core-h64-hq4-hkv4-d16/cte-fp32-b1-q3-start10-gaussian-seed0"))
    assert start.q_positions.tolist() == start.kv_positions.tolist() == [[10, 11, 12]]
