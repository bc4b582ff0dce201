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
from reports.records import CaseRecord

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
    """Its spreads come closer to one, so that a correct layer's 1.03 to 1.09 may exceed them."""

    def spreads() -> list[float]:
        found = judged(CASES[0], ORDERS["as they come"]).statistics
        return [s.ratio for s in found if s.name == "spread" and s.output != "output"]

    with mock.patch.object(conformance.sums, "common_order", return_value=1.0):
        without = spreads()
    assert max(spreads()) < max(without)
    assert max(without) > 0.97
