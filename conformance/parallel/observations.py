"""What came back from ranks, as the judge takes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from conformance.expected import written
from conformance.parallel.expected import RankReference
from conformance.parallel.rank_reports import RankReport, RunReport
from golden import Array


@dataclass(frozen=True, slots=True, eq=False)
class RankObservation:
    """What came back from one rank.

    Attributes:
        rank: global rank.
        values: by `(call, what)`, float64, `what` of `conformance.parallel.stages.ORDER`; shaped as
            golden's. `k_cache` and `v_cache` are the entries the call wrote to the rank's own heads
            and rows, `(rows, heads, tokens, head_dim)`, zeros for padding.
        failure: `CRASHED` or `TIMED_OUT` if the rank did not finish, else empty.
        state: what the rank was doing last, in words.
    """

    rank: int
    values: Mapping[tuple[int, str], Array] = field(default_factory=dict)
    failure: str = ""
    state: str = ""


Values: TypeAlias = Mapping[tuple[int, str], Array]
"""What a rank came back with, by call and stage."""


_FAILURES = {"finished": "", "raised": "CRASHED", "died": "CRASHED", "stopped": "TIMED_OUT"}


def observed(
    report: RunReport, values: Callable[[int, Any], Values] = lambda _, result: result
) -> list[RankObservation]:
    """Return what ranks came back with.

    Args:
        report: the run.
        values: turns a rank and its result into values by call and stage; as it is unless given.
    """
    return [_of_rank(rank, values) for rank in report.ranks]


def _of_rank(rank: RankReport, values: Callable[[int, Any], Values]) -> RankObservation:
    failure = _FAILURES[rank.state]
    if failure:
        return RankObservation(rank.rank, {}, failure, str(rank))
    return RankObservation(rank.rank, values(rank.rank, rank.result))


def layer_values(ranks: RankReference, rank: int, result: Mapping[str, Array]) -> Values:
    """Return a layer's result on one rank by call and stage.

    Args:
        ranks: golden's side, for which positions a call writes on the rank.
        rank: which.
        result: `prefill` and `decode`, what the layer returned, `(batch, tokens, hidden_size)`, the
            steps side by side; `prefill attn` and `decode attn`, outputs of the rank's heads, BHSD;
            `prefill 1` and on, and `prefill 1 attn`, of further calls of the prompt;
            `decode logsumexp_sent`, what the rank sent its group in flash decoding, likewise;
            `k_cache` and `v_cache`, the rank's cache at the end, `(rows, heads, positions,
            head_dim)`.
    """
    values: dict[tuple[int, str], Array] = {}
    prompts = ranks.workload.prompts
    for call in range(prompts):
        name = f"prefill {call}" if call else "prefill"
        values[call, "output"] = result[name]
        if f"{name} attn" in result:
            values[call, "attn"] = result[f"{name} attn"]
    for step in range(ranks.workload.steps):
        now = slice(step, step + 1)
        values[prompts + step, "output"] = result["decode"][:, now]
        for stage in ("logsumexp_sent", "attn"):
            if f"decode {stage}" in result:
                values[prompts + step, stage] = result[f"decode {stage}"][:, :, now]
    for call in range(ranks.workload.calls):
        positions = ranks.entries(rank, call)
        for what in ("k_cache", "v_cache"):
            values[call, what] = written(result[what], positions)
    return values
