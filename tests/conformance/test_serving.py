"""A served layer is judged call by call, and everything it needs is in its call."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_server import GoldenServer, golden_server
from safetensors.torch import load_file, save_file

from conformance.case_ids import parse
from conformance.cases import Case
from conformance.exchange import export_case, subject_from_file
from conformance.runner import judge_case
from conformance.serve_expected import ServeGolden
from conformance.serve_inputs import draw_serve
from conformance.serve_matrix import serving_cases
from conformance.subjects import ServeCall, ServeOutput, Subject, Unsupported
from golden import FORMATS, Array, Capture, Observer

SERVER = Subject(
    name="golden server", function=golden_server, scope="layer", profile="native", serves=True
)
CASE = parse(
    "h64-hq4-hkv2-d16-rope10000/serve-bf16-b2-kv0-contiguous-prompt9_5.decode2.draft3keep1_2"
    ".decode1-gaussian-seed0"
)
LENGTHY = 10_000
"""Tokens cached from which on a case is left to the command line: seconds each."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def short_cases() -> list[Case]:
    """Every other schedule of the standard tier, its dtype by turns."""
    drawn = [case for case in serving_cases("standard") if case.regime == "gaussian"]
    by_turns = [case for number, case in enumerate(drawn) if number % 3 == number // 3 % 3]
    return [case for case in by_turns if max(case.workload.lengths) < LENGTHY][::2]


@pytest.mark.parametrize("case", short_cases(), ids=lambda case: case.id)
def test_layer_written_from_the_call_alone_conforms(case: Case) -> None:
    record = judge_case(case, SERVER)
    assert record.verdict == "CONFORMS", record.reason
    holds_nothing = case.config.sliding_window == 1 and "rolling cache" in case.features
    assert record.vacuous == (("k_cache", "v_cache") if holds_nothing else ())


def test_smoke_and_standard_tier_hold_every_cache_and_way_of_calling() -> None:
    named = {name for case in serving_cases("standard") for name in case.features}
    assert named >= {
        "contiguous cache",
        "transposed cache",
        "rolling cache",
        "chunk cache",
        "paged cache",
        "core-sharded cache",
        "float8 cache",
        "int8 cache",
        "prefix prefill",
        "windowed encoding",
        "speculation",
        "tree speculation",
        "continuous batching",
        "left padding",
        "packed prefill",
        "LoRA",
        "M-RoPE",
        "fused residual",
    }
    assert set(serving_cases("smoke")) < set(serving_cases("standard"))


def test_report_counts_a_schedule_in_the_row_of_each_of_its_features() -> None:
    record = judge_case(CASE, SERVER)
    assert record.features == ("GQA", "RoPE half", "contiguous cache", "speculation")
    assert (record.suite, record.phase) == ("serving", "serving")
    outputs = {statistic.output for statistic in record.statistics}
    assert outputs == {"1.prompt", "2.decode", "3.draft", "4.decode", "k_cache", "v_cache"}


def test_layer_that_does_not_serve_is_reported_as_unsupported() -> None:
    record = judge_case(CASE, replace(SERVER, serves=False))
    assert record.verdict == "UNSUPPORTED"
    assert "takes no ServeCall" in record.reason

    def refuses(call: ServeCall) -> ServeOutput:
        raise Unsupported("no drafts")

    record = judge_case(CASE, replace(SERVER, function=refuses))
    assert (record.verdict, record.reason) == ("UNSUPPORTED", "no drafts")


def changed(output: ServeOutput, **fields: Any) -> ServeOutput:
    return replace(output, **fields)


MALFORMED = {
    "no ServeOutput": (lambda o: o.outputs[0], "wants a ServeOutput, got Tensor"),
    "a step missing": (
        lambda o: changed(o, outputs=o.outputs[:-1]),
        "one per step, 5 of them, got 4",
    ),
    "a step's shape": (
        lambda o: changed(o, outputs=[o.outputs[0][:, :-1], *o.outputs[1:]]),
        "outputs[0] must have shape (2, 9, 64), got (2, 8, 64)",
    ),
    "a cache's dtype": (
        lambda o: changed(o, v_cache=o.v_cache.float()),
        "v_cache must have dtype bfloat16, got float32",
    ),
    "NaN in a decoded token": (
        lambda o: changed(o, outputs=[*o.outputs[:-1], o.outputs[-1] * float("nan")]),
        "4.decode[0, 0, 0] is nan",
    ),
}


@pytest.mark.parametrize(("change", "says"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_answer_is_told_in_one_sentence(change: Any, says: str) -> None:
    subject = replace(SERVER, function=lambda call: change(golden_server(call)))
    record = judge_case(CASE, subject)
    assert record.verdict == "MALFORMED"
    assert says in record.reason


def test_padding_and_positions_that_the_cache_does_not_hold_may_be_anything() -> None:
    def scribbled(call: ServeCall) -> ServeOutput:
        found = GoldenServer(call).serve()
        for step, output in zip(call.steps, found.outputs, strict=True):
            output[step.position_ids < 0] = float("nan")
        found.k_cache[0, :, -1] = float("nan")
        return found

    assert judge_case(CASE, replace(SERVER, function=scribbled)).verdict == "CONFORMS"


@pytest.mark.parametrize(
    ("cache", "schedule"),
    [
        ("paged4", "packed5_9at2_0.decode2at0_x_2.prompt4at2new.decode1"),
        ("contiguous_e4m3", "prompt9.decode2"),
    ],
    ids=["sequences", "codes"],
)
def test_exact_rules_of_a_schedule_hold(cache: str, schedule: str) -> None:
    case = parse(f"h64-hq4-hkv2-d16-rope10000/serve-fp32-b3-kv0-{cache}-{schedule}-gaussian-seed0")
    record = judge_case(case, SERVER, exact_rules=True)
    assert record.verdict == "CONFORMS", record.reason
    rules = {s.name for s in record.statistics if s.name.startswith("exact: ")}
    assert rules >= {"exact: repeated run", "exact: other strides", "exact: batch mates"}
    assert ("exact: masked values" in rules) == (cache == "paged4")


def test_runs_that_round_move_stored_codes_by_four_errors() -> None:
    """A key nearer to a tie between two codes than that flips, one further away does not."""
    case = parse(CASE.id.replace("contiguous", "contiguous_e4m3").replace("bf16", "fp32"))
    inputs = draw_serve(case)
    served, last = ServeGolden(case, inputs), Capture(frozenset({"k_cache"}))
    served.evaluate(observe=last)
    keys = last.values["k_cache"]  # of the last step, one token a row
    code = FORMATS["float8_e4m3fn"]
    stored = code.nearest(keys)
    above = code.nearest(stored + 0.75 * code.ulp(stored))
    distance = (stored + above) / 2 - keys
    place = np.unravel_index(np.argmin(np.where(distance > 0, distance, np.inf)), keys.shape)

    def nudged(share: float) -> Observer:
        def observe(stage: str, value: Array, accumulation: object = None, /) -> Array:
            if stage != "k_cache" or value.shape != keys.shape or not np.array_equal(value, keys):
                return value
            moved = value.copy()
            moved[place] += share * distance[place]
            return moved

        return observe

    def moved(share: float) -> int:
        found = served.evaluate(observe=nudged(share))["k_cache"]
        return int(np.count_nonzero(found != served.exact["k_cache"]))

    assert (moved(0.2), moved(0.3)) == (0, 1)


def test_schedule_goes_through_files(tmp_path: Path) -> None:
    case = parse(CASE.id.replace("contiguous", "paged4_e4m3head"))
    sent, answered = tmp_path / "case.safetensors", tmp_path / "answer.safetensors"
    export_case(case, sent)
    names = load_file(sent).keys()
    assert {
        "weights.q_proj",
        "steps.0.hidden_states",
        "steps.3.active_mask",
        "block_tables",
    } <= names
    assert {"keys_as.scale", "steps.4.kept"} <= names

    def answering(call: ServeCall) -> ServeOutput:
        found = GoldenServer(call).serve()
        tensors = {f"outputs.{n}": output.contiguous() for n, output in enumerate(found.outputs)}
        tensors |= {"k_cache": found.k_cache, "v_cache": found.v_cache}
        save_file(tensors, answered, {"attn_conformance_case": case.id})
        return found

    judge_case(case, replace(SERVER, function=answering))
    found, subject = subject_from_file(answered, case=None, profile="native")
    assert found == case
    assert judge_case(case, subject).verdict == "CONFORMS"
