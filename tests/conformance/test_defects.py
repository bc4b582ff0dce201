"""Known bugs are what they say, equivalent rewrites pass, and the kernel beneath is golden."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch

from conformance.benchmarks.rules_trials import Unchanged
from conformance.case_ids import parse
from conformance.cases import Case
from conformance.defects import CONTROLS, DEFECTS, Defect, Kernel, problem_of
from conformance.expected import reference
from conformance.variants import VARIANTS
from conformance.variants.judged import JudgedCase, prepare

CASES = [
    "core-h256-hq4-hkv2-d64-sinks-window64/cte-bf16-b1-q300-gaussian-seed0",
    "core-h256-hq4-hkv2-d64-cap4/cte-fp16-b1-q90-peaked-seed0",
    "core-h256-hq4-hkv2-d64-chunk48/cte-bf16-b2-q150_70-gaussian-seed0",
    "core-h256-hq4-hkv2-d64/cte-fp32-b1-q40-prior90-gaussian-seed0",
    "core-h512-hq8-hkv2-d64-sinks-window32/tkg-bf16-b2-kv200_90-gaussian-seed0",
    "core-h448-hq7-hkv1-d64/tkg-fp32-b2-kv33_20-steps3-gaussian-seed0",
]
TOO_SMALL_FOR_THESE = {"scale-0.03-percent", "sink-plus-0.004", "partials-narrow"}
"""Defects so small that only longer outputs than these show them."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@lru_cache(maxsize=len(CASES))
def judged(case_id: str) -> JudgedCase:
    return prepare(parse(case_id))


def cases_of(defect: Defect) -> list[JudgedCase]:
    return [one for one in map(judged, CASES) if defect.applies(one.case)]


def test_ids_are_unique_and_titles_are_sentences() -> None:
    known = [*DEFECTS, *CONTROLS]
    assert len({one.id for one in known}) == len(known)
    assert all(one.title.endswith(".") and one.source for one in known)


def assert_agrees(got: np.ndarray, want: np.ndarray, one: JudgedCase) -> None:
    """Compare two float64 computations of a case to what their roundings can make of it.

    To first order a weight errs, relatively, by at most twice its score's error, of `head_dim + 3`
    roundings of a value not above `softmax_scale |q| |k|` (Cauchy-Schwarz), and by those of exp, of
    a sum over the keys and of the division; its product with a value sums over the keys again.
    """
    q, k, v = one.inputs.q, one.inputs.k, one.inputs.v
    longest = (float(np.linalg.norm(x, axis=-1).max()) for x in (q, k))
    score = one.case.config.softmax_scale * float(np.prod(list(longest)))
    roundings = 2 * (q.shape[-1] + 3) * score + 2 * k.shape[2] + 8
    bound = 2 * roundings * 2.0**-53 * float(np.abs(v).max())
    assert float(np.abs(got - want).max()) <= bound


@pytest.mark.parametrize("case_id", CASES)
def test_the_kernel_beneath_is_golden_without_rounding(case_id: str) -> None:
    one = judged(case_id)
    exact = Kernel()(problem_of(one.case, one.inputs, dtype="float64"))
    assert_agrees(one.used(exact), one.used(one.golden), one)


def test_the_comparison_without_rounding_sees_float32() -> None:
    one = judged(CASES[0])
    rounded = one.golden.astype(np.float32).astype(np.float64)
    with pytest.raises(AssertionError):
        assert_agrees(one.used(rounded), one.used(one.golden), one)


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda one: one.id)
def test_each_defect_changes_the_output_of_some_case(defect: Defect) -> None:
    assert any(
        Unchanged(one).differs_from(defect, defect.run(problem_of(one.case, one.inputs)))
        for one in cases_of(defect)
    )


@pytest.mark.parametrize(
    "defect", [one for one in DEFECTS if one.id not in TOO_SMALL_FOR_THESE], ids=lambda one: one.id
)
def test_the_judge_rejects_each_defect_on_some_case(defect: Defect) -> None:
    outputs = ((one, defect.run(problem_of(one.case, one.inputs))) for one in cases_of(defect))
    assert any(not one.judge(output, "flash").conforms for one, output in outputs)


@pytest.mark.parametrize("control", CONTROLS, ids=lambda one: one.id)
def test_an_equivalent_rewrite_is_never_flagged(control: Defect) -> None:
    cases = cases_of(control)
    assert cases
    for one in cases:
        output = control.run(problem_of(one.case, one.inputs))
        assert one.judge(output, "flash").conforms
        exact = control.run(problem_of(one.case, one.inputs, dtype="float64"))
        assert_agrees(one.used(exact), one.used(one.golden), one)


def _golden_of(case: Case, **changes: object) -> np.ndarray:
    """Golden on a case's own inputs under another configuration."""
    one = judged(case.id)
    other = replace(case, config=replace(case.config, **changes))
    return one.used(reference(other, one.inputs).outputs["output"])


@pytest.mark.parametrize(
    ("defect_id", "case_id", "changes"),
    [
        ("window-plus-1", CASES[0], {"sliding_window": 65}),
        ("window-minus-1", CASES[0], {"sliding_window": 63}),
        ("decode-ignores-window", CASES[4], {"sliding_window": None}),
        ("scale-1-percent", CASES[3], {"softmax_scale": 1.01 / 8}),
        ("softcap-dropped", CASES[1], {"softcap": None}),
    ],
)
def test_without_rounding_a_defect_is_golden_with_that_configuration(
    defect_id: str, case_id: str, changes: dict[str, object]
) -> None:
    one = judged(case_id)
    (defect,) = (d for d in DEFECTS if d.id == defect_id)
    exact = defect.run(problem_of(one.case, one.inputs, dtype="float64"))
    wanted = _golden_of(one.case, **changes)
    assert_agrees(one.used(exact), wanted, one)


@pytest.mark.parametrize("case_id", CASES)
def test_correct_variants_conform_under_the_profile_they_claim(case_id: str) -> None:
    one = judged(case_id)
    for name, variant in VARIANTS.items():
        if variant.slow or variant.subject.unsupported(one.case) is not None:
            continue
        judgement = one.judge(one.output_of(variant.subject), variant.subject.profile)
        assert judgement.conforms, f"{name}: {judgement.reason}"
