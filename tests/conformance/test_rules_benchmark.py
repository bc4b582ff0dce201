"""Peers' rules accept and reject where their published thresholds say, and the benchmark counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conformance.benchmarks import rules, rules_peers
from conformance.benchmarks.rules_peers import PEERS
from conformance.benchmarks.rules_record import Rule, Trial
from conformance.benchmarks.rules_report import RULES, figures, tallies
from conformance.benchmarks.rules_trials import OURS, Verdicts
from conformance.case_ids import parse
from conformance.cases import Case

SMALL = "core-h128-hq4-hkv2-d32-sinks-window8/cte-bf16-b1-q24-gaussian-seed0"


def trial(error: float, *, baseline: float = 0.0, dtype: str = "bfloat16") -> Trial:
    """A trial whose golden is all ones, and one element of output and baseline off."""
    golden = np.ones((50, 4))
    output, peer = golden.copy(), golden.copy()
    output[0, 0] += error
    peer[0, 0] += baseline
    return Trial(output=output, golden=golden, baseline=peer, dtype=dtype, softcapped=False)


@pytest.mark.parametrize("rule", PEERS, ids=lambda rule: rule.name)
def test_every_rule_accepts_the_truth_and_rejects_nan_and_zeros(rule: Rule) -> None:
    exact = trial(0.0, baseline=2.0**-8)
    assert rule.accepts(exact)
    assert not rule.accepts(replace(exact, output=np.full_like(exact.golden, np.nan)))
    assert not rule.accepts(replace(exact, output=np.zeros_like(exact.golden)))


@pytest.mark.parametrize(
    ("rule", "limit", "baseline"),
    [
        (rules_peers.torch_defaults, 1.6e-2 + 1e-5, 0.0),
        (rules_peers.vllm_defaults, 1.6e-2 + 1e-3, 0.0),
        (rules_peers.one_percent, 2e-2, 0.0),
        (rules_peers.flash_attention_2, 0.02, 0.01),
        (rules_peers.pytorch_sdpa, 0.04, 0.01),
        (rules_peers.nki_max_all_close, 2e-2 + 1e-5, 0.0),
        (rules_peers.llama_cpp_nmse, (5e-4 * 200) ** 0.5, 0.0),
        (rules_peers.torchao_sqnr, 200**0.5 * 10**-1.25, 0.0),
    ],
)
def test_each_threshold_lies_where_its_source_puts_it(
    rule: object, limit: float, baseline: float
) -> None:
    assert callable(rule)
    assert rule(trial(limit * 0.999, baseline=baseline))
    assert not rule(trial(limit * 1.001, baseline=baseline))


def test_flash_attention_3_allows_the_noise_of_an_addition_on_top() -> None:
    assert not rules_peers.flash_attention_2(trial(0.021, baseline=0.01))
    assert rules_peers.flash_attention_3(trial(0.021, baseline=0.01))


def test_98_percent_forgives_one_element_in_a_hundred() -> None:
    assert rules_peers.most_within(trial(100.0))


def test_the_three_way_rule_forgives_errors_no_wider_than_the_cpus() -> None:
    rng = np.random.default_rng(0)
    golden, noise = rng.standard_normal((64, 64)), rng.standard_normal((64, 64)) / 100
    same = Trial(
        output=golden + noise,
        golden=golden,
        baseline=golden + noise[::-1],
        dtype="bfloat16",
        softcapped=False,
    )
    assert rules_peers.neuron_three_way(same)
    assert not rules_peers.neuron_three_way(replace(same, output=golden + 2 * noise))


def test_tallies_count_alarms_on_correct_kernels_and_misses_of_visible_defects() -> None:
    yes, no = dict.fromkeys(RULES, True), dict.fromkeys(RULES, False)
    found = [
        Verdicts("case", "bfloat16", "eager", "correct", no),
        Verdicts("case", "bfloat16", "eager", "correct", yes),
        Verdicts("case", "bfloat16", "zeros", "defect", yes),
        Verdicts("case", "bfloat16", "sink-dropped", "invisible", yes),
    ]
    for tally in tallies(found):
        assert (tally.alarms, tally.correct, tally.misses, tally.defects) == (1, 2, 1, 1)


def test_run_writes_figures_and_the_measured_part_of_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_case(*, quick: bool) -> list[Case]:
        assert quick
        return [parse(SMALL)]

    monkeypatch.setattr(rules, "rules_cases", one_case)
    page, json_path = tmp_path / "rules.md", tmp_path / "rules.json"
    page.write_text(
        "# Rules\n\n<!-- measured -->\nstale figures\n<!-- end of measured -->\n\nAfter.\n"
    )
    rules.run(json_path, True, page=page, jobs=1)
    text = page.read_text()
    assert text.startswith("# Rules\n")
    assert text.endswith("\n\nAfter.\n")
    assert "stale figures" not in text
    assert "`sink-dropped`" in text
    names = {figure["name"] for figure in json.loads(json_path.read_text())["figures"]}
    assert {"rules/misses/this-judge", "rules/false-alarms/this-judge"} <= names
    assert OURS in capsys.readouterr().out


def test_figures_are_shares() -> None:
    verdict = Verdicts("case", "bfloat16", "zeros", "defect", dict.fromkeys(RULES, True))
    values = {figure["name"]: figure["value"] for figure in figures([verdict])["figures"]}
    assert values["rules/misses/this-judge"] == 1.0
    assert values["rules/false-alarms/this-judge"] == 0.0
