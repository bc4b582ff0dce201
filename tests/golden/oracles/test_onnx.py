"""Golden against the ONNX operators Attention (opsets 23 to 25) and RotaryEmbedding (23).

Each node test of onnx runs twice in float64: through the operator's reference implementation and
through the graph of primitive operators that onnx defines it by, two texts by different hands.
Golden has to meet both. Facts pinned here:

* A1, grouped heads: query head `h` reads key/value head `h // group`, in BHSD and in the flat
  layout `(batch, length, heads * dim)`; a value as wide as it likes beside the key.
* A3, the soft cap acts on scaled scores before the mask: a capped -inf would let keys back in.
* A5, a row that sees no key gives zeros and weights of zero, whatever emptied it.
* A6, a masked key's value never reaches the output, however large.
* M1 to M3 and M5, by position: causal is top-left without a cache, starts after the cached keys
  with one, and ends at the last valid key of a padded cache; ONNX's `left_window_size` is
  `window - 1`; masks compose by intersection; a short mask hides the keys it does not reach.
* The stages `scores` and `weights`, and the cache's keys and values after a step.
* An additive float mask (a bias of the scores) is an observer at the last stage before the mask.
* R5, both pairings, of the whole head and of its leading channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from float64_agreement import assert_agrees, roundoff
from onnx_cases import (
    EXPANDED,
    AnyArray,
    AttentionCall,
    Case,
    evaluate_in_float64,
    golden_outputs,
    load_cases,
    rotary_output,
    translate_attention,
)

import golden

pytest.importorskip("onnx", reason="the ONNX oracle needs onnx: pip install .[oracles]")

CASES = load_cases()

# The longest case multiplies heads 8 wide, mixes 10 keys and rounds some 20 times between (two
# roots of the scale, cap, shift, exp, division); scores stay below 4, asserted below.
LARGEST_SCORE = 4.0
LIMIT = roundoff(terms=8 + 10 + 20, score=LARGEST_SCORE)


def assert_case_agrees(case: Case, observed: dict[str, AnyArray], *, expanded: bool) -> None:
    """Assert that every output of a case equals what onnx computes in float64."""
    model = case.expanded if expanded else case.model
    assert model is not None, f"{case.name} has no graph of primitive operators"
    names = [output.name for output in model.graph.output]
    for name, expected in zip(names, evaluate_in_float64(model, case.inputs), strict=True):
        got, hidden = observed[name], np.isneginf(expected)  # scores after the mask
        assert np.array_equal(np.isneginf(got), hidden), f"{case.name}: {name}: hidden keys"
        got, expected = (np.where(hidden, 0.0, x) for x in (got, expected))
        assert_agrees(f"{case.name}: {name}", got, expected, limit=LIMIT)


def test_the_limit_is_below_1e_12() -> None:
    assert LIMIT < 1e-12


@pytest.mark.parametrize("expanded", [False, True], ids=["operator", "expanded"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_golden_computes_what_onnx_computes(name: str, expanded: bool) -> None:
    case = CASES[name]
    assert_case_agrees(case, golden_outputs(case), expanded=expanded)


@pytest.mark.parametrize("name", sorted(CASES))
def test_widened_model_still_is_the_case_that_onnx_stores(name: str) -> None:
    case = CASES[name]
    # float16 and bfloat16 cases store results rounded once more than their tolerance allows for.
    rtol = case.rtol + 4 * max(_unit_roundoff(array) for array in case.inputs.values())
    wide = evaluate_in_float64(case.model, case.inputs)
    for stored, computed in zip(case.outputs.values(), wide, strict=True):
        np.testing.assert_allclose(
            computed, stored.astype(np.float64), rtol=rtol, atol=case.atol + rtol
        )


def _unit_roundoff(array: AnyArray) -> float:
    return {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(array.dtype.name, 0.0)


@pytest.mark.parametrize(
    "name", [name for name in sorted(CASES) if CASES[name].operator == "Attention"]
)
def test_scores_stay_within_the_premise_of_the_limit(name: str) -> None:
    call = replace(translate_attention(CASES[name]), product_stage="scores")
    bias = 0.0 if call.bias is None else call.bias
    assert np.abs(call.outputs()["qk_matmul_output"] + bias).max() <= LARGEST_SCORE


def test_every_case_has_its_graph_of_primitive_operators() -> None:
    assert not [name for name, case in CASES.items() if case.expanded is None]
    assert not [name for name in CASES if name.endswith(EXPANDED)]


def _tiled_heads(call: AttentionCall) -> AttentionCall:
    group = call.q.shape[1] // call.k.shape[1]
    return replace(call, k=np.tile(call.k, (1, group, 1, 1)), v=np.tile(call.v, (1, group, 1, 1)))


def _window_without_the_query(call: AttentionCall) -> AttentionCall:
    return replace(call, mask=call.mask & golden.SlidingWindow(2))


def _queries_at_the_top(call: AttentionCall) -> AttentionCall:
    q_len = call.q.shape[2]
    return replace(call, q_positions=np.broadcast_to(np.arange(q_len), call.q_positions.shape))


def _padding_occupied(call: AttentionCall) -> AttentionCall:
    return replace(call, mask=golden.Everything(), kv_positions=np.abs(call.kv_positions))


def _no_cap(call: AttentionCall) -> AttentionCall:
    return replace(call, softcap=None)


def _no_mask(call: AttentionCall) -> AttentionCall:
    return replace(call, mask=golden.Everything())


def _no_bias(call: AttentionCall) -> AttentionCall:
    return replace(call, bias=None)


@pytest.mark.parametrize(
    ("name", "misread"),
    [
        ("test_attention_4d_gqa", _tiled_heads),
        ("test_attention_3d_gqa_causal", _tiled_heads),
        ("test_attention_local_window", _window_without_the_query),
        ("test_attention_local_window_with_past", _window_without_the_query),
        ("test_attention_4d_causal_with_past_and_present", _queries_at_the_top),
        ("test_attention_4d_causal_nonpad_batch_prefill", _queries_at_the_top),
        ("test_attention_4d_gqa_causal_nonpad_decode", _padding_occupied),
        ("test_attention_4d_softcap", _no_cap),
        ("test_attention_4d_softcap_neginf_mask_poison", _no_mask),
        ("test_attention_causal_boolmask_nan_robustness", _no_mask),
        ("test_attention_4d_attn_mask", _no_bias),
        ("test_attention_local_window_ext_cache_rank3_head_mask", _no_bias),
    ],
)
def test_comparison_rejects_a_misreading(
    name: str, misread: Callable[[AttentionCall], AttentionCall]
) -> None:
    case = CASES[name]
    outputs = misread(translate_attention(case)).outputs()
    for expanded in (False, True):
        with pytest.raises(AssertionError, match="exceeds bound"):
            assert_case_agrees(case, outputs, expanded=expanded)


@pytest.mark.parametrize(
    "name", [name for name in sorted(CASES) if CASES[name].operator == "RotaryEmbedding"]
)
def test_comparison_rejects_the_other_pairing_and_the_other_direction(name: str) -> None:
    def other_pairing(x: AnyArray, cos: AnyArray, sin: AnyArray, *, pairing: str) -> AnyArray:
        other = "half" if pairing == "interleaved" else "interleaved"
        return golden.rotate(x, cos, sin, pairing=other)

    def other_direction(x: AnyArray, cos: AnyArray, sin: AnyArray, *, pairing: str) -> AnyArray:
        return golden.rotate(x, cos, -sin, pairing=pairing)

    case = CASES[name]
    for rotate in (other_pairing, other_direction):
        with pytest.raises(AssertionError, match="exceeds bound"):
            assert_case_agrees(case, rotary_output(case, rotate), expanded=False)
