"""Verdicts on many ranks: correct ones pass, and a mistake is named by rank and stage.

The ranks here are golden's, rounded as a profile says, with a mistake planted on some of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import golden.sharding.context_attention
from conformance.parallel.expected import RankReference, rank_reference, reference
from conformance.parallel.observations import RankObservation, layer_values
from conformance.parallel.precision import OnRanks, on_ranks, reduction_profile
from conformance.parallel.rank_reports import Collective, RankReport, RunReport
from conformance.parallel.stages import OBSERVABLE, ORDER, RESULTS, Seen
from conformance.parallel.verdict import ParallelVerdict, judge_ranks, judge_run
from conformance.parallel.workloads import ParallelWorkload, WorkloadInputs, draw_workload
from conformance.precision import profile_named
from conformance.rounding_runs import Nearest
from golden import (
    FORMATS,
    Accumulation,
    Array,
    Attended,
    AttentionConfig,
    Observer,
    RopeConfig,
    attend,
    merge_attended,
)
from golden.sharding import (
    Mesh,
    Parallelism,
    RankObserver,
    RankStage,
    ShardedLayer,
    rank_weights,
)

LAYER = AttentionConfig(
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    qkv_bias=True,
    o_bias=True,
    rope=RopeConfig(),
)
STAGES = ("q_proj", "k_proj", "k_gathered", "attn", "o_product")
PROFILE = profile_named("native", "bfloat16")


def case(parallelism: Parallelism, **changes: Any) -> ParallelWorkload:
    gathered = parallelism.cp_degree > 1
    given: dict[str, Any] = {
        "config": LAYER,
        "lengths": (8, 5),
        "steps": 1,
        "stages": tuple(stage for stage in STAGES if stage != "k_gathered" or gathered),
        "dtype": "bfloat16",
    }
    return ParallelWorkload(parallelism=parallelism, **(given | changes))


class Ranks:
    """A case, its inputs, and what ranks give that round as the profile says."""

    def __init__(self, parallelism: Parallelism, **changes: Any) -> None:
        self.case = case(parallelism, **changes)
        self.profile = profile_named("native", self.case.dtype)
        self.inputs: WorkloadInputs = draw_workload(self.case)
        self.exact: RankReference = rank_reference(self.case, self.inputs)

    @property
    def layer(self) -> ShardedLayer:
        return self.exact.layer

    def values(
        self, layer: ShardedLayer | None = None, rewrite: RankObserver | None = None
    ) -> dict[Seen, Array]:
        rounded = on_ranks(self.profile, self.case.parallelism)(Nearest(self.profile))

        def of_rank(rank: int) -> Observer:
            see, change = rounded(rank), rewrite(rank) if rewrite else None
            if change is None:
                return see
            return lambda stage, value, how=None, /: change(stage, see(stage, value, how), how)

        return replace(self.exact, layer=layer or self.layer).values(of_rank)

    def judge(self, values: dict[Seen, Array]) -> ParallelVerdict:
        return judge_ranks(self.case, self.inputs, observed(self.case, values), self.profile)

    def with_weights(self, stage: RankStage, cut: Callable[[int], Any]) -> RankStage:
        return replace(stage, weights=tuple(cut(rank) for rank in range(self.case.world_size)))


def observed(of: ParallelWorkload, values: dict[Seen, Array]) -> list[RankObservation]:
    return [
        RankObservation(
            rank, {(s.call, s.what): value for s, value in values.items() if s.rank == rank}
        )
        for rank in range(of.world_size)
    ]


MESHES = [
    Parallelism(),
    Parallelism(tp_degree=4),
    Parallelism(tp_degree=3),
    Parallelism(tp_degree=4, cp_degree=2, sequence_parallel=True),
    Parallelism(tp_degree=4, cp_degree=2, attention_dp_degree=2, ep_dispatch="AG_AR"),
    Parallelism(tp_degree=4, cp_degree=2, kv_exchange="ring", reduce_dtype="float32"),
    Parallelism(tp_degree=4, cores_per_group=2),
]


@pytest.mark.parametrize("parallelism", MESHES, ids=lambda p: f"tp{p.tp_degree}-cp{p.cp_degree}")
def test_ranks_that_round_as_they_claim_conform(parallelism: Parallelism) -> None:
    ranks = Ranks(parallelism)
    verdict = ranks.judge(ranks.values())
    assert (verdict.verdict, verdict.reason, verdict.culprits) == ("CONFORMS", "", ())
    assert [rank.verdict for rank in verdict.ranks] == ["CONFORMS"] * ranks.case.world_size
    seen = {statistic.output for statistic in verdict.statistics}
    assert {f"rank {r} step 1 output" for r in range(ranks.case.world_size)} <= seen


def test_every_rank_call_and_value_is_judged() -> None:
    ranks = Ranks(MESHES[3])
    found = reference(ranks.exact, on_ranks(PROFILE, ranks.case.parallelism))
    wanted = {
        str(Seen(rank, call, what))
        for rank in range(4)
        for call in range(2)
        for what in (*STAGES, *RESULTS)
        if call == 0 or what != "k_gathered"
    }
    assert set(found.outputs) == set(found.rows) == wanted
    for name, value in found.outputs.items():
        assert found.rows[name].shape == value.shape[:-1]


def test_padding_is_not_judged() -> None:
    ranks = Ranks(Parallelism(tp_degree=3))  # 4 query heads padded to 6
    values, padded, real = ranks.values(), Seen(2, 0, "attn"), Seen(1, 0, "attn")
    assert ranks.layer.prefill.layout.q_part(2) == (-1, -1)
    values[padded], values[real] = values[padded].copy(), values[real].copy()
    values[padded][:] = np.nan  # heads of zeros may hold anything
    values[real][1, :, 5:] = np.nan  # and so may what follows the second prompt's 5 tokens
    assert ranks.judge(values).verdict == "CONFORMS"
    values[real][0, 0, 0] = np.nan
    verdict = ranks.judge(values)
    assert (verdict.verdict, verdict.culprits) == ("MALFORMED", (1,))


def rewritten(stage: str, change: Callable[[int, Array], Array]) -> RankObserver:
    def of_rank(rank: int) -> Observer:
        def see(name: str, value: Array, how: Accumulation | None = None, /) -> Array:
            return change(rank, value) if name == stage else value

        return see

    return of_rank


def test_the_output_bias_on_every_rank_names_those_that_add_it_again() -> None:
    ranks = Ranks(Parallelism(tp_degree=4))
    bias = ranks.inputs.weights.o_bias
    again = rewritten("o_product", lambda rank, value: value + (bias if rank else 0.0))
    verdict = ranks.judge(ranks.values(rewrite=again))
    assert verdict.culprits == (1, 2, 3)
    assert verdict.reason.startswith("ranks 1, 2 and 3 deviate first, in prompt o_product: ")
    assert verdict.reason.endswith("; in all, ranks 0, 1, 2 and 3 deviate")
    assert verdict.ranks[0].first == "prompt output"


def test_tiled_key_value_heads_name_the_ranks_with_other_heads() -> None:
    ranks = Ranks(Parallelism(tp_degree=4))
    stage, whole = ranks.layer.decode, ranks.inputs.weights
    tiled = replace(stage.layout, kv_heads=(0, 1, 0, 1))
    bad = ranks.with_weights(stage, lambda rank: rank_weights(LAYER, whole, tiled, rank))
    verdict = ranks.judge(ranks.values(replace(ranks.layer, prefill=bad, decode=bad)))
    assert verdict.culprits == (1, 2)
    assert "in prompt k_proj" in verdict.reason


def test_the_rank_order_of_decode_left_out_names_the_ranks_that_moved() -> None:
    ranks = Ranks(Parallelism(tp_degree=4, cp_degree=2))
    stage, whole = ranks.layer.decode, ranks.inputs.weights
    assert stage.ordering == (0, 2, 1, 3)
    bad = ranks.with_weights(stage, lambda rank: rank_weights(LAYER, whole, stage.layout, rank))
    verdict = ranks.judge(ranks.values(replace(ranks.layer, decode=bad)))
    assert verdict.culprits == (1, 2)
    assert "in step 1 q_proj" in verdict.reason


def test_a_mask_off_by_one_names_the_rows_it_shifts(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(Parallelism(tp_degree=4, cp_degree=2), steps=0)

    def late(*qkv: Any, q_positions: Any, **options: Any) -> Attended:
        return attend(*qkv, q_positions=q_positions - (q_positions >= 4), **options)

    with monkeypatch.context() as planted:
        planted.setattr(golden.sharding.context_attention, "attend", late)
        values = ranks.values()
    verdict = ranks.judge(values)
    assert verdict.culprits == (2, 3)
    assert "in prompt attn" in verdict.reason


def test_base_two_logsumexps_are_seen_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(Parallelism(tp_degree=2, cp_degree=2, kv_exchange="ring"), steps=0)

    def merged(parts: list[Attended]) -> Attended:
        return merge_attended([p._replace(logsumexp=p.logsumexp / np.log(2)) for p in parts])

    with monkeypatch.context() as planted:
        planted.setattr(golden.sharding.context_attention, "merge_attended", merged)
        values = ranks.values()
    verdict = ranks.judge(values)
    assert verdict.culprits == (1,)  # the first row's tokens see no keys of the second
    assert "in prompt o_product" in verdict.reason
    assert [rank.verdict for rank in verdict.ranks] == ["DEVIATES"] * 2


def test_keys_written_for_the_wrong_head_name_the_rank() -> None:
    config = replace(LAYER, num_key_value_heads=4)
    ranks = Ranks(Parallelism(tp_degree=4, cp_degree=2), config=config)
    assert ranks.layer.written == ((0,), (0,), (1,), (1,))
    bad = replace(ranks.layer, written=((0,), (0,), (0,), (1,)))
    verdict = ranks.judge(ranks.values(bad))
    assert verdict.culprits == (2,)
    assert verdict.reason.startswith("rank 2 deviates first, in prompt k_cache: ")


def test_sinks_of_another_rank_name_the_rank() -> None:
    config = replace(LAYER, learned_sinks_size=1)
    ranks = Ranks(Parallelism(tp_degree=4), config=config, steps=0)
    stage = ranks.layer.prefill
    other = replace(stage.weights[3], sinks=stage.weights[0].sinks)
    bad = replace(stage, weights=(*stage.weights[:3], other))
    verdict = ranks.judge(ranks.values(replace(ranks.layer, prefill=bad)))
    assert verdict.culprits == (3,)
    assert "in prompt attn" in verdict.reason


def test_swapped_batch_rows_are_seen_where_rows_part() -> None:
    ranks = Ranks(Parallelism(tp_degree=4, attention_dp_degree=2), lengths=(8, 8))
    stage = ranks.layer.decode
    bad = replace(stage, mesh=Mesh(stage.mesh.rows[::-1]))
    verdict = ranks.judge(ranks.values(replace(ranks.layer, decode=bad)))
    assert verdict.culprits == (0, 1, 2, 3)
    assert "in prompt k_cache" in verdict.reason


def test_a_lost_reduction_is_seen_where_it_is_lost() -> None:
    ranks = Ranks(Parallelism(tp_degree=4), steps=0, stages=("o_product", "o_reduced"))
    values = ranks.values()
    values[Seen(1, 0, "o_reduced")] = values[Seen(1, 0, "o_product")]
    verdict = ranks.judge(values)
    assert verdict.culprits == (1,)
    assert verdict.ranks[1].first == "prompt o_reduced"


@pytest.mark.parametrize(
    ("changes", "verdict", "culprits", "words"),
    [
        (
            {1: ("CRASHED", "rank 1 raised"), 0: ("TIMED_OUT", "rank 0 waits in all_reduce")},
            "CRASHED",
            (1,),
            "rank 1 raised; rank 0 waits in all_reduce",
        ),
        (
            {0: ("TIMED_OUT", "rank 0 waits"), 1: ("TIMED_OUT", "rank 1 waits")},
            "TIMED_OUT",
            (0, 1),
            "rank 0 waits; rank 1 waits",
        ),
    ],
)
def test_v1_a_rank_that_did_not_finish_decides(
    changes: dict[int, tuple[str, str]], verdict: str, culprits: tuple[int, ...], words: str
) -> None:
    ranks = Ranks(Parallelism(tp_degree=2), steps=0)
    good = observed(ranks.case, ranks.values())
    given = [
        replace(o, values={}, failure=changes[o.rank][0], state=changes[o.rank][1])
        if o.rank in changes
        else o
        for o in good
    ]
    found = judge_ranks(ranks.case, ranks.inputs, given, PROFILE)
    assert (found.verdict, found.culprits, found.reason) == (verdict, culprits, words)
    assert found.ranks[0].verdict == changes[0][0]


def test_v1_a_rank_that_was_not_heard_of_crashed() -> None:
    ranks = Ranks(Parallelism(tp_degree=2), steps=0)
    found = judge_ranks(ranks.case, ranks.inputs, observed(ranks.case, ranks.values())[:1], PROFILE)
    assert (found.verdict, found.culprits) == ("CRASHED", (1,))
    assert found.reason == "rank 1 was not heard of"
    assert found.ranks[0].verdict == "UNSUPPORTED"


def test_v3_a_lost_rank_is_named_by_the_runs_own_verdict() -> None:
    ranks = Ranks(Parallelism(tp_degree=2), steps=0)
    good = observed(ranks.case, ranks.values())[0]
    summed = Collective((0, 1), "all_reduce float32 (2, 8, 32)")
    waits = RankReport(0, "stopped", "", (summed,), True)
    for lost, report in {
        "rank 1 died: signal SIGKILL; before its first collective": (
            waits,
            RankReport(1, "died", "signal SIGKILL"),
        ),
        "rank 1 raised: no such head; before its first collective": (
            RankReport(0, "finished", result=dict(good.values)),
            RankReport(1, "raised", "no such head"),
        ),
    }.items():
        found = judge_run(ranks.case, ranks.inputs, RunReport(report, 1.0), PROFILE)
        assert (found.verdict, found.culprits, found.reason) == ("CRASHED", (1,), lost)


def test_v3_a_run_that_ended_well_is_judged_by_its_values() -> None:
    ranks = Ranks(Parallelism(tp_degree=2), steps=0)
    finished = tuple(
        RankReport(o.rank, "finished", result=dict(o.values))
        for o in observed(ranks.case, ranks.values())
    )
    found = judge_run(ranks.case, ranks.inputs, RunReport(finished, 1.0), PROFILE)
    assert found.verdict == "CONFORMS"


def test_a_layers_result_is_taken_apart_by_call_and_stage() -> None:
    ranks = Ranks(
        Parallelism(tp_degree=4, attention_dp_degree=2), steps=2, stages=("attn",), lengths=(8, 5)
    )
    values = ranks.values()
    reports = []
    for rank in range(4):
        of_rank = {(s.call, s.what): value for s, value in values.items() if s.rank == rank}
        cache = {what: np.zeros((1, 1, 12, 8)) for what in ("k_cache", "v_cache")}
        for call in range(3):
            for row, positions in enumerate(ranks.exact.entries(rank, call)):
                for token, at in enumerate(positions[positions >= 0]):
                    for what, held in cache.items():
                        held[row, :, at] = of_rank[call, what][row, :, token]
        result = cache | {
            "prefill": of_rank[0, "output"],
            "prefill attn": of_rank[0, "attn"],
            "decode": np.concatenate([of_rank[1, "output"], of_rank[2, "output"]], axis=1),
            "decode attn": np.concatenate([of_rank[1, "attn"], of_rank[2, "attn"]], axis=2),
        }
        reports.append(RankReport(rank, "finished", result=result))

    def verdict(of: list[RankReport]) -> ParallelVerdict:
        run = RunReport(tuple(of), 1.0)
        return judge_run(ranks.case, ranks.inputs, run, PROFILE, values=layer_values)

    assert verdict(reports).verdict == "CONFORMS"
    reports[2].result["k_cache"][0, 0, 6] *= 1.5  # position 6 of the second row: its second step
    found = verdict(reports)
    assert (found.culprits, found.ranks[2].first) == ((2,), "step 2 k_cache")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: value[:, :4], "must have shape (2, 8, 32), got (2, 4, 32)"),
        (lambda value: value * np.nan, "holds NaN or infinity"),
        (lambda value: None, "is missing"),
    ],
)
def test_malformed_values_name_rank_call_and_stage(
    change: Callable[[Array], Any], words: str
) -> None:
    ranks = Ranks(Parallelism(tp_degree=2), steps=0)
    values = ranks.values()
    seen = Seen(1, 0, "output")
    changed = change(values.pop(seen))
    if changed is not None:
        values[seen] = changed
    found = ranks.judge(values)
    assert (found.verdict, found.culprits) == ("MALFORMED", (1,))
    assert found.reason == f"rank 1 prompt output {words}"


def test_a_coarser_reduction_than_claimed_is_found() -> None:
    ranks = Ranks(Parallelism(tp_degree=4), steps=0, stages=("o_reduced",), dtype="float32")
    coarse = rewritten("o_reduced", lambda _, value: FORMATS["bfloat16"].nearest(value))
    assert ranks.judge(ranks.values()).verdict == "CONFORMS"
    verdict = ranks.judge(ranks.values(rewrite=coarse))
    assert verdict.verdict == "DEVIATES"
    assert "in prompt o_reduced" in verdict.reason


def test_the_reduction_rounds_in_its_own_dtype_and_everything_else_as_one_rank() -> None:
    parallelism = Parallelism(tp_degree=4, reduce_dtype="float32")
    reduction = reduction_profile(PROFILE, parallelism)
    assert (reduction.stores["o_product"], reduction.accumulation) == ("float32", "float32")
    assert reduction_profile(PROFILE, Parallelism(tp_degree=4)).accumulation == "bfloat16"
    see = OnRanks(Nearest(PROFILE), reduction)(0)
    value = np.array([[[1.0 + 2.0**-12, 1.0 + 2.0**-40]]])
    sums = Accumulation(4, lambda: value)
    assert np.array_equal(see("o_reduced", value, sums), FORMATS["float32"].nearest(value))
    assert np.array_equal(see("o_product", value, sums), FORMATS["bfloat16"].nearest(value))
    assert np.array_equal(see("attn_merged", value), FORMATS["bfloat16"].nearest(value))


def test_everything_that_can_be_judged_has_its_turn() -> None:
    assert set(ORDER) == {*OBSERVABLE, *RESULTS}
