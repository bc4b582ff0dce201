"""Judges every rank's values against golden's same rank, and says which ranks went wrong first."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from conformance.error_model import predict_scale
from conformance.false_alarms import STANDARD
from conformance.judge import Judgement, judge_outputs
from conformance.looks import look
from conformance.parallel.expected import RankReference, in_turn, rank_reference, reference
from conformance.parallel.observations import RankObservation, Values, observed
from conformance.parallel.precision import on_ranks
from conformance.parallel.rank_reports import RunReport
from conformance.parallel.stages import RESULTS, Seen, call_name
from conformance.parallel.workloads import ParallelWorkload, WorkloadInputs
from conformance.precision import PrecisionProfile
from golden import Array
from reports.records import Statistic, Worst


@dataclass(frozen=True, slots=True)
class RankVerdict:
    """One rank's part of a verdict.

    Attributes:
        rank: global rank.
        verdict: of `reports.records.VERDICTS`.
        reason: one sentence, empty when it conforms.
        first: call and stage at which it is wrong first, empty when it conforms.
    """

    rank: int
    verdict: str
    reason: str = ""
    first: str = ""


@dataclass(frozen=True, slots=True)
class ParallelVerdict:
    """The verdict on all ranks.

    V1: a rank that did not finish decides the verdict, since others wait for it.
    V2: among ranks that deviate, those that are wrong at the earliest stage are the culprits; what
        collectives carry from them makes others deviate later.

    Attributes:
        verdict: of `reports.records.VERDICTS`.
        reason: one sentence that names ranks, empty when all conform.
        culprits: ranks where it went wrong first.
        ranks: every rank's own verdict.
        statistics: every figure with its limit; the output of each names rank, call and stage.
        worst: the element furthest from golden, None if nothing was compared.
    """

    verdict: str
    reason: str
    culprits: tuple[int, ...]
    ranks: tuple[RankVerdict, ...]
    statistics: tuple[Statistic, ...] = ()
    worst: Worst | None = None


def judge_run(
    workload: ParallelWorkload,
    inputs: WorkloadInputs,
    report: RunReport,
    profile: PrecisionProfile,
    *,
    values: Callable[[RankReference, int, Any], Values] = lambda _, __, result: result,
    alpha: float = STANDARD.per_case,
) -> ParallelVerdict:
    """Judge a run of ranks.

    V3: where ranks were out of step or one was lost, the run's own verdict says so, naming it.

    Args:
        workload: what they ran.
        inputs: its arrays.
        report: how every rank ended, and its result.
        profile: what the subject claims of one rank.
        values: turns a rank's result into values by call and stage, such as
            `conformance.parallel.observations.layer_values`; as it is unless given.
        alpha: chance that a correct subject fails the case.
    """
    ranks = rank_reference(workload, inputs)
    found = observed(report, lambda rank, result: values(ranks, rank, result))
    verdict = judge_ranks(workload, inputs, found, profile, alpha=alpha)
    return replace(verdict, reason=report.verdict) if report.verdict else verdict


def judge_ranks(
    workload: ParallelWorkload,
    inputs: WorkloadInputs,
    observations: Sequence[RankObservation],
    profile: PrecisionProfile,
    *,
    alpha: float = STANDARD.per_case,
) -> ParallelVerdict:
    """Judge what came back from the ranks.

    Args:
        workload: what they ran.
        inputs: its arrays.
        observations: one per rank that was heard of, in any order.
        profile: what the subject claims of one rank; the case's reduction dtype is added to it.
        alpha: chance that a correct subject fails the case.
    """
    by_rank = {observation.rank: observation for observation in observations}
    ranks = rank_reference(workload, inputs)
    expected = reference(ranks, on_ranks(profile, workload.parallelism))
    everything = in_turn(
        Seen(rank, call, what)
        for rank in range(workload.world_size)
        for call in range(workload.calls)
        for what in (*workload.stages, *RESULTS)
    )
    everything = [seen for seen in everything if str(seen) in expected.outputs]
    broken = [
        found
        for rank in range(workload.world_size)
        if (found := _broken(rank, by_rank.get(rank), everything, expected.outputs, expected.rows))
    ]
    if broken:
        return _not_judged(workload, broken)
    values = {
        str(seen): np.asarray(by_rank[seen.rank].values[seen.call, seen.what], np.float64)
        for seen in everything
    }
    judgement, _ = look(
        expected.outputs,
        lambda runs: predict_scale(
            expected.evaluate,
            expected.outputs,
            expected.rows,
            profile,
            seed=zlib.crc32(workload.id.encode()),
            runs=runs,
        ),
        lambda scales: judge_outputs(values, expected.outputs, expected.rows, scales, alpha=alpha),
    )
    return _verdict(workload, everything, judgement)


def _broken(
    rank: int,
    observation: RankObservation | None,
    everything: Sequence[Seen],
    expected: Mapping[str, Array],
    rows: Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.bool_]]],
) -> RankVerdict | None:
    """Return the verdict on a rank whose values cannot be compared, None if they can."""
    if observation is None:
        return RankVerdict(rank, "CRASHED", f"rank {rank} was not heard of")
    if observation.failure:
        return RankVerdict(rank, observation.failure, observation.state)
    for seen in everything:
        if seen.rank != rank:
            continue
        at = f"{call_name(seen.call)} {seen.what}"
        value = observation.values.get((seen.call, seen.what))
        wanted = expected[str(seen)].shape
        if value is None:
            return RankVerdict(rank, "MALFORMED", f"{seen} is missing", at)
        if np.shape(value) != wanted:
            reason = f"{seen} must have shape {wanted}, got {np.shape(value)}"
            return RankVerdict(rank, "MALFORMED", reason, at)
        if not np.isfinite(np.asarray(value)[rows[str(seen)]]).all():
            return RankVerdict(rank, "MALFORMED", f"{seen} holds NaN or infinity", at)
    return None


_GRAVEST = ("CRASHED", "MALFORMED", "TIMED_OUT")
"""A crashed rank leaves others waiting, and so does one that sent another shape."""


def _not_judged(workload: ParallelWorkload, broken: Sequence[RankVerdict]) -> ParallelVerdict:
    gravest = min((found.verdict for found in broken), key=_GRAVEST.index)
    culprits = [found for found in broken if found.verdict == gravest]
    others = [found for found in broken if found.verdict != gravest]
    reason = "; ".join(found.reason for found in (*culprits, *others)[:8])
    verdicts = {found.rank: found for found in broken}
    return ParallelVerdict(
        gravest,
        reason,
        tuple(found.rank for found in culprits),
        tuple(
            verdicts.get(rank, RankVerdict(rank, "UNSUPPORTED", "not judged: another rank failed"))
            for rank in range(workload.world_size)
        ),
    )


def _verdict(
    workload: ParallelWorkload, everything: Sequence[Seen], judgement: Judgement
) -> ParallelVerdict:
    excess: dict[str, Statistic] = {}
    for statistic in judgement.statistics:
        known = excess.get(statistic.output)
        if statistic.ratio > 1 and (known is None or statistic.ratio > known.ratio):
            excess[statistic.output] = statistic
    wrong = [seen for seen in everything if str(seen) in excess]
    first: dict[int, Seen] = {}
    for seen in wrong:
        first.setdefault(seen.rank, seen)
    ranks = tuple(_of_rank(rank, first.get(rank), excess) for rank in range(workload.world_size))
    compared = judgement.statistics, judgement.worst
    if not wrong:
        return ParallelVerdict("CONFORMS", "", (), ranks, *compared)
    turn = wrong[0].turn
    culprits = tuple(seen.rank for seen in wrong if seen.turn == turn)
    reason = (
        f"{_ranks(culprits)} first, in {call_name(wrong[0].call)} {wrong[0].what}: "
        f"{_sentence(excess[str(wrong[0])])}; in all, {_ranks(sorted(first))}"
    )
    return ParallelVerdict("DEVIATES", reason, culprits, ranks, *compared)


def _of_rank(rank: int, seen: Seen | None, excess: Mapping[str, Statistic]) -> RankVerdict:
    if seen is None:
        return RankVerdict(rank, "CONFORMS")
    at = f"{call_name(seen.call)} {seen.what}"
    return RankVerdict(rank, "DEVIATES", f"{at}: {_sentence(excess[str(seen)])}", at)


def _sentence(statistic: Statistic) -> str:
    place = f" at {list(statistic.where)}" if statistic.where else ""
    return (
        f"{statistic.name} {statistic.value:.3g}{place} exceeds its limit {statistic.limit:.3g} "
        f"({statistic.ratio:.3g} times)"
    )


def _ranks(ranks: Sequence[int]) -> str:
    """Write `rank 3 deviates` or `ranks 0, 1 and 3 deviate`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]} deviates"
    *most, last = map(str, ranks)
    return f"ranks {', '.join(most)} and {last} deviate"
