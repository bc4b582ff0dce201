"""`impl` on real ranks conforms, and mistakes planted in it are found and named by rank."""

from dataclasses import replace
from typing import Any

import planted_ranks
import pytest

from conformance.extras import NO_EXTRAS, Extras
from conformance.parallel.cases import AXES, build_case, parallel_cases
from conformance.parallel.run import judge_on_ranks
from conformance.parallel.workloads import ParallelWorkload
from golden.sharding import Parallelism

PLAIN = {**{axis: choices[0] for axis, choices in AXES.items()}, "heads": (8, 2)}


def workload(**values: Any) -> ParallelWorkload:
    extras = values.pop("extras", NO_EXTRAS)
    made = build_case({**PLAIN, **values})
    return replace(made, lengths=(24, 9, 24, 9), piece=12 if made.piece else 0, extras=extras)


LORA = Extras(adapters=3, rank=4)
CASES = {
    "heads over ranks": workload(mesh=(4, 1, 1), heads=(6, 2), bias="qkvo", qkv="fused"),
    "sequence over ranks": workload(mesh=(4, 2, 1), sinks=True, mask="window", dtype="bfloat16"),
    "sequence, then batch": workload(mesh=(8, 2, 2), heads=(8, 2), sequence="pieces", norm="flat"),
    "chunks over ranks": workload(mesh=(4, 4, 1), heads=(7, 1), mask="chunk"),
    "a prompt in pieces, heads apart": workload(
        mesh=(4, 2, 1), heads=(4, 4), sinks=True, prompt="pieces", dtype="bfloat16"
    ),
    "a prompt in pieces, rows and heads apart": workload(
        mesh=(8, 4, 2), heads=(8, 4), prompt="pieces", bias="qkvo"
    ),
    "packed rows in pieces": workload(
        mesh=(8, 4, 2), heads=(8, 4), prompt="packed", sequence="pieces", mask="window"
    ),
    "adapters, cut twice": replace(
        workload(mesh=(4, 2, 1), heads=(4, 4), bias="qkvo", dtype="bfloat16"), extras=LORA
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_impl_conforms_on_processes(name: str) -> None:
    verdict = judge_on_ranks(CASES[name])
    assert (verdict.verdict, verdict.reason) == ("CONFORMS", "")


@pytest.mark.parametrize("place", ["after_global", "between", "before_global"])
def test_chunked_layers_that_hand_tokens_on_conform(place: Any) -> None:
    spread = Parallelism(tp_degree=4, cp_degree=2, interleave=place)
    case = replace(CASES["chunks over ranks"], parallelism=spread)
    verdict = judge_on_ranks(case, threads=True)
    assert (verdict.verdict, verdict.reason) == ("CONFORMS", "")


SPREAD = replace(
    workload(mesh=(4, 1, 1), sinks=True),
    parallelism=Parallelism(tp_degree=4, cores_per_group=2),
    stages=("logsumexp_sent", "attn"),
)


def test_flash_decoding_conforms() -> None:
    verdict = judge_on_ranks(SPREAD)
    assert (verdict.verdict, verdict.reason) == ("CONFORMS", "")


@pytest.mark.parametrize(
    ("subject", "culprits"),
    [
        (planted_ranks.base_two_row_sums, (1,)),
        # the same mistake on every rank is every rank's: none may be left out
        (planted_ranks.base_two_row_sums_on_all, (0, 1, 2, 3)),
    ],
)
def test_row_sums_in_base_two_name_the_ranks_that_send_them(
    subject: Any, culprits: tuple[int, ...]
) -> None:
    verdict = judge_on_ranks(SPREAD, subject)
    assert (verdict.verdict, verdict.culprits) == ("DEVIATES", culprits)
    assert "in step 1 logsumexp_sent" in verdict.reason
    assert "in all, ranks 0, 1, 2 and 3 deviate" in verdict.reason  # they join what they are sent


PLANTED: list[tuple[Any, dict[str, Any], tuple[int, ...], str]] = [
    (
        planted_ranks.o_bias_on_every_rank,
        {"mesh": (4, 1, 1), "bias": "qkvo"},
        (0, 1, 2, 3),
        "in prompt output",
    ),
    (
        planted_ranks.kv_heads_tiled,
        {"mesh": (4, 1, 1), "heads": (8, 2)},
        (1, 2),
        "in prompt k_cache",
    ),
    (
        planted_ranks.decode_weights_in_rank_order,
        {"mesh": (4, 2, 1), "heads": (4, 4)},
        (1, 2),
        "in step 1 k_cache",
    ),
    (planted_ranks.mask_off_by_one, {"mesh": (4, 2, 1)}, (2, 3), "in prompt attn"),
    (
        planted_ranks.kv_written_for_another_head,
        {"mesh": (4, 2, 1), "heads": (4, 4)},
        (1,),
        "in prompt k_cache",
    ),
    (
        planted_ranks.sinks_of_another_rank,
        {"mesh": (4, 1, 1), "sinks": True},
        (1,),
        "in prompt attn",
    ),
    (
        planted_ranks.prefix_counted_from_own_tokens,
        {"mesh": (4, 2, 1), "mask": "window", "prompt": "pieces"},
        (2, 3),
        "in piece 2 attn",
    ),
    (
        planted_ranks.prefix_of_own_heads,
        {"mesh": (4, 2, 1), "heads": (4, 4), "prompt": "pieces"},
        (0, 1, 2, 3),
        "in piece 2 attn",
    ),
    (
        planted_ranks.segments_cut_by_piece,
        {"mesh": (4, 2, 1), "prompt": "packed"},
        (2, 3),
        "in piece 1 attn",
    ),
    (
        planted_ranks.sequences_kept_by_every_rank,
        {"mesh": (2, 2, 2), "prompt": "packed", "heads": (8, 1)},
        (1,),  # rank 0 has the tokens of sequences that the first do keep
        "in piece 2 attn",
    ),
    (
        planted_ranks.adapters_of_prefill_in_decode,
        {"mesh": (4, 2, 1), "heads": (4, 4), "extras": LORA},
        (1, 2),
        "in step 1 k_cache",
    ),
    (
        planted_ranks.batch_rows_swapped,
        {"mesh": (2, 1, 2), "heads": (8, 1)},
        (0, 1),
        "in step 1 k_cache",
    ),
]


@pytest.mark.parametrize(
    ("subject", "values", "culprits", "words"), PLANTED, ids=[p[0].__name__ for p in PLANTED]
)
def test_a_planted_mistake_is_named_by_rank(
    subject: Any, values: dict[str, Any], culprits: tuple[int, ...], words: str
) -> None:
    verdict = judge_on_ranks(workload(**values), subject)
    assert verdict.verdict == "DEVIATES"
    assert verdict.culprits == culprits
    assert words in verdict.reason


def test_a_rank_killed_in_decode_is_named() -> None:
    verdict = judge_on_ranks(workload(mesh=(4, 1, 1)), planted_ranks.killed_in_decode)
    assert verdict.verdict == "CRASHED"
    assert verdict.reason.startswith("rank 3 died: signal SIGKILL; after collective 1, all_reduce")
    assert 3 in verdict.culprits


def test_cases_cover_every_mesh_and_every_pair_of_values_that_a_layer_may_have() -> None:
    cases = parallel_cases()
    assert len({case.id for case in cases}) == len(cases)
    meshes = {
        (c.parallelism.tp_degree, c.parallelism.cp_degree, c.parallelism.attention_dp_degree)
        for c in cases
    }
    assert meshes == set(AXES["mesh"])
    assert len(meshes) == 17
    for dtype in ("float32", "bfloat16"):
        for cp in (1, 2, 4):
            assert any(c.dtype == dtype and c.parallelism.cp_degree == cp for c in cases)
    adapted = [c for c in cases if c.extras.adapters]
    assert len(adapted) == 2 * len(meshes)
    behind = [c for c in cases if c.steps == 8]
    apart = [c.parallelism.cp_degree != c.parallelism.attention_dp_degree for c in behind]
    assert all(a or c.parallelism.cores_per_group > 1 for a, c in zip(apart, behind, strict=True))
