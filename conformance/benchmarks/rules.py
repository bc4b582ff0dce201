"""The rules benchmark: which acceptance rules tell correct kernels from known bugs."""

from __future__ import annotations

import json
import os
from itertools import chain
from pathlib import Path

from conformance.benchmarks.rules_cases import rules_cases
from conformance.benchmarks.rules_report import figures, markdown, rich_table
from conformance.benchmarks.rules_trials import Verdicts, verdicts_on
from conformance.generated import write_measured
from conformance.processes import in_processes
from conformance.terminal import console


def run(
    json_path: Path | None,
    quick: bool,
    *,
    page: Path | None = None,
    jobs: int = os.cpu_count() or 1,
) -> None:
    """Ask every rule about every correct kernel and every known bug, and print how each did.

    Args:
        json_path: where figures go, None for nowhere.
        quick: fewer cases, for a look.
        page: Markdown page whose measured part is replaced, None for none.
        jobs: processes.
    """
    output = console()
    found: list[Verdicts] = list(
        chain.from_iterable(
            in_processes(
                verdicts_on,
                rules_cases(quick=quick),
                jobs=jobs,
                title="rules",
                console=output,
            )
        )
    )
    found.sort(key=lambda one: (one.case_id, one.kernel))
    output.print(rich_table(found))
    if json_path is not None:
        json_path.write_text(json.dumps(figures(found), indent=2) + "\n", encoding="utf-8")
    if page is not None:
        write_measured(page, markdown(found))
