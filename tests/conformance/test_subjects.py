"""Subjects are found by name, and their claims are checked when they are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import planted
import pytest

from conformance.case_ids import parse
from conformance.errors import UsageError
from conformance.matrix import cases_for
from conformance.subjects import BUILT_IN, Subject, load_subject, subject
from conformance.subjects.impl import attention_layer
from conformance.tiers import TIERS


def test_built_in_subjects_load_with_their_claims() -> None:
    loaded = {name: load_subject(name) for name in BUILT_IN if name != "impl-stablehlo"}
    assert (loaded["impl"].scope, loaded["impl"].profile) == ("layer", "native")
    assert loaded["impl"].function is attention_layer
    assert (loaded["torch-sdpa"].scope, loaded["torch-sdpa"].profile) == ("core", "sdpa")
    assert (loaded["impl-compiled"].scope, loaded["impl-compiled"].profile) == ("layer", "native")
    assert all(subject.name == name for name, subject in loaded.items())


def test_module_and_callable_load_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernel_of_mine.py").write_text(
        "class Kernels:\n    @staticmethod\n    def attend(call):\n        return call.q\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    loaded = load_subject("kernel_of_mine:Kernels.attend")
    assert loaded.name == "kernel_of_mine:Kernels.attend"
    # a bare callable takes the core, claims plain PyTorch, and takes every case
    assert (loaded.scope, loaded.profile) == ("core", "eager")
    core = parse("core-h64-hq4-hkv2-d16/cte-bf16-b1-q9-gaussian-seed0")
    assert loaded.unsupported(core) is None


def test_profile_may_be_replaced_and_the_rest_of_the_claim_stays() -> None:
    loaded = load_subject("planted:zeros", profile="flash")
    assert (loaded.scope, loaded.profile) == ("layer", "flash")
    assert loaded.function is planted.zeros


REFUSED = {
    "no colon": ("kernel", "torch-sdpa or 'module:callable', got 'kernel'"),
    "no module": (":kernel", "must be one of"),
    "no callable": ("planted:", "must be one of"),
    "unknown module": ("no_such_module:kernel", "does not import: ModuleNotFoundError"),
    "unknown attribute": ("planted:nothing", "has no callable 'nothing'"),
    "not callable": ("planted:BUGS", "has no callable 'BUGS'"),
    "too deep": ("planted:zeros.inner", "has no callable 'zeros.inner'"),
}


@pytest.mark.parametrize(("name", "says"), REFUSED.values(), ids=REFUSED)
def test_name_that_leads_to_no_callable_is_refused(name: str, says: str) -> None:
    with pytest.raises(UsageError) as error:
        load_subject(name)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_module_that_raises_on_import_is_refused_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernel_that_breaks.py").write_text("1 / 0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match="does not import: ZeroDivisionError: division by zero"):
        load_subject("kernel_that_breaks:kernel")


@pytest.mark.parametrize(
    ("claim", "says"),
    [
        ({"scope": "model"}, "scope must be 'core' or 'layer', got 'model'"),
        ({"profile": "exact"}, "profile must be one of .*, got 'exact'"),
    ],
)
def test_false_claim_is_refused_where_it_is_made(claim: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        subject(**claim)(lambda call: call)
    with pytest.raises(UsageError, match=says):
        Subject(name="mine", function=lambda call: call, **claim)


def test_impl_claims_every_case_of_every_tier() -> None:
    loaded = load_subject("impl")
    for tier in TIERS:
        for suite in ("features", "serving", "presets"):
            for case in cases_for(tier, suite):
                assert loaded.unsupported(case) is None, case.id


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ("sinks-chunk8", "refuses learned sinks with chunked attention"),
        ("rope10000-dynamic_8_64_128", "by each row's own length"),
        ("temp_8192_0.1-rope10000", "temperature of layers without RoPE only"),
    ],
)
def test_impl_says_what_it_does_not_claim(layer: str, reason: str) -> None:
    case = parse(f"h64-hq4-hkv2-d16-{layer}/cte-bf16-b1-q9-gaussian-seed0")
    said = load_subject("impl").unsupported(case)
    assert said is not None
    assert reason in said
