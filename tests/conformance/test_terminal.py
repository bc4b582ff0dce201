"""Tables keep their columns where no terminal is."""

from __future__ import annotations

import io
import sys

import pytest

from conformance.benchmarks.figures import figure, table
from conformance.terminal import LOG_WIDTH, console


def test_a_pipe_is_wide_enough_for_the_figures_of_a_benchmark(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    printed = io.StringIO()
    monkeypatch.setattr(sys, "stdout", printed)
    name = "impl/flash-sinks/bfloat16/s4096/over-sdpa-of-the-same-machine"
    console().print(table("title", [figure(name, [1.2345, 2.0], "ratio", "lower", 1.5)]))
    row = next(line for line in printed.getvalue().splitlines() if "impl/flash" in line)
    assert name in row
    assert "1.23 to 2" in row
    assert "not met" in row
    assert len(row) <= LOG_WIDTH


def test_a_width_that_is_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert console().width == 40
