"""Figures that benchmarks report: taken in turn in one run, shown as a table, kept as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
from rich.table import Column, Table
from threadpoolctl import threadpool_info

PACKAGES = ("numpy", "torch", "onnx", "threadpoolctl")

SETTLE_SECONDS = 0.05
"""Pause before each contender: worker threads of the one before spin on for some milliseconds."""

SAMPLE_SECONDS = 0.1
"""A sample repeats its call for this long, so that one slice of the scheduler weighs little."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One number of a benchmark.

    Attributes:
        name: path of the figure, such as `golden/causal/s4096/torch-float64`.
        value: median of the samples.
        unit: `ratio`, `seconds`, `share`, `MB` or `Gflop/s`.
        better: which way is better; `neither` for information.
        samples: what was measured, in order.
        target: what it must reach, None without one.
    """

    name: str
    value: float
    unit: str
    better: Literal["lower", "higher", "neither"]
    samples: tuple[float, ...]
    target: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.target is None:
            return None
        return self.value <= self.target if self.better == "lower" else self.value >= self.target


def figure(
    name: str,
    samples: list[float],
    unit: str,
    better: Literal["lower", "higher", "neither"] = "neither",
    target: float | None = None,
) -> Figure:
    """Return the figure of these samples: their median."""
    return Figure(
        name=name,
        value=statistics.median(samples),
        unit=unit,
        better=better,
        samples=tuple(samples),
        target=target,
    )


def take_turns(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    tick: Callable[[], None] = lambda: None,
    settle: float = SETTLE_SECONDS,
    least: float = SAMPLE_SECONDS,
) -> dict[str, list[float]]:
    """Time contenders in turn, so that what else the machine does falls on all of them alike.

    Args:
        contenders: what to call, by name.
        rounds: turns of each; a sample of a turn is the mean of as many calls as fit into
            `least` seconds, after one call that is not counted.
        tick: called after each turn.
        settle: seconds of rest before each turn.
        least: see `rounds`.

    Returns:
        Seconds of one call, a list of `rounds` samples for each contender.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            time.sleep(settle)
            call()
            calls, start = 0, time.perf_counter()
            while calls == 0 or time.perf_counter() - start < least:
                call()
                calls += 1
            samples[name].append((time.perf_counter() - start) / calls)
            tick()
    return samples


def ratios(above: list[float], below: list[float]) -> list[float]:
    """Return the ratio of each turn."""
    return [a / b for a, b in zip(above, below, strict=True)]


def machine() -> dict[str, object]:
    """Return what the figures depend on besides the code."""
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "blas": [x.get("architecture") for x in threadpool_info() if x["user_api"] == "blas"],
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_json(path: Path, figures: list[Figure]) -> None:
    """Write the machine and the figures, the format that README and docs quote by name."""
    kept = [
        {name: x for name, x in asdict(item).items() if name != "target" or x is not None}
        for item in figures
    ]
    path.write_text(json.dumps({"machine": machine(), "figures": kept}, indent=1) + "\n")


def table(title: str, figures: list[Figure]) -> Table:
    """Return the figures as a table, with the spread of the samples and whether targets are met."""
    columns = ("median", "spread", "unit", "target", "")
    shown = Table(Column("figure", no_wrap=True), *columns, title=title)
    for item in figures:
        sign = {"lower": "≤ ", "higher": "≥ ", "neither": ""}[item.better]
        shown.add_row(
            item.name,
            f"{item.value:.3g}",
            f"{min(item.samples):.3g} to {max(item.samples):.3g}",
            item.unit,
            "" if item.target is None else f"{sign}{item.target:g}",
            {True: "[green]met[/]", False: "[red]not met[/]", None: ""}[item.met],
        )
    return shown
