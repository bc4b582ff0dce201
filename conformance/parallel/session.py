"""A verdict on many ranks as a record of the results file."""

from __future__ import annotations

import shlex
import time
from dataclasses import asdict

from conformance.false_alarms import STANDARD, FalseAlarms
from conformance.parallel.run import RankSubject, claimed, judge_on_ranks
from conformance.parallel.verdict import ParallelVerdict
from conformance.parallel.workloads import ParallelWorkload
from conformance.subjects.impl_parallel import run_rank
from reports.records import CaseRecord, RankRecord, Statistic

COMMAND = ("attn-conformance", "run")


def judge_on_real_ranks(
    workload: ParallelWorkload,
    subject: RankSubject = run_rank,
    *,
    alarms: FalseAlarms = STANDARD,
) -> CaseRecord:
    """Judge one workload on processes of this machine and return its record.

    Args:
        workload: what to run.
        subject: what runs on every rank; `impl` unless given.
        alarms: the run's chance of a false alarm.
    """
    started = time.perf_counter()
    verdict = judge_on_ranks(workload, subject, alpha=alarms.per_case)
    return record(workload, verdict, time.perf_counter() - started, alarms)


def record(
    workload: ParallelWorkload,
    verdict: ParallelVerdict,
    seconds: float,
    alarms: FalseAlarms = STANDARD,
) -> CaseRecord:
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
            "piece": workload.piece,
            "packed": workload.packed,
            "extras": asdict(workload.extras),
        },
        subject="impl",
        profile=profile.name,
        profile_stages=dict(profile.stores),
        verdict=verdict.verdict,
        reason=verdict.reason,
        statistics=tuple(telling(verdict)),
        worst=verdict.worst,
        reproduce=shlex.join([*COMMAND, "--case", workload.id, *alarms.options()]),
        seconds={"all": seconds},
        ranks=tuple(
            RankRecord(
                rank=rank.rank,
                verdict=rank.verdict,
                reason=rank.reason,
                first=rank.rank in verdict.culprits,
            )
            for rank in verdict.ranks
        ),
    )


def telling(verdict: ParallelVerdict) -> list[Statistic]:
    """Return what a reader needs of the figures of all ranks, calls and values.

    Thousands are taken in a case. Kept are, of every rank, the figure of each name that is the
    largest multiple of its limit, and those beyond their limits where the rank is wrong first.
    """
    first = {f"rank {rank.rank} {rank.first}" for rank in verdict.ranks if rank.first}
    furthest: dict[tuple[str, str], Statistic] = {}
    for statistic in verdict.statistics:
        of = (" ".join(statistic.output.split()[:2]), statistic.name)
        known = furthest.get(of)
        if known is None or statistic.ratio > known.ratio:
            furthest[of] = statistic
    chosen = set(map(id, furthest.values()))
    return [s for s in verdict.statistics if id(s) in chosen or (s.ratio > 1 and s.output in first)]
