"""What a user asks for becomes a list of cases, or one sentence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from conformance.errors import UsageError
from conformance.matrix import cases_for, preset_cases
from conformance.selection import select_cases
from conformance.subjects import Subject, load_subject

IMPL, SDPA = load_subject("impl"), load_subject("torch-sdpa")
GOOD = "h64-hq4-hkv2-d16/cte-bf16-b1-q9-gaussian-seed0"


def test_subject_of_a_layer_gets_features_and_presets_and_a_kernel_the_core() -> None:
    suites = ("features", "serving", "gradients", "presets")
    layers = [case for suite in suites for case in cases_for("smoke", suite)]
    layers = [case for case in layers if case.scope == "layer"]
    assert select_cases(IMPL) == layers
    asked_once = replace(IMPL, serves=False)
    assert select_cases(asked_once) == [case for case in layers if case.suite != "serving"]
    forward_only = replace(IMPL, backward=None)
    assert select_cases(forward_only) == [case for case in layers if case.suite != "gradients"]
    assert select_cases(replace(SDPA, backward=None)) == cases_for("smoke", "core")


@pytest.mark.parametrize("subject", [IMPL, SDPA], ids=["layer", "core"])
def test_gradients_are_those_of_the_subjects_scope(subject: Subject) -> None:
    every = cases_for("smoke", "gradients")
    fitting = [case for case in every if case.scope == subject.scope]
    assert 0 < len(fitting) < len(every)
    assert select_cases(subject, suites=("gradients",)) == fitting
    assert [case for case in select_cases(subject) if case.suite == "gradients"] == fitting


def test_named_suites_are_taken_in_their_order() -> None:
    found = select_cases(IMPL, suites=("presets", "core"))
    assert found == cases_for("smoke", "presets") + cases_for("smoke", "core")


def test_named_cases_and_presets_are_taken_once_each() -> None:
    other = GOOD.replace("seed0", "seed1")
    assert [case.id for case in select_cases(IMPL, ids=(other, GOOD, other))] == [other, GOOD]
    once = preset_cases("standard", ["qwen3-8b"])
    assert select_cases(IMPL, tier="standard", presets=("qwen3-8b", "qwen3-8b")) == once


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"ids": (GOOD,), "presets": ("qwen3-8b",)}, "exclude each other"),
        ({"ids": (GOOD,), "model": "smollm2"}, "exclude each other"),
        ({"presets": ("qwen3-8b",), "suites": ("core",)}, "suite cannot be combined"),
        ({"tier": "huge"}, "tier must be one of"),
        ({"suites": ("speed",)}, "suite must be one of"),
        ({"presets": ("qwen9",)}, "name must be that of a preset, got 'qwen9'"),
        ({"model": "gpt2"}, "model must be one of smollm2, got 'gpt2'"),
        ({"ids": ("gpt2",)}, "case must be '<layer>/<workload>'"),
    ],
)
def test_what_does_not_exist_or_fit_together_is_refused(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        select_cases(IMPL, **asked)
