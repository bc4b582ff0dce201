"""`attn-conformance bench judge`: what a verdict costs, beside golden alone on the same case.

A verdict is `judge_case` on an output that was computed before and conforms: it draws the inputs,
runs golden, predicts the errors, and holds every statistic to its limit; the subject takes no time.
Golden alone is one call of the dense `golden.attend`; a verdict evaluates golden in pieces of its
queries (`conformance.pieces`). For information the streamed golden takes its turns too, and a
verdict whose error scale comes from a cache. A ratio is of contenders that took turns.
"""

from __future__ import annotations

import tempfile
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

import golden
from conformance.benchmarks.figures import Figure, figure, ratios, table, take_turns, write_json
from conformance.case_ids import parse
from conformance.cases import Case
from conformance.expected import reference
from conformance.generated import markdown_table, write_measured
from conformance.inputs import draw_core
from conformance.runner import judge_case
from conformance.scale_cache import ScaleCache
from conformance.subjects import Subject
from conformance.tensors import Tensors
from conformance.terminal import console
from golden.blockwise import attend_blockwise

TARGET = 4.0
"""What a verdict may cost, in times of golden alone."""
LENGTH = 2048
LAYERS = {
    "causal-d64": "core-h256-hq4-hkv2-d64",
    "causal-d128": "core-h256-hq4-hkv2-d128",
    "window-d64": "core-h256-hq4-hkv2-d64-window512",
    "sinks-d64": "core-h256-hq4-hkv2-d64-sinks",
    "window-sinks-d128": "core-h256-hq4-hkv2-d128-sinks-window512",
}
"""Layers by name: 4 heads on 2 KV heads."""
CLAIMS = (("bf16", "flash"), ("bf16", "eager"), ("fp32", "flash"))
"""Dtypes, and the profiles under which the layers are judged."""
COLUMNS = ("over-golden", "over-streamed", "cached-over-golden", "memory-over-golden")

Contenders = dict[str, Callable[[], object]]


def run(json_path: Path | None, quick: bool, *, page: Path | None = None) -> None:
    """Measure everything, print a table, and write JSON and a page's table if asked to.

    Args:
        json_path: where to write the figures; None writes nothing.
        quick: short lengths and one turn: shows that it works, not how fast it is.
        page: Markdown page whose table to renew; None renews nothing.
    """
    output = console()
    length = 64 if quick else LENGTH
    figures: list[Figure] = []
    with Progress(console=output, transient=True) as progress:
        task = progress.add_task("judge", total=len(LAYERS) * len(CLAIMS))
        for dtype, profile in CLAIMS:
            rounds = 1 if quick else 5
            for name, layer in LAYERS.items():
                case = parse(f"{layer}/cte-{dtype}-b1-q{length}-gaussian-seed0")
                at = f"judge/{profile}/{dtype}/s{length}/{name}"
                figures += verdict(at, case, profile, rounds)
                progress.advance(task)
    output.print(table("a verdict over golden alone", figures))
    if json_path is not None:
        write_json(json_path, figures)
        output.print(f"wrote {json_path}")
    if page is not None:
        write_measured(page, page_table(figures))
        output.print(f"wrote {page}")


def verdict(at: str, case: Case, profile: str, rounds: int) -> list[Figure]:
    """Return the figures of one case: times and peak memory over golden's.

    Args:
        at: how their names begin.
        case: of scope `core`.
        profile: that the subject claims.
        rounds: turns of each contender.
    """
    with tempfile.TemporaryDirectory() as folder:
        calls = contenders(case, profile, ScaleCache(Path(folder), worth=0.0))
        took = take_turns(calls, rounds=rounds)
        peaks = {name: _peak(calls[name]) for name in ("verdict", "golden")}
    ours, alone = took["verdict"], took["golden"]
    return [
        figure(f"{at}/over-golden", ratios(ours, alone), "ratio", "lower", TARGET),
        figure(f"{at}/over-streamed", ratios(ours, took["streamed"]), "ratio"),
        figure(f"{at}/cached-over-golden", ratios(took["cached"], alone), "ratio"),
        figure(f"{at}/memory-over-golden", [peaks["verdict"] / peaks["golden"]], "ratio"),
        *(figure(f"{at}/{name}-seconds", spent, "seconds") for name, spent in took.items()),
        *(figure(f"{at}/{name}-memory", [peak], "MB") for name, peak in peaks.items()),
    ]


def contenders(case: Case, profile: str, cache: ScaleCache) -> Contenders:
    """Return what takes turns on a case: the verdict, one with a cache, golden in two forms."""
    inputs = draw_core(case)
    config = case.config
    output = reference(case, inputs).outputs["output"]
    kept = Tensors(getattr(torch, case.dtype))(golden.FORMATS[case.dtype].nearest(output))
    subject = Subject(name="kept", function=lambda call: kept, scope="core", profile=profile)

    def judge(where: ScaleCache | None) -> None:
        record = judge_case(case, subject, cache=where)
        if record.verdict != "CONFORMS":  # a finding takes a second look, which is not measured
            raise RuntimeError(f"output must conform to {case.id}, got {record.reason}")

    given: dict[str, Any] = {
        "q_positions": inputs.q_positions,
        "kv_positions": inputs.kv_positions,
        "mask": golden.layer_mask(config),
        "softmax_scale": config.softmax_scale,
        "sinks": inputs.sinks,
    }
    return {
        "verdict": lambda: judge(None),
        "golden": lambda: golden.attend(inputs.q, inputs.k, inputs.v, **given),
        "streamed": lambda: attend_blockwise(inputs.q, inputs.k, inputs.v, **given),
        "cached": lambda: judge(cache),
    }


def page_table(figures: Sequence[Figure]) -> str:
    """Return the ratios as a Markdown table, a row for each case."""
    found = {item.name: item for item in figures}
    rows = []
    for name, item in found.items():
        at, _, what = name.rpartition("/")
        if what == "over-golden":
            ratio = [f"{found[f'{at}/{column}'].value:.2f}" for column in COLUMNS]
            seconds = f"{found[f'{at}/golden-seconds'].value:.2f}"
            met = "met" if item.met else "not met"
            rows.append([at.removeprefix("judge/"), seconds, *ratio, f"≤ {TARGET:g}, {met}"])
    head = [
        "case",
        "golden, s",
        "verdict over golden",
        "over streamed golden",
        "cached verdict over golden",
        "memory over golden's",
        "target",
    ]
    return markdown_table(head, rows)


def _peak(call: Callable[[], object]) -> float:
    """Return the most memory that a call held at a time, MB."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()
