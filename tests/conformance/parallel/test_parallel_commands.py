"""The documented commands: `attn-conformance parallel`, and torchrun."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from conformance.cli import main
from conformance.parallel.cases import parallel_cases
from reports.records import read_results

ROOT = Path(__file__).parents[3]


def test_the_command_judges_a_case_and_writes_its_record(tmp_path: Path) -> None:
    case = next(c for c in parallel_cases() if c.world_size == 2)
    results, page = tmp_path / "parallel.jsonl", tmp_path / "parallel.html"
    arguments = ["parallel", "--case", case.id, "--jobs", "1"]
    arguments += ["--results", str(results), "--report", str(page)]
    ran = CliRunner().invoke(main, arguments)
    assert ran.exit_code == 0, ran.output
    (record,) = read_results(results).cases
    assert (record.case_id, record.verdict, record.suite) == (case.id, "CONFORMS", "parallel")
    assert case.id in record.reproduce
    assert {s.output.split()[1] for s in record.statistics} == {"0", "1"}
    assert case.id in page.read_text(encoding="utf-8")


def test_an_unknown_case_is_bad_use() -> None:
    ran = CliRunner().invoke(main, ["parallel", "--case", "tp9"])
    assert ran.exit_code == 2
    assert "case must be among those" in ran.output


def test_the_torchrun_command_of_the_readme_passes() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- torchrun -->\n```sh\n(.*?)\n```", text, flags=re.DOTALL)
    assert block is not None
    command = shlex.split(block[1])
    assert command[:3] == ["torchrun", "--nproc-per-node", "4"]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", *command[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        run, capture_output=True, text=True, timeout=240, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "CONFORMS on 4 ranks" in done.stdout
