"""`impl-compiled` and `impl-stablehlo`: one graph a layer, the same judge, one column each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from test_cli import GOOD, refused

import conformance.stablehlo
import impl
from conformance.case_ids import parse
from conformance.cli import main
from conformance.errors import UsageError
from conformance.precision import profile_named
from conformance.runner import call_of, inputs_of, judge_case
from conformance.subjects import LayerCall, Subject, load_subject
from conformance.subjects.impl import run_layer
from conformance.subjects.impl_compiled import CompiledLayers
from reports.records import read_results

# one feature of each kind of operator: gathers, scatters, rotations, tanh, sorting out of rows
LAYERS = ("h64-hq4-hkv2-d16-window5-polar10000", "h64-hq4-hkv2-d16-qkvbias-sinks-cap20-rope10000")
SERVED = (
    "h256-hq8-hkv2-d32-rope10000/"
    "serve-bf16-b2-kv0-paged8-prompt16_9.prompt8_17.decode2-gaussian-seed0"
)
PHASES = ("cte-{}-b2-q9-gaussian-seed0", "tkg-{}-b2-kv9-steps2-gaussian-seed0")


def call(case_id: str) -> LayerCall:
    case = parse(case_id)
    made = call_of(case, inputs_of(case))
    assert isinstance(made, LayerCall)
    return made


class Counting:
    """An eager backend that counts the graphs it was given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        self.graphs += 1
        return graph.forward


def test_cases_that_differ_in_values_alone_share_one_graph() -> None:
    backend = Counting()
    layers = CompiledLayers(backend)
    ids = [f"h64-hq4-hkv2-d16/cte-fp32-b1-q9-{regime}-seed0" for regime in ("gaussian", "large")]
    outputs = [run_layer(call(case_id), layers).output for case_id in ids]
    assert backend.graphs == 1
    assert not torch.equal(*outputs)
    for case_id in (
        "h64-hq4-hkv2-d16/cte-fp32-b1-q10-gaussian-seed0",
        "h64-hq4-hkv2-d16/cte-fp16-b1-q10-gaussian-seed0",
        "h64-hq4-hkv2-d16-window5/cte-fp16-b1-q10-gaussian-seed0",
    ):
        seen = backend.graphs
        run_layer(call(case_id), layers)
        assert backend.graphs == seen + 1


def test_steps_of_a_decode_share_one_graph_and_keep_their_cache() -> None:
    backend = Counting()
    case = parse("h64-hq4-hkv2-d16-rope10000/tkg-fp32-b2-kv9-steps3-gaussian-seed0")
    layers = CompiledLayers(backend)
    subject = Subject(
        name="counted",
        function=lambda given: run_layer(given, layers),
        scope="layer",
        profile="native",
    )
    assert judge_case(case, subject).verdict == "CONFORMS"
    assert backend.graphs == 1


def test_schedules_are_served_by_compiled_layers() -> None:
    backend = Counting()
    record = judge_case(parse(SERVED), served(CompiledLayers(backend).run))
    assert record.verdict == "CONFORMS", record.reason
    assert backend.graphs == 3  # a prompt, a longer one on cached tokens, and all decode steps


def served(function: Any) -> Subject:
    return Subject(name="counted", function=function, scope="layer", profile="native", serves=True)


def test_what_the_module_refuses_in_a_graph_is_unsupported_in_its_own_words() -> None:
    case = parse(
        "h64-hq4-hkv2-d16-chunk8-rope10000/"
        "serve-bf16-b2-kv0-contiguous-prompt9_5.draft3keep1-gaussian-seed0"
    )
    record = judge_case(case, served(CompiledLayers(Counting()).run))
    assert record.verdict == "UNSUPPORTED"
    assert "speculation is not defined across a chunk's end" in record.reason


def test_a_layer_that_leaves_its_graph_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    right = impl.NeuronAttentionBase.forward

    def broken(self: Any, *given: Any, **named: Any) -> Any:
        torch._dynamo.graph_break()
        return right(self, *given, **named)

    monkeypatch.setattr(impl.NeuronAttentionBase, "forward", broken)
    record = judge_case(parse(SERVED), served(CompiledLayers(Counting()).run))
    assert record.verdict == "CRASHED"
    assert "graph_break" in record.traceback


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_stablehlo_conforms(layer: str, phase: str, dtype: str) -> None:
    pytest.importorskip("torch_mlir", reason="the extra stablehlo is not installed")
    subject = load_subject("impl-stablehlo")
    record = judge_case(parse(f"{layer}/{phase.format(dtype)}"), subject, exact_rules=True)
    assert record.verdict == "CONFORMS", record.reason


CAPPED = "h256-hq8-hkv8-d32-cap20/cte-fp32-b2-q97-large-seed0"


def test_stablehlo_conforms_where_large_scores_are_capped() -> None:
    """By XLA's own tanh alone: the subject deviates from what PyTorch's would leave."""
    pytest.importorskip("torch_mlir", reason="the extra stablehlo is not installed")
    claimed = judge_case(parse(CAPPED), load_subject("impl-stablehlo"))
    assert claimed.verdict == "CONFORMS", claimed.reason
    native = judge_case(parse(CAPPED), load_subject("impl-stablehlo", profile="native"))
    spread = {s.name: s.ratio for s in native.statistics if s.output == "output"}["spread"]
    assert spread > 1.0


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        *(("tanh", low, high) for low, high in ((1e-4, 0.1), (0.1, 1.0), (1.0, 4.0), (4.0, 20.0))),
        *(("exp", low, high) for low, high in ((-80.0, -5.0), (-5.0, 0.0))),
    ],
)
def test_xla_computes_functions_as_precisely_as_is_claimed(
    name: str, low: float, high: float
) -> None:
    pytest.importorskip("torch_mlir", reason="the extra stablehlo is not installed")
    x = low + (high - low) * torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    function = getattr(torch, name)
    backend = conformance.stablehlo.StableHLOBackend()
    compiled = torch.compile(lambda x: function(x), backend=backend, fullgraph=True, dynamic=False)
    exact = function(x.double())
    ulp = torch.exp2(exact.abs().log2().floor() - 23)
    errs = ((compiled(x).double() - exact) / ulp).abs()
    stage = {"tanh": "softcap_tanh", "exp": "exp"}[name]
    claim = profile_named("xla-cpu", "float32").function_ulps(stage)
    assert float(errs.max()) <= claim + 0.5
    assert float(errs.square().mean().sqrt()) < (claim**2 / 3 + 1 / 12) ** 0.5


def test_stablehlo_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformance.stablehlo, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"torch-mlir and jax and jaxlib.*\[stablehlo\]"):
        conformance.stablehlo.StableHLOBackend()


def test_command_refuses_stablehlo_where_it_is_missing() -> None:
    if all(conformance.stablehlo.find_spec(name) for name in ("torch_mlir", "jax", "jaxlib")):
        pytest.skip("the extra stablehlo is installed")
    said = refused("run", "--subject", "impl-stablehlo", "--case", GOOD)
    assert said.startswith("subject 'impl-stablehlo': StableHLO needs")


def test_several_subjects_share_a_run_and_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    options = ["--subject", "impl", "--subject", "planted:window_one_more", "-j", "1"]
    window = "h64-hq4-hkv2-d16-window5/cte-bf16-b1-q19-gaussian-seed0"
    done = CliRunner().invoke(main, ["run", *options, "--case", window])
    assert done.exit_code == 1, done.output
    results = read_results(tmp_path / "results.jsonl")
    verdicts = [(case.subject, case.verdict) for case in results.cases]
    assert verdicts == [("impl", "CONFORMS"), ("planted:window_one_more", "DEVIATES")]
    assert results.environment["subject"] == "impl, planted:window_one_more"
    assert results.environment["false_alarm_rate"].endswith("each of 2 cases")
    assert "Conforms: the one case passes" in (tmp_path / "report.html").read_text("utf-8")
