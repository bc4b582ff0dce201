"""A layer is as correct whichever order its products have their channels in."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

import conformance.sums
from conformance.case_ids import parse
from conformance.runner import judge_case
from conformance.subjects import LayerCall, LayerOutput, Subject
from conformance.subjects.impl import build_module, run_layer
from reports.records import CaseRecord, Statistic

WIDTH = 256
GENERATOR = torch.Generator().manual_seed(5)
ORDERS = {
    "as they come": torch.arange(WIDTH),
    "backwards": torch.arange(WIDTH).flip(0),
    "the first in the middle": torch.arange(WIDTH).roll(WIDTH // 2),
    **{f"shuffled {n}": torch.randperm(WIDTH, generator=GENERATOR) for n in range(3)},
}
CASES = (
    "h256-hq8-hkv8-d32/cte-fp32-b2-q97-outlier-seed0",
    "h256-hq8-hkv2-d32-window33/cte-fp32-b2-q97-outlier-seed1",
    "h256-hq8-hkv8-d32-qkvbias/tkg-fp32-b2-kv80-steps3-gaussian-seed0",
)


def judged(case: str, order: Tensor) -> CaseRecord:
    """Verdict on `impl` where the hidden channels of a call are put in an order."""

    def reordered(call: LayerCall) -> LayerOutput:
        weights = dict(call.weights)
        for name in ("q_proj", "k_proj", "v_proj"):
            weights[name] = weights[name][:, order].contiguous()
        hidden = call.hidden_states[..., order].contiguous()
        return run_layer(replace(call, hidden_states=hidden, weights=weights), build_module)

    subject = Subject(name="reordered", function=reordered, scope="layer", profile="native")
    return judge_case(parse(case), subject)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("case", CASES)
def test_any_order_of_channels_conforms(case: str, order: Tensor) -> None:
    record = judged(case, order)
    assert record.verdict == "CONFORMS", record.reason


def test_a_model_that_draws_an_order_for_each_sum_knows_less_of_a_large_first_channel() -> None:
    """It allows V less than the one order that there is may do to it.

    A first channel eight times as large as the other 255 has 64 of 319 parts of the squares of
    every sum and is in all of its partial sums, where half of them are expected.
    """
    of_order = (1.0 + 64 / 319) ** 0.5

    def spreads() -> dict[str, Statistic]:
        found = judged(CASES[0], ORDERS["as they come"]).statistics
        return {s.output: s for s in found if s.name == "spread" and s.output != "output"}

    with mock.patch.object(conformance.sums, "common_order", return_value=1.0):
        without = spreads()
    within = spreads()
    assert max(s.ratio for s in within.values()) < max(s.ratio for s in without.values())
    assert without["v_cache"].limit < of_order < within["v_cache"].limit
