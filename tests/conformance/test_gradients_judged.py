"""The judge on gradients: correct kernels of any tiles pass, each planted bug is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradient_kernels
import planted_gradients
import pytest
import torch
from gradient_kernels import Kernel, flash, own_backward

from conformance import assert_conforms
from conformance.api import Deviation, case_inputs, judge_output
from conformance.case_ids import parse
from conformance.cases import DTYPES, Case, Workload
from conformance.errors import UsageError
from conformance.exchange import export_case, subject_from_file
from conformance.gradients.cases import gradient_cases
from conformance.gradients.expected import gradient_names
from conformance.gradients.subjects import gradients_of
from conformance.runner import inputs_of, judge_case, reference
from conformance.subjects import CoreCall, Subject, load_subject, subject
from conformance.subjects.base import GradientCall
from conformance.variants import dense
from reports.records import CaseRecord

CORE = "core-h128-hq4-hkv2-d32{}/cte-{}-b2-q33-backward-{}-seed0"
GROUPED = CORE.format("-sinks", "bf16", "gaussian")
ONE_KEY = CORE.format("", "bf16", "gaussian")
"""Without a sink the first query's one key has all the weight: its score has no gradient."""


def worst_output(record: CaseRecord) -> str:
    return max(record.statistics, key=lambda statistic: statistic.ratio).output


# Correct kernels


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("tile", [8, 33])
@pytest.mark.parametrize("layer", ["-sinks", "-cap20", "-window8"])
def test_a_backward_by_tiles_of_any_size_conforms(layer: str, tile: int, dtype: str) -> None:
    assert_conforms(flash(Kernel(tile)), CORE.format(layer, dtype, "gaussian"))


@pytest.mark.parametrize("regime", ["peaked", "outlier", "large", "integers"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_backward_by_tiles_conforms_where_few_keys_have_all_the_weight(
    dtype: str, regime: str
) -> None:
    assert_conforms(flash(Kernel(16)), CORE.format("", dtype, regime))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kernel", [dense.eager, dense.float32_inside])
def test_autograd_through_plain_operators_conforms(kernel: Any, dtype: str) -> None:
    for layer in ("-sinks", "-cap20"):
        assert_conforms(kernel, CORE.format(layer, dtype, "gaussian"), profile="eager")


def test_a_subject_may_hand_its_gradients_over_itself() -> None:
    assert_conforms(own_backward(Kernel(16)), GROUPED)


def test_torchs_attention_conforms_in_float32() -> None:
    assert_conforms(load_subject("torch-sdpa"), CORE.format("-window8", "fp32", "gaussian"))


# Planted bugs


@pytest.mark.parametrize(
    ("defect", "output"),
    [
        ("sink without its probability", "d_sinks"),
        ("no softmax scale in dq", "d_q"),
        ("a head of the group left out of dk", "d_k"),
    ],
)
def test_a_bug_of_a_kernels_backward_is_found_where_it_is(defect: str, output: str) -> None:
    assert defect in gradient_kernels.DEFECTS
    with pytest.raises(Deviation) as found:
        assert_conforms(flash(Kernel(16, defect)), GROUPED)
    assert worst_output(found.value.record) == output
    beyond = {one.output for one in found.value.record.statistics if one.ratio > 1}
    assert beyond == {output}


def test_delta_in_bfloat16_is_found_where_one_key_has_all_the_weight() -> None:
    bug = flash(Kernel(16, "delta in the tensors' dtype"))
    assert_conforms(flash(Kernel(16)), ONE_KEY)
    with pytest.raises(Deviation, match="d_q: "):
        assert_conforms(bug, ONE_KEY)


@pytest.mark.parametrize(
    ("bug", "layer", "outputs"),
    [
        (
            planted_gradients.rope_turns_forward,
            "rope10000",
            {"d_q_proj", "d_k_proj", "d_hidden_states"},
        ),
        (planted_gradients.bias_over_padding, "qkvbias-obias-rope10000", {"d_v_bias"}),
        (planted_gradients.bias_of_one_sequence, "qkvbias-obias-rope10000", {"d_o_bias"}),
    ],
)
def test_a_bug_of_a_layers_backward_is_found_where_it_is(
    bug: planted_gradients.Backward, layer: str, outputs: set[str]
) -> None:
    case = f"h128-hq4-hkv4-d32-{layer}/cte-bf16-b2-q33_11-backward-gaussian-seed0"
    assert_conforms(load_subject("impl"), case)
    with pytest.raises(Deviation) as found:
        assert_conforms(planted_gradients.broken(bug), case)
    assert {one.output for one in found.value.record.statistics if one.ratio > 1} == outputs


# Cases and subjects


def test_a_backward_case_is_rebuilt_from_its_id() -> None:
    case = parse(GROUPED)
    assert case.workload == Workload(phase="cte", lengths=(33, 33), backward=True)
    assert (case.id, case.suite) == (GROUPED, "gradients")
    assert parse(GROUPED.replace("-backward", "")).workload.backward is False


@pytest.mark.parametrize("tier", ["smoke", "standard", "full"])
def test_impl_claims_every_backward_case(tier: str) -> None:
    impl = load_subject("impl")
    cases = gradient_cases(tier)
    assert {case.dtype for case in cases} == set(DTYPES)
    assert {(case.scope, case.workload.phase) for case in cases} == {
        (scope, phase) for scope in ("core", "layer") for phase in ("cte", "tkg")
    }
    assert all(impl.unsupported(case) is None for case in cases if case.scope == "layer")


@pytest.mark.parametrize(
    ("workload", "says"),
    [
        ({"phase": "tkg", "lengths": (4,), "steps": 2}, "backward goes through one call"),
        ({"phase": "cte", "lengths": (0,)}, "lengths must be at least 1"),
    ],
)
def test_a_workload_that_has_no_backward_is_refused(workload: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Workload(**workload, backward=True)


def test_a_layer_with_adapters_has_no_backward_case() -> None:
    with pytest.raises(UsageError, match="backward needs a layer without adapters"):
        parse("h64-hq4-hkv4-d16-lora2_4/cte-bf16-b2-q9-backward-gaussian-seed0")


def test_padding_has_no_cotangent_and_the_draw_does_not_repeat_the_inputs() -> None:
    case = parse("core-h64-hq2-hkv2-d16/cte-bf16-b2-q9_4-backward-gaussian-seed0")
    inputs = inputs_of(case)
    assert not inputs.d_output[1, :, 4:].any()
    assert inputs.d_output[:, :, :4].all()
    assert (inputs.d_output != inputs.forward.q).any()
    expected = reference(case, inputs).outputs
    assert not expected["d_q"][1, :, 4:].any()
    assert not expected["d_k"][1, :, 4:].any()


def test_a_subject_without_a_backward_claims_no_gradients() -> None:
    plain = Subject(name="plain", function=dense.eager)
    record = judge_case(parse(GROUPED), plain)
    assert (record.verdict, record.reason) == (
        "UNSUPPORTED",
        "plain claims no gradients: it has no backward",
    )
    assert record.features == ("gradients", "gradients: GQA + learned sinks")


def test_an_output_without_the_claimed_gradient_is_malformed_and_a_wrong_claim_is_refused() -> None:
    detached = Subject(
        name="detached", function=lambda call: dense.eager(call).detach(), backward="autograd"
    )
    record = judge_case(parse(GROUPED), detached)
    assert record.verdict == "MALFORMED"
    assert "output must have a gradient" in record.reason
    with pytest.raises(UsageError, match="backward must be 'autograd' or a function, got 'jax'"):
        subject(backward="jax")(dense.eager)


def test_a_gradient_that_is_missing_or_of_another_shape_is_malformed() -> None:
    def only_q(call: CoreCall, d_output: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"q": torch.zeros_like(call.q)}

    def wide(call: CoreCall, d_output: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"q": torch.zeros_like(call.q).float(), "k": call.k, "v": call.v}

    for backward, says in ((only_q, "gradient named k, got none"), (wide, "must have dtype")):
        mine = Subject(name="mine", function=dense.eager, backward=backward)
        record = judge_case(parse(GROUPED), mine)
        assert record.verdict == "MALFORMED"
        assert says in record.reason


def test_a_tensor_that_the_output_does_not_depend_on_has_a_gradient_of_zero() -> None:
    case = parse(GROUPED)
    call = case_inputs(case)
    assert isinstance(call, GradientCall)
    mine = Subject(name="mine", function=lambda c: c.q * c.sinks.mean(), backward="autograd")
    found = gradients_of(mine, call)
    assert list(found) == list(gradient_names(case))
    assert not found["k"].any()
    assert torch.equal(found["q"], call.d_output * call.forward.sinks.mean())


def test_gradients_computed_elsewhere_are_judged_from_a_file_and_in_memory(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    case = parse(GROUPED)
    export_case(case, tmp_path / "case.safetensors")
    given = load_file(tmp_path / "case.safetensors")
    call = case_inputs(case)
    assert torch.equal(given["d_output"], call.d_output)
    assert torch.equal(given["forward.q"], call.forward.q)
    found = gradients_of(flash(Kernel(16)), call)
    outputs = {f"d_{name}": gradient for name, gradient in found.items()}
    save_file(outputs, tmp_path / "out.safetensors", {"attn_conformance_case": case.id})
    again, stored = subject_from_file(tmp_path / "out.safetensors", case=None, profile="flash")
    assert judge_case(again, stored).verdict == "CONFORMS"
    assert judge_output(found, case, profile="flash").verdict == "CONFORMS"


def test_a_repeated_run_changes_no_bit() -> None:
    record = judge_case(parse(GROUPED), flash(Kernel(16)), exact_rules=True)
    assert record.verdict == "CONFORMS"
    assert {s.name for s in record.statistics if s.name.startswith("exact: ")} == {
        "exact: repeated run"
    }


def test_every_backward_case_of_a_published_layer_can_be_named() -> None:
    case = parse("gpt-oss-20b.sliding/cte-bf16-h256-b1-q9-backward-gaussian-seed0")
    assert isinstance(case, Case)
    assert "sinks" in gradient_names(case)


def test_an_output_in_place_of_gradients_is_malformed() -> None:
    record = judge_output(torch.zeros(1), GROUPED, profile="flash")
    assert record.verdict == "MALFORMED"
    assert "a backward must return a mapping, got Tensor" in record.reason
