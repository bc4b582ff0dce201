"""Tiers hold what they promise: one feature a row, published geometry, larger tiers hold more."""

from __future__ import annotations

import pytest

from conformance.cases import DTYPES, REGIMES
from conformance.errors import UsageError
from conformance.matrix import cases_for, core_cases, feature_cases, preset_cases
from conformance.presets import PRESETS, PresetError
from conformance.selection import SUITES
from conformance.tiers import TIERS


@pytest.mark.parametrize("suite", ["features", "core"])
def test_larger_tiers_hold_every_case_of_smaller_ones(suite: str) -> None:
    smoke, standard, full = (set(cases_for(tier, suite)) for tier in TIERS)
    assert smoke < standard < full


@pytest.mark.parametrize("suite", ["features", "core"])
def test_smoke_has_every_layer_in_every_dtype_and_standard_in_every_regime(suite: str) -> None:
    for tier, regimes in (("smoke", REGIMES[:1]), ("standard", REGIMES)):
        combinations: dict[object, set[tuple[str, str]]] = {}
        for case in cases_for(tier, suite):
            combinations.setdefault((case.config, case.workload), set()).add(
                (case.dtype, case.regime)
            )
        wanted = {(dtype, regime) for dtype in DTYPES for regime in regimes}
        assert all(found == wanted for found in combinations.values())


def test_every_layer_of_the_features_suite_is_prefilled_and_decoded() -> None:
    phases: dict[object, set[str]] = {}
    for case in feature_cases("smoke"):
        phases.setdefault(case.config, set()).add(case.workload.phase)
    assert all(found == {"cte", "tkg"} for found in phases.values())


def test_features_suite_has_a_row_of_its_own_for_most_features() -> None:
    rows = {case.features for case in feature_cases("smoke")}
    alone = {row[0] for row in rows if len(row) == 1}
    combined = {name for row in rows if len(row) > 1 for name in row}
    # what never stands alone needs another feature to exist: a rotation to share or scale
    assert combined - alone <= {
        "RoPE partial",
        "RoPE Linear",
        "RoPE Llama3",
        "RoPE Yarn",
        "RoPE DynamicNTK",
        "RoPE LongRope",
        "RoPE Proportional",
        "M-RoPE",
        "M-RoPE interleaved",
        "position offset",
        "QK rms norm post-RoPE",
        # and what a row of the batch brings needs rows that differ
        "LoRA",
        "fused RMSNorm",
        "fused residual",
    }


def test_core_suite_asks_for_nothing_outside_the_core() -> None:
    for case in core_cases("full"):
        assert case.scope == "core"
        assert case.config.rope is None
        assert not case.config.qkv_bias


@pytest.mark.parametrize("tier", TIERS)
def test_presets_keep_their_published_geometry_in_every_tier(tier: str) -> None:
    seen = set()
    for case in preset_cases(tier):
        published = PRESETS[case.model].layers[case.layer]
        seen.add((case.model, case.layer))
        for name in (
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "sliding_window",
            "attention_chunk_size",
        ):
            assert getattr(case.config, name) == getattr(published, name)
        if tier != "smoke":
            assert case.config == published
    assert seen == {(name, kind) for name, model in PRESETS.items() for kind in model.layers}


def test_decode_of_a_preset_lies_beyond_its_window_or_across_its_chunk() -> None:
    for case in preset_cases("smoke"):
        work, config = case.workload, case.config
        if work.phase == "tkg" and config.sliding_window is not None:
            assert max(work.lengths) > config.sliding_window
        if work.phase == "tkg" and config.attention_chunk_size is not None:
            last = work.lengths[0] + work.steps - 1
            assert last // config.attention_chunk_size > 0
            assert work.lengths[0] // config.attention_chunk_size == 0


def test_unknown_tier_suite_and_preset_are_refused() -> None:
    with pytest.raises(UsageError, match="tier must be one of smoke, standard, full, got 'huge'"):
        cases_for("huge", "core")
    with pytest.raises(UsageError, match=r"suite must be one of .*, got 'speed'"):
        cases_for("smoke", "speed")
    with pytest.raises(PresetError, match="did you mean"):
        preset_cases("smoke", ["gpt-oss-21b"])
    assert set(SUITES) == {"features", "serving", "core", "gradients", "presets"}
