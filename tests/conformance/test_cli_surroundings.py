"""The command does the same wherever it is started, whatever pytest finds configured there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from reports.html import render
from reports.records import read_results

KERNEL = """
import torch
from conformance.subjects import CoreCall

def attention(call: CoreCall) -> torch.Tensor:
    heads = call.q.shape[1] // call.k.shape[1]
    k, v = (t.repeat_interleave(heads, 1) for t in (call.k, call.v))
    scores = call.q @ k.transpose(2, 3) * call.softmax_scale
    scores = scores.float().masked_fill(~call.mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v
"""

PROJECT = """
[tool.pytest.ini_options]
addopts = "-k nothing_is_called_this --strict-config"
filterwarnings = ["error"]
testpaths = ["elsewhere"]
"""


def judge(
    folder: Path, subject: str, ids: list[str], jobs: int
) -> subprocess.CompletedProcess[str]:
    """Run the command there, in a process of its own."""
    command = [sys.executable, "-m", "conformance.cli", "run"]
    command += ["--subject", subject, "-j", str(jobs)]
    for text in ids:
        command += ["--case", text]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_a_users_own_pytest_configuration_has_no_say(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "my_kernel.py").write_text(KERNEL)
    ids = [f"core-h256-hq8-hkv2-d32/cte-bf16-b1-q{n}-gaussian-seed0" for n in (7, 9)]
    done = judge(tmp_path, "my_kernel:attention", ids, 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "results.jsonl").read_text().count('"CONFORMS"') == len(ids)


ENDS_THE_RUN = """
import os

import my_kernel

def attention(call):
    if call.q.shape[2] > 8:
        os._exit(9)
    return my_kernel.attention(call)
"""


def test_a_run_that_is_killed_leaves_what_it_found_and_no_verdict(tmp_path: Path) -> None:
    (tmp_path / "my_kernel.py").write_text(KERNEL)
    (tmp_path / "ends_the_run.py").write_text(ENDS_THE_RUN)
    ids = [f"core-h256-hq8-hkv2-d32/cte-bf16-b1-q{n}-gaussian-seed0" for n in (7, 9, 5)]
    done = judge(tmp_path, "ends_the_run:attention", ids, 1)
    assert done.returncode == 9, done.stdout + done.stderr
    found = read_results(tmp_path / "results.jsonl")
    assert [(case.case_id, case.verdict) for case in found.cases] == [(ids[0], "CONFORMS")]
    assert found.missing == 2
    assert "No verdict: 2 of 3 cases left no record; none failed." in render(found)
