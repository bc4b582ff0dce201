"""Parallel cases: readable names, inputs that fit together, and one sentence for what cannot be."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from conformance.errors import UsageError
from conformance.parallel.workloads import ParallelWorkload, draw_workload
from golden import FORMATS, AttentionConfig, RopeConfig
from golden.sharding import Parallelism

LAYER = AttentionConfig(
    hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, rope=RopeConfig()
)


def case(parallelism: Parallelism | None = None, **changes: Any) -> ParallelWorkload:
    given: dict[str, Any] = {"lengths": (8, 5), "steps": 2} | changes
    return ParallelWorkload(config=LAYER, parallelism=parallelism or Parallelism(), **given)


CONTEXT = Parallelism(tp_degree=4, cp_degree=2)
MESHES = {
    "tp1": Parallelism(),
    "tp8-cp4-dp2": Parallelism(tp_degree=8, cp_degree=4, attention_dp_degree=2),
    "tp4-cp2-sp-strided": replace(CONTEXT, sequence_parallel=True, strided=True),
    "tp4-cp2-ring-mha": replace(CONTEXT, kv_exchange="ring", strategy="convert-to-mha"),
    "tp4-dp2-agar": Parallelism(tp_degree=4, attention_dp_degree=2, ep_dispatch="AG_AR"),
    "tp4-cores2-reducefloat32": Parallelism(tp_degree=4, cores_per_group=2, reduce_dtype="float32"),
}


@pytest.mark.parametrize(("mesh", "parallelism"), MESHES.items(), ids=MESHES)
def test_an_id_names_layer_mesh_and_workload(mesh: str, parallelism: Parallelism) -> None:
    named = case(parallelism, dtype="bfloat16", seed=3).id
    assert named == f"h32-hq4-hkv2-d8-rope10000/{mesh}/cte-bf16-b2-q10_7-gaussian-seed3-behind2"


def test_ids_differ_by_what_a_mesh_does() -> None:
    meshes = [
        Parallelism(tp_degree=64, cp_degree=8, eight_by_eight=wiring, sequence_parallel=sp)
        for wiring in ("trn2", "switch", "pds")
        for sp in (False, True)
    ]
    chunked = AttentionConfig(
        hidden_size=8, num_attention_heads=2, num_key_value_heads=2, attention_chunk_size=4
    )
    for place in ("none", "after_global", "between", "before_global"):
        layer = Parallelism(tp_degree=2, cp_degree=2, interleave=place)
        meshes.append(layer)
    ids = {
        ParallelWorkload(
            config=chunked if mesh.tp_degree == 2 else LAYER, parallelism=mesh, lengths=(64,)
        ).id
        for mesh in meshes
    }
    assert len(ids) == len(meshes)


def test_a_rows_tokens_are_those_of_one_longer_prompt() -> None:
    one = case(dtype="bfloat16")
    drawn = draw_workload(one)
    assert [states.shape for states in drawn.hidden_states] == [(2, 8, 32), (2, 1, 32), (2, 1, 32)]
    assert drawn.position_ids[0].tolist() == [[*range(8)], [0, 1, 2, 3, 4, -1, -1, -1]]
    assert [at.tolist() for at in drawn.position_ids[1:]] == [[[8], [5]], [[9], [6]]]
    for states in drawn.hidden_states:
        assert np.array_equal(FORMATS["bfloat16"].nearest(states), states)
    again = draw_workload(one)
    assert np.array_equal(again.hidden_states[2], drawn.hidden_states[2])
    # the second row's first step follows its prompt: it is not the first row's
    assert not np.array_equal(drawn.hidden_states[1][0], drawn.hidden_states[1][1])


def test_a_prompt_in_pieces_is_the_whole_cut_by_tokens() -> None:
    whole, pieces = case(), case(piece=3)
    assert pieces.id == whole.id.replace("-behind2", "-pieces3-behind2")
    assert (pieces.prompt_lengths, pieces.prompts, pieces.calls) == ((3, 3, 2), 3, 5)
    one, cut = draw_workload(whole), draw_workload(pieces)
    assert np.array_equal(np.concatenate(cut.position_ids[:3], axis=1), one.position_ids[0])
    assert np.array_equal(np.concatenate(cut.hidden_states[:3], axis=1), one.hidden_states[0])
    assert np.array_equal(cut.hidden_states[3], one.hidden_states[1])


def test_packed_rows_hold_a_share_of_every_prompt_and_padding_for_the_ranks() -> None:
    packed = case(Parallelism(tp_degree=4, cp_degree=4), packed=2)
    assert packed.id.endswith("-packed2-behind2")
    assert [(row.query_lens, row.key_lens) for row in packed.packings] == [
        ((4, 2), (4, 2)),
        ((4, 3), (8, 5)),
    ]
    assert packed.prompt_lengths == (8, 8)
    drawn, whole = draw_workload(packed), draw_workload(case())
    assert drawn.position_ids[0].tolist() == [[0, 1, 2, 3, 0, 1, -1, -1]]
    assert drawn.position_ids[1].tolist() == [[4, 5, 6, 7, 2, 3, 4, -1]]
    assert np.array_equal(drawn.hidden_states[1][0, 4:7], whole.hidden_states[0][1, 2:5])
    assert np.array_equal(drawn.hidden_states[2], whole.hidden_states[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"piece": 4, "packed": 2}, "piece and packed must not be negative, nor both be given"),
        (
            {"piece": 3, "parallelism": Parallelism(tp_degree=2, cp_degree=2)},
            "q_len must be a multiple of cp_degree, got 3 and 2",
        ),
        ({"steps": -1}, "steps must not be negative, got -1"),
        ({"stages": ("attn", "softmax")}, "got softmax"),
        (
            {"lengths": (7, 5), "parallelism": Parallelism(tp_degree=2, cp_degree=2)},
            "q_len must be",
        ),
        (
            {"lengths": (8, 8, 8), "parallelism": Parallelism(tp_degree=4, attention_dp_degree=2)},
            "the batch must be a multiple of attention_dp_degree, got 3 and 2",
        ),
        (
            {"parallelism": Parallelism(tp_degree=4, attention_dp_degree=2, ep_dispatch="RS_AG")},
            "ep_dispatch RS_AG requires a batch that is a multiple of tp_degree, got 2 and 4",
        ),
        ({"dtype": "float64"}, "dtype must be one of float32, bfloat16, float16, got 'float64'"),
    ],
)
def test_cases_that_cannot_be_are_bad_use(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        case(**change)
