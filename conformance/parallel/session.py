"""Judges all parallel cases in worker processes and turns verdicts into records."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console

from conformance.errors import UsageError
from conformance.parallel.cases import parallel_cases
from conformance.parallel.run import claimed, judge_on_ranks
from conformance.parallel.verdict import ParallelVerdict
from conformance.parallel.workloads import ParallelWorkload
from conformance.processes import in_processes
from reports.records import CaseRecord

COMMAND = ("attn-conformance", "parallel")


def judge_cases(ids: Sequence[str], *, jobs: int, console: Console) -> list[CaseRecord]:
    """Judge `impl` on real ranks.

    Args:
        ids: cases by id; none is all.
        jobs: cases at a time.
        console: where the progress bar goes.

    Returns:
        A record per case, in order of their ids.

    Raises:
        UsageError: an id is no case's.
    """
    cases = {case.id: case for case in parallel_cases()}
    unknown = sorted(set(ids) - cases.keys())
    if unknown:
        raise UsageError(f"case must be among those of `{shlex.join(COMMAND)}`, got {unknown[0]}")
    chosen = [cases[name] for name in ids] or list(cases.values())
    chosen.sort(key=lambda case: -case.world_size)  # costly ones first
    records = in_processes(
        judged, chosen, jobs=min(jobs, len(chosen)), title="judging ranks", console=console
    )
    return sorted(records, key=lambda record: record.case_id)


def judged(workload: ParallelWorkload) -> CaseRecord:
    """Judge one workload and return its record."""
    started = time.perf_counter()
    verdict = judge_on_ranks(workload)
    return record(workload, verdict, time.perf_counter() - started)


def record(workload: ParallelWorkload, verdict: ParallelVerdict, seconds: float) -> CaseRecord:
    """Return the record of a verdict."""
    spread, profile = workload.parallelism, claimed(workload)
    mesh = f"tp{spread.tp_degree} cp{spread.cp_degree} dp{spread.attention_dp_degree}"
    return CaseRecord(
        case_id=workload.id,
        suite="parallel",
        features=(mesh, *workload.extras.features),
        model="",
        layer="",
        phase="serving",
        dtype=workload.dtype,
        regime=workload.regime,
        seed=workload.seed,
        config=asdict(workload.config),
        workload={
            "parallelism": asdict(spread),
            "lengths": list(workload.lengths),
            "steps": workload.steps,
            "extras": asdict(workload.extras),
        },
        subject="impl",
        profile=profile.name,
        profile_stages=dict(profile.stores),
        verdict=verdict.verdict,
        reason=verdict.reason,
        statistics=verdict.statistics,
        worst=verdict.worst,
        reproduce=shlex.join([*COMMAND, "--case", workload.id]),
        seconds={"all": seconds},
    )
