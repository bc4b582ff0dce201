"""Spread pooled by head, KV group and tile; power; and cases that say nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from unittest import mock

import numpy as np
import pytest
import torch
import variants
from torch import Tensor

from conformance import runner
from conformance.case_ids import parse
from conformance.cases import Case, Workload
from conformance.row_groups import row_groups
from conformance.runner import judge_case
from conformance.subjects import CoreCall, Subject
from conformance.variants import streamed
from golden import AttentionConfig
from reports.records import CaseRecord, case_from_dict, case_to_dict

CONFIG = AttentionConfig(hidden_size=512, num_attention_heads=8, num_key_value_heads=2, head_dim=64)
CASE = Case(
    config=CONFIG, workload=Workload(phase="cte", lengths=(600,)), dtype="bfloat16", scope="core"
)
FLASH = variants.CORES["flash, tile 64"].function


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def noisy(part: tuple[slice, ...], ulps: float = 1.5) -> variants.Kernel:
    """Return a kernel that moves a part of its output at random, within so many ulps in all."""

    def kernel(call: CoreCall) -> Tensor:
        output = FLASH(call).float()
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(output.shape, generator=generator) - 0.5
        ulp = torch.exp2(torch.floor(torch.log2(output.abs().clamp(min=1e-30))) - 7)
        output[part] += ulps * (noise * ulp)[part]
        return output.to(call.q.dtype)

    return kernel


HEAD = (slice(None), slice(3, 4))
GROUP = (slice(None), slice(4, 8))
TILE = (slice(None), slice(5, 6), slice(256, 384))


@cache
def judged() -> dict[str, CaseRecord]:
    kernels: dict[str, Callable[[CoreCall], Tensor]] = {
        "right": FLASH,
        **{f"tile {tile}": streamed.flash(tile) for tile in (32, 128, 512)},
        "head": noisy(HEAD),
        "KV group": noisy(GROUP),
        "tile of 128": noisy(TILE, 1.06),
    }
    with variants.shared_work():
        return {
            name: judge_case(CASE, Subject(name=name, function=kernel, profile="flash"))
            for name, kernel in kernels.items()
        }


@pytest.mark.parametrize("name", ["right", "tile 32", "tile 128", "tile 512"])
def test_correct_kernels_pass_every_grouped_spread(name: str) -> None:
    record = judged()[name]
    assert record.verdict == "CONFORMS", record.reason
    names = {s.name for s in record.statistics}
    assert {f"{group} spread" for group in ("head", "KV group", "tile of 128", "tile of 512")} <= (
        names
    )


@pytest.mark.parametrize(
    ("group", "inside"),
    [
        ("head", lambda at: at[1] == 3),
        ("KV group", lambda at: 4 <= at[1] < 8),
        ("tile of 128", lambda at: at[1] == 5 and 256 <= at[2] < 384),
    ],
)
def test_noise_in_one_group_exceeds_its_spread_and_is_located(
    group: str, inside: Callable[[tuple[int, ...]], bool]
) -> None:
    found = {s.name: s for s in judged()[group].statistics}
    statistic = found[f"{group} spread"]
    assert statistic.ratio > 1
    assert inside(statistic.where)


def test_small_group_is_found_where_the_whole_is_not() -> None:
    found = {s.name: s for s in judged()["tile of 128"].statistics}
    assert found["tile of 128 spread"].ratio > 1
    assert found["spread"].ratio <= 1


def test_groups_cut_rows_as_named() -> None:
    groups = {group.name: group for group in row_groups((2, 8, 600), 4)}
    assert groups.keys() == {"head", "KV group", "tile of 128", "tile of 512"}
    values = np.zeros((2, 8, 600))
    values[1, 4:8] = 1.0
    counted = np.ones(values.shape, dtype=np.bool_)
    np.testing.assert_array_equal(groups["KV group"].means(values, counted), [0, 0, 0, 1])
    assert groups["KV group"].first(3, counted) == (1, 4, 0)
    assert len(groups["tile of 128"].means(values, counted)) == 2 * 8 * 5
    counted[0] = False
    assert groups["head"].means(values, counted).tolist() == [0.0] * 4 + [1.0] * 4
    assert groups["head"].first(5, counted) == (1, 5, 0)
    assert [group.name for group in row_groups((1, 1, 100), 1)] == []
    assert [group.name for group in row_groups((2, 300), 1)] == ["tile of 128"]


def test_power_and_vacuous_outputs_survive_the_file_and_old_files_load() -> None:
    record = judged()["right"]
    assert record.power
    assert record.vacuous == ()
    data = case_to_dict(record)
    assert case_from_dict(data) == record
    old = {key: value for key, value in data.items() if key not in ("power", "vacuous")}
    loaded = case_from_dict(old)
    assert (loaded.power, loaded.vacuous) == ({}, ())


def test_case_whose_truth_is_zero_is_vacuous_and_still_conforms() -> None:
    case = parse("core-h64-hq4-hkv2-d16/cte-bf16-b1-q4-gaussian-seed0")
    drawn = runner.inputs_of(case)
    empty = replace(drawn, v=np.zeros_like(drawn.v))
    with mock.patch.object(runner, "inputs_of", return_value=empty):
        record = judge_case(case, Subject(name="flash", function=FLASH, profile="flash"))
    assert record.verdict == "CONFORMS"
    assert record.vacuous == ("output",)
