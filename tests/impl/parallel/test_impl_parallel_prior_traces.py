"""Collectives of prefill over cached keys and of packed rows trace and compile as one graph."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from impl_layers import positions, tokens
from traced_ranks import (
    BATCH,
    EIGHT_BY_EIGHT,
    SEQ,
    STRIDED,
    assert_runs_on_fake_tensors,
    collectives,
    layer_on,
    one_rank,
)

from impl import NeuronAttentionBase

BLOCK = 8
MESHES: dict[str, dict[str, Any]] = {
    "context": {"tp_degree": 8, "cp_degree": 4},
    "context, sequence": {"tp_degree": 8, "cp_degree": 2, "sequence_parallel_enabled": True},
    "strided": STRIDED,
    "data": {"tp_degree": 8, "attention_dp_degree": 2},
    "context, data": {"tp_degree": 8, "cp_degree": 4, "attention_dp_degree": 2},
    "eight by eight": EIGHT_BY_EIGHT,
    "cores": {"tp_degree": 8, "flash_decoding_enabled": True},
}
STEPS = ("window", "packed")


@pytest.fixture(params=MESHES)
def run(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    with one_rank(MESHES[request.param]) as fields:
        yield fields


def step(run: dict[str, Any], kind: str) -> tuple[NeuronAttentionBase, dict[str, Any]]:
    """A layer on this rank, and the arguments of a step over its own cache."""
    spread = run["tp_degree"] if run.get("sequence_parallel_enabled") else 1
    cores = run["tp_degree"] // 4 if run.get("flash_decoding_enabled") else 1
    if kind == "window":
        run = {**run, "windowed_context_encoding_size": SEQ}
    else:
        run = {**run, "is_chunked_prefill": True, "is_block_kv_layout": True}
        run |= {"pa_num_blocks": 64, "pa_block_size": BLOCK}
    made = layer_on(run, 4, num_cores_per_group=cores)
    manager = made.parallel.make_cache(made.config)
    arguments: dict[str, Any] = {
        "kv_mgr": manager,
        "get_kv_per_layer": True,
        "update_kv_per_layer": True,
        "idx": 0,
    }
    if kind == "window":
        arguments |= {
            "hidden_states": tokens(SEQ // spread, BATCH, torch.float32),
            "position_ids": positions(SEQ, SEQ, BATCH),
            "windowed_context_encoding_window_idx": 1,
            "seq_ids": torch.arange(BATCH).flip(0),
        }
    else:
        arguments |= {
            "hidden_states": tokens(SEQ // spread, 1, torch.float32),
            "num_queries": torch.tensor([5, 1, 17, 0, 1, 1, 2, 1]),
            "computed_context_lens": torch.tensor([0, 9, 3, 7, 8, 16, 30, 2]),
            "active_block_table": torch.arange(64).view(BATCH, -1),
        }
    return made, arguments


@pytest.mark.parametrize("kind", STEPS)
def test_every_mesh_runs_on_fake_tensors(run: dict[str, Any], kind: str) -> None:
    if kind == "packed" and run.get("flash_decoding_enabled"):
        pytest.skip("refused: blocks belong to one core")
    layer, arguments = step(run, kind)
    assert_runs_on_fake_tensors(layer, arguments)


# a column of prefill, one of decode, the cores of a group, or nobody exchanges cached keys
@pytest.mark.parametrize(
    ("run", "kind", "fewest"),
    [
        ("context, data", "window", 4),
        ("context, data", "packed", 4),
        ("context, sequence", "packed", 3),
        ("strided", "window", 4),
        ("data", "packed", 2),
        ("cores", "window", 3),
    ],
    indirect=["run"],
)
def test_a_step_compiles_as_one_graph_with_its_collectives(
    run: dict[str, Any], kind: str, fewest: int
) -> None:
    started = collectives(*step(run, kind))
    assert len(started) >= fewest, started
