"""Score tests: small errors of parameters are found and named, correct kernels are not flagged."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import variants
from scipy import stats
from torch import Tensor

from conformance.case_ids import parse
from conformance.cases import Case, Workload
from conformance.runner import judge_case
from conformance.score_tests import ScoreTest, null_spread
from conformance.subjects import CoreCall, LayerCall, LayerOutput, Subject
from conformance.subjects.impl import attention_layer
from conformance.variants import dense, streamed
from golden import AttentionConfig, QKNorm, RopeConfig
from reports.records import CaseRecord, Statistic

FLASH = variants.CORES["flash, tile 128"].function
SINKS = AttentionConfig(
    hidden_size=256,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=64,
    learned_sinks_size=1,
)
PROMPT = Workload(phase="cte", lengths=(512,))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def scaled(factor: float) -> variants.Kernel:
    return lambda call: FLASH(replace(call, softmax_scale=call.softmax_scale * factor))


def one_sink_more(call: CoreCall) -> Tensor:
    assert call.sinks is not None
    sinks = call.sinks.float().clone()
    sinks[2] += 0.01
    return FLASH(replace(call, sinks=sinks))


def sigmoid_sink(call: CoreCall) -> Tensor:
    """The sink as a gate on the output without it: o * sigmoid(logsumexp - sink)."""
    scores = dense.masked_scores(call, torch.float32)
    mixed, total, _ = streamed.attend_tiles(call, 128)
    gate = torch.sigmoid(scores.logsumexp(-1, keepdim=True) - dense.sink_logits(call, scores.dtype))
    return (mixed / total * gate).to(call.q.dtype)


def truncated(call: CoreCall) -> Tensor:
    """The output cut to bfloat16 instead of rounded."""
    output = FLASH(replace(call, q=call.q.float(), k=call.k.float(), v=call.v.float()))
    return (output.view(torch.int32) & -(1 << 16)).view(torch.float32).bfloat16()


KERNELS: dict[str, variants.Kernel] = {
    **{f"flash, tile {tile}": streamed.flash(tile) for tile in (32, 64, 128, 256, 512)},
    "float64 inside": dense.float64_inside,
    "sigmoid-form sink": sigmoid_sink,
    "scale * 1.0003": scaled(1.0003),
    "scale / 1.0003": scaled(1 / 1.0003),
    "sink + 0.01": one_sink_more,
    "truncated": truncated,
}
WRONG = {
    "scale * 1.0003": "score: softmax scale",
    "scale / 1.0003": "score: softmax scale",
    "sink + 0.01": "score: sink of head 2",
    "truncated": "score: shift towards zero",
}


@cache
def judged(seed: int) -> dict[str, CaseRecord]:
    case = Case(config=SINKS, workload=PROMPT, dtype="bfloat16", scope="core", seed=seed)
    with variants.shared_work():
        return {
            name: judge_case(case, Subject(name=name, function=function, profile="flash"))
            for name, function in KERNELS.items()
        }


def exceeded(record: CaseRecord) -> dict[str, Statistic]:
    return {s.name: s for s in record.statistics if s.ratio > 1}


@pytest.mark.parametrize("seed", range(4))
def test_small_errors_are_found_and_named_in_every_seed_and_rewrites_are_not(seed: int) -> None:
    for name, record in judged(seed).items():
        if name in WRONG:
            assert record.verdict == "DEVIATES", name
            assert WRONG[name] in exceeded(record), name
        else:
            assert record.verdict == "CONFORMS", f"{name}: {record.reason}"


def test_derivation_tells_the_size_of_the_error() -> None:
    found = judged(0)
    scale = exceeded(found["scale * 1.0003"])["score: softmax scale"]
    # Where little moves an element before it is rounded, rounding holds back part of a shift, and
    # such elements weigh most: estimates are low by up to a fifth, never by their sign.
    estimate = float(scale.derivation.split("off by ")[1].split("%")[0])
    assert estimate == pytest.approx(0.03, rel=0.2)
    sink = exceeded(found["sink + 0.01"])["score: sink of head 2"]
    assert "logit" in sink.derivation
    estimate = float(sink.derivation.split("off by ")[1].split(" logit")[0])
    assert estimate == pytest.approx(0.01, rel=0.2)
    cut = exceeded(found["truncated"])["score: shift towards zero"]
    estimate = float(cut.derivation.split("off by ")[1].split(" ulp")[0])
    assert estimate == pytest.approx(0.5, rel=0.2)


def test_power_is_recorded_and_smaller_than_what_is_asked_for() -> None:
    power = judged(0)["flash, tile 64"].power
    assert power["softmax scale [%]"] < 0.03
    assert all(power[f"sink of head {head} [logit]"] < 0.01 for head in range(4))
    assert power["shift towards zero [ulp]"] < 0.5


LAYER = AttentionConfig(
    hidden_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    qkv_bias=True,
    o_bias=True,
    rope=RopeConfig(),
    qk_norm=QKNorm(eps=1e-2),
    softcap=10.0,
    learned_sinks_size=1,
)
LAYER_CASE = Case(config=LAYER, workload=Workload(phase="cte", lengths=(97, 97)), dtype="bfloat16")


def planted(parameter: str, size: float) -> Subject:
    """Return `impl` with a parameter off by `size`, in the unit of its direction."""

    def run(call: LayerCall) -> LayerOutput:
        config, weights, grown = call.config, dict(call.weights), 1 + size / 100
        assert config.rope is not None
        assert config.qk_norm is not None
        assert config.softcap is not None
        changes: dict[str, Any] = {
            "softmax scale [%]": {"softmax_scale": config.softmax_scale * grown},
            "softcap [%]": {"softcap": config.softcap * grown},
            "RoPE theta [%]": {"rope": replace(config.rope, theta=config.rope.theta * grown)},
            "norm epsilon [%]": {
                "qk_norm": replace(config.qk_norm, eps=config.qk_norm.eps * grown)
            },
        }
        return attention_layer(
            replace(call, config=replace(config, **changes[parameter]), weights=weights)
        )

    return Subject(name=parameter, function=run, scope="layer", profile="native")


@pytest.mark.parametrize(
    "parameter", ["softmax scale [%]", "softcap [%]", "RoPE theta [%]", "norm epsilon [%]"]
)
def test_parameter_of_a_layer_is_found_at_twice_its_stated_power(parameter: str) -> None:
    with variants.shared_work():
        right = judge_case(LAYER_CASE, planted(parameter, 0.0))
        assert right.verdict == "CONFORMS", right.reason
        wrong = judge_case(LAYER_CASE, planted(parameter, 2 * right.power[parameter]))
    assert f"score: {parameter.partition(' [')[0]}" in exceeded(wrong)


def test_every_parameter_of_a_layer_has_its_direction() -> None:
    power = judge_case(LAYER_CASE, planted("softcap [%]", 0.0)).power
    named = {name.partition(" [")[0] for name in power}
    assert {"softmax scale", "softcap", "RoPE theta", "position offset", "norm epsilon"} <= named
    assert {f"{letter} bias" for letter in "qkvo"} <= named
    assert {f"sink of head {head}" for head in range(4)} <= named


def test_k_bias_without_rope_moves_the_cache_alone() -> None:
    case = parse("h256-hq8-hkv8-d32-qkvbias/cte-bf16-b2-q97-gaussian-seed0")

    def dropped(call: LayerCall) -> LayerOutput:
        """Leave out the K bias, which softmax cancels, but for the cache."""
        without = {**call.weights, "k_bias": torch.zeros_like(call.weights["k_bias"])}
        full = attention_layer(call)
        return replace(full, output=attention_layer(replace(call, weights=without)).output)

    subject = Subject(name="K bias", function=dropped, scope="layer", profile="native")
    record = judge_case(case, subject)
    assert record.verdict == "CONFORMS", record.reason
    biased = {s.output for s in record.statistics if s.name == "score: k bias"}
    assert biased == {"k_cache"}


def limit_of(parts: np.ndarray, *, independent: bool, alpha: float) -> float:
    spread, freedom = null_spread(parts, independent=independent)
    test = ScoreTest(
        name="t",
        unit="",
        output="output",
        part=(),
        weights=np.zeros(1, dtype=np.float32),
        inverse=np.ones(1),
        norm=1.0,
        spread=spread,
        freedom=freedom,
        nearest=0.0,
        slack=0.0,
        runs=len(parts),
    )
    return test.limit(alpha)


@pytest.mark.parametrize("rows", [2, 300])
@pytest.mark.parametrize("shared", [False, True], ids=["independent rows", "one error for all"])
@pytest.mark.parametrize("claimed", [False, True])
def test_false_alarms_of_the_limit_are_as_many_as_asked_for(
    rows: int, shared: bool, claimed: bool
) -> None:
    rng, alpha, cases = np.random.default_rng(rows), 1e-2, 4000
    sizes = rng.exponential(size=rows)
    found = 0
    for _ in range(cases):
        draws = rng.standard_normal((9, 1)) if shared else rng.standard_normal((9, rows))
        parts = draws * sizes
        limit = limit_of(parts[:8], independent=claimed, alpha=alpha)
        found += abs(parts[8].sum()) > limit
    if shared and claimed and rows > 2:
        # A false claim of independence: with errors of all rows equal the 8 draws themselves say
        # so, unless all are below about 26/8 of what independence gives, a chance of P(chi2 < 26 /
        # (ratio of the variances)).
        ratio = sizes.sum() ** 2 / np.square(sizes).sum()
        alpha += float(stats.chi2.cdf(stats.chi2.isf(1e-3, 8) / ratio, 8))
    elif claimed and shared:
        alpha = 1.0  # two rows cannot contradict it
    # a binomial count stays within 4 deviations
    assert found <= alpha * cases + 4 * math.sqrt(alpha * cases)
    if not claimed:
        assert found >= alpha * cases - 4 * math.sqrt(alpha * cases)


def test_rows_that_one_weight_decides_do_not_overflow() -> None:
    # logits of a hundred and more leave rows whose error is 1e-15 of their size and less
    case = parse("core-h256-hq8-hkv8-d32-sinks/cte-bf16-b2-q97-large-seed519")
    record = judge_case(case, variants.CORES["flash, tile 64"])
    assert record.verdict == "CONFORMS", record.reason
    assert all(math.isfinite(s.value) and math.isfinite(s.limit) for s in record.statistics)
