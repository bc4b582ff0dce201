"""Profiles claim what they say, and refuse what no profile can claim."""

from __future__ import annotations

import re
from typing import Any

import pytest

from conformance.cases import DTYPES
from conformance.errors import UsageError
from conformance.precision import PROFILES, PrecisionProfile, profile_named
from golden import CALL_STAGES, STAGES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_builds_for_every_dtype_and_stores_its_output_there(
    name: str, dtype: str
) -> None:
    profile = profile_named(name, dtype)
    assert profile.name == f"{name}-{dtype}"
    assert profile.reason
    for stage in ("q_product", "k_cache", "v_cache", "attn", "o_proj"):
        assert profile.stores[stage] == dtype
    for stage in ("exp", "denominator", "rope_angles"):
        assert profile.stores[stage] == "float32"


FLOAT8 = {"flash-e4m3": "float8_e4m3fn", "flash-e5m2": "float8_e5m2"}


@pytest.mark.parametrize("name", [name for name in PROFILES if name not in FLOAT8])
def test_in_float32_every_stage_is_stored_in_float32(name: str) -> None:
    stores = profile_named(name, "float32").stores
    assert set(stores.values()) == {"float32"}
    # one division at the end, to the letter: normalised weights are never formed
    left_out = {"weights"} if name == "in-sequence" else set()
    assert stores.keys() == (STAGES.keys() | CALL_STAGES.keys()) - left_out


def test_profiles_differ_in_the_scores_and_in_which_weights_they_round() -> None:
    stores = {name: profile_named(name, "bfloat16").stores for name in PROFILES}
    assert stores["eager"]["scores"] == "bfloat16"
    assert stores["native"]["scores"] == stores["flash"]["scores"] == "float32"
    assert stores["native"]["weights"] == "bfloat16"
    assert "unnormalised_weights" not in stores["native"]
    assert "weights" not in stores["flash"]
    assert stores["flash"]["unnormalised_weights"] == "bfloat16"
    assert stores["sdpa"]["unnormalised_weights"] == stores["sdpa"]["weights"] == "bfloat16"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "stage": ({"stores": {"softmax": "float32"}}, "stores must name stages .* got softmax"),
    "format": ({"stores": {"exp": "float31"}}, "formats must be among .* got float31"),
    "accumulation": ({"accumulation": "int8"}, "formats must be among .* got int8"),
    "block length": ({"block_length": 0}, "block_length .* must be positive"),
    "exp": ({"exp_ulps": -1.0}, "exp_ulps and tanh_ulps not negative, got 384, 4, -1.0 and None"),
    "tanh": ({"tanh_ulps": -1.0}, "exp_ulps and tanh_ulps not negative"),
    "order": ({"order": "random"}, "order must be 'sequence' or empty, got 'random'"),
    "order of float64": (
        {"order": "sequence", "accumulation": "float64"},
        "accumulation must be float32 where an order of sums is claimed, got float64",
    ),
}


@pytest.mark.parametrize(("changes", "says"), REFUSED.values(), ids=REFUSED)
def test_claim_that_makes_no_sense_is_refused(changes: dict[str, Any], says: str) -> None:
    fields: dict[str, Any] = {"name": "mine", "reason": "mine", "stores": {}}
    with pytest.raises(UsageError, match=says):
        PrecisionProfile(**{**fields, **changes})


def test_unknown_profile_is_refused_and_the_known_ones_are_named() -> None:
    known = re.escape(", ".join(PROFILES))
    with pytest.raises(UsageError, match=f"profile must be one of {known}, got 'exact'"):
        profile_named("exact", "bfloat16")


@pytest.mark.parametrize(("name", "form"), FLOAT8.items())
def test_float8_profiles_differ_from_flash_in_their_weights_alone(name: str, form: str) -> None:
    flash = profile_named("flash", "bfloat16").stores
    changed = {k: v for k, v in profile_named(name, "bfloat16").stores.items() if flash[k] != v}
    assert changed == {"unnormalised_weights": form}
