"""Every path runs on a device named `neuron`: each operator counted, none of them on the host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forward_paths import PATHS
from proofs import reviewed

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def runs() -> dict[str, Any]:
    """What `neuron_device.py` saw, by path."""
    paths = [str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(HERE / "neuron_device.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_path_stays_on_the_device_and_computes_the_bits_of_the_cpu(
    runs: dict[str, Any],
) -> None:
    assert {name: run["host"] for name, run in runs.items() if name in PATHS and run["host"]} == {}
    for name in PATHS:
        assert runs[name]["devices"] == ["neuron"], name
        assert runs[name]["same"], name


def test_the_device_runs_the_reviewed_operators_and_no_other(runs: dict[str, Any]) -> None:
    found = {operator for name in PATHS for operator in runs[name]["operators"]}
    assert sorted(found - reviewed("device")) == [], "not reviewed"
    assert sorted(reviewed("device") - found) == [], "reviewed, but no path runs it any more"


def test_every_operator_is_counted(runs: dict[str, Any]) -> None:
    # two products of scores and of values, one each for the cache and for the step's own tokens
    assert runs["prefill full"]["operators"]["aten.bmm.default"] == 2
    assert runs["decode full"]["operators"]["aten.bmm.default"] == 4
    # q, k, v and output; fused makes one of the first three
    assert runs["prefill flat-norm"]["operators"]["aten.mm.default"] == 4
    assert runs["prefill fused"]["operators"]["aten.addmm.default"] == 1


@pytest.mark.parametrize(
    ("planted", "operator"),
    [
        ("reads", "aten._local_scalar_dense.default"),
        ("makes", "aten.ones.default"),
        ("returns", "aten._to_copy.default"),
    ],
)
def test_a_step_that_uses_the_host_is_found(
    runs: dict[str, Any], planted: str, operator: str
) -> None:
    assert operator in runs[f"planted: {planted}"]["host"]
