"""`attn-conformance bench impl`: a layer of `impl` against its peers, and its attention alone.

Peers are PyTorch's `scaled_dot_product_attention` between the same projections, flex attention
compiled, and the layer of Transformers' Llama, eager and with that function (extra `oracles`); all
have the same weights and compute the same. Contenders take turns, a ratio is that of one turn, and
the best peer is the one with the lowest median. Threads are PyTorch's own choice, which the
environment variable `OMP_NUM_THREADS` changes.
"""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from conformance.benchmarks import impl_memory
from conformance.benchmarks.figures import Figure, figure, ratios, table, take_turns, write_json
from conformance.benchmarks.impl_contenders import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    Call,
    Step,
    contenders,
)
from conformance.generated import markdown_table, write_measured
from conformance.terminal import console
from impl.kernels import PrefillRule, prefill
from impl.kernels.native import ScoreRule
from impl.strategy import Implementation

DTYPES = (torch.float32, torch.bfloat16)
PREFILL_TARGET, PREFILL_TARGET_TO = 1.1, 2048
DECODE_TARGET = 1.15
FLASH_TARGET, FLASH_TARGET_AT = 1.5, 4096
MEMORY_TARGET = 2.2
LONGEST_DENSE = 2048
"""Beyond this, a peer that holds all scores at once takes too long and too much memory."""

COLUMNS = (
    "seconds",
    "torch-sdpa-seconds",
    "transformers-sdpa-seconds",
    "transformers-eager-seconds",
    "flex-compiled-seconds",
)
"""Figures of a step that the page shows."""


def run(
    json_path: Path | None, quick: bool, *, page: Path | None = None, longest: int | None = None
) -> None:
    """Measure everything, print a table, and write JSON and a page's tables if asked to.

    Args:
        json_path: where to write the figures; None writes nothing.
        quick: short lengths and few turns: shows that it works, not how fast it is.
        page: Markdown page whose tables to renew; None renews nothing.
        longest: leave out longer prefills; None leaves out none.
    """
    output = console()
    prefills = {32: 1, 64: 1} if quick else {512: 15, 1024: 11, 2048: 9, 4096: 5, 8192: 3}
    if longest is not None:
        prefills = {length: rounds for length, rounds in prefills.items() if length <= longest}
    caches = {64: 1} if quick else {1024: 25, 4096: 15, 8192: 11, 32768: 7}
    kernels = {64: 1} if quick else {1024: 9, 4096: 5}
    lengths = (64, 128) if quick else (4096, 8192)
    figures: list[Figure] = []
    with torch.no_grad(), Progress(console=output, transient=True) as progress:
        total = len(DTYPES) * (len(prefills) + len(caches) + len(kernels)) + 1
        task = progress.add_task("impl", total=total)
        for dtype in DTYPES:
            for length, rounds in kernels.items():
                figures += attention(length, dtype, rounds)
                progress.advance(task)
            for slots, rounds in caches.items():
                step = Step(prior=slots, tokens=1, dtype=dtype)
                figures += layer(f"decode/{_name(dtype)}/cache{slots}", step, rounds, quick)
                progress.advance(task)
            for length, rounds in prefills.items():
                step = Step(prior=0, tokens=length, dtype=dtype)
                figures += layer(f"prefill/{_name(dtype)}/s{length}", step, rounds, quick)
                progress.advance(task)
        figures += memory(*lengths)
    output.print(table("impl: one layer, 32 heads on 8 KV heads of 128", figures))
    if json_path is not None:
        write_json(json_path, figures)
        output.print(f"wrote {json_path}")
    if page is not None:
        write_measured(page, tables(figures))
        output.print(f"wrote {page}")


def tables(figures: Sequence[Figure]) -> str:
    """Return the figures as Markdown: a table of steps, milliseconds a contender, and the rest."""
    found = {item.name: item for item in figures}
    rows = []
    for name, item in found.items():
        if not name.endswith("/over-best"):
            continue
        at = name.removesuffix("/over-best")
        times = [
            f"{found[key].value * 1e3:.3g}" if (key := f"{at}/{column}") in found else "-"
            for column in COLUMNS
        ]
        rows.append([at.removeprefix("impl/"), *times, f"{item.value:.2f}", _target(item)])
    head = ["step", *(c.removesuffix("-seconds") for c in COLUMNS), "over best", "target"]
    steps = markdown_table(["impl" if c == "seconds" else c for c in head], rows)
    rest = markdown_table(
        ["figure", "value", "unit", "target"],
        [
            [name, f"{item.value:.3g}", item.unit, _target(item)]
            for name, item in found.items()
            if name.startswith(("impl/attention", "impl/memory"))
        ],
    )
    return (
        f"Milliseconds, medians of the turns:\n\n{steps}\n\nAttention alone, and memory:\n\n{rest}"
    )


def _target(item: Figure) -> str:
    if item.target is None:
        return ""
    return f"≤ {item.target:g}, {'met' if item.met else 'not met'}"


def layer(name: str, step: Step, rounds: int, quick: bool) -> list[Figure]:
    """Return the figures of one step of the layer: ours, each peer's, and ours over the best."""
    flex = not quick and shutil.which("g++") is not None
    calls = contenders(step, dense=step.tokens <= LONGEST_DENSE, flex=flex)
    took = take_turns(calls, rounds=rounds)
    ours = took.pop("impl")
    best = min(took, key=lambda peer: statistics.median(took[peer]))
    target = None
    if step.prior:
        target = DECODE_TARGET
    elif step.tokens <= PREFILL_TARGET_TO:
        target = PREFILL_TARGET
    return [
        figure(f"impl/{name}/over-best", ratios(ours, took[best]), "ratio", "lower", target),
        figure(f"impl/{name}/seconds", ours, "seconds"),
        *(figure(f"impl/{name}/{peer}-seconds", spent, "seconds") for peer, spent in took.items()),
    ]


def attention(length: int, dtype: torch.dtype, rounds: int) -> list[Figure]:
    """Return the time of causal attention over that of PyTorch's, without projections.

    Causal alone, with sinks, and with a softcap, each by the kernel that a layer takes, and the
    streamed kernel where PyTorch's is taken. PyTorch's attention has neither sinks nor softcap: the
    comparison is still with the causal one.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, length, heads, HEAD_DIM, generator=generator).to(dtype).transpose(1, 2)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    sink = torch.zeros(HEADS, dtype=dtype)
    positions = torch.arange(length)[None]

    def call(sink: Tensor | None, softcap: float | None, streamed: bool = False) -> Call:
        rule = PrefillRule(score=ScoreRule(divisor=math.sqrt(HEAD_DIM), softcap=softcap))
        plain = rule.plain(explicit_mask=False, prior=False) and not streamed
        return lambda: prefill(
            q,
            k,
            v,
            implementation=Implementation.SDPA if plain else Implementation.FLASH,
            rule=rule,
            sink=sink,
            attention_mask=positions >= 0,
            position_ids=positions,
        )

    sdpa = torch.nn.functional.scaled_dot_product_attention
    took = take_turns(
        {
            "causal": call(None, None),
            "sinks": call(sink, None),
            "softcap": call(None, 30.0),
            "streamed": call(None, None, streamed=True),
            "sdpa": lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True),
        },
        rounds=rounds,
    )
    at, peer = f"{_name(dtype)}/s{length}", took.pop("sdpa")
    at_target = FLASH_TARGET if length == FLASH_TARGET_AT else None
    return [
        *(
            figure(
                f"impl/attention/{name}/{at}/over-sdpa",
                ratios(spent, peer),
                "ratio",
                "lower",
                None if name == "streamed" else at_target,
            )
            for name, spent in took.items()
        ),
        *(
            figure(f"impl/attention/{name}/{at}/seconds", spent, "seconds")
            for name, spent in {**took, "sdpa": peer}.items()
        ),
    ]


def memory(short: int, long: int) -> list[Figure]:
    """Return how the memory of a streamed prefill grows when the prompt is twice as long."""
    taken = {length: impl_memory.measure(length) for length in (short, long)}
    growth = [taken[long] / taken[short]]
    return [
        figure(f"impl/memory/s{long}/over-s{short}", growth, "ratio", "lower", MEMORY_TARGET),
        *(figure(f"impl/memory/s{n}/beyond-weights", [mb], "MB") for n, mb in taken.items()),
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
