"""Collectives trace: fake tensors and whole-graph compilation on one rank of a fake group."""

import itertools
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

from impl import LoraServingConfig, NeuronAttentionBase

MESHES: dict[str, dict[str, Any]] = {
    "tensor": {"tp_degree": 4},
    "sequence": {"tp_degree": 4, "sequence_parallel_enabled": True},
    "context": {"tp_degree": 8, "cp_degree": 4},
    "context, sequence": {"tp_degree": 8, "cp_degree": 2, "sequence_parallel_enabled": True},
    "strided": STRIDED,
    "data": {"tp_degree": 4, "attention_dp_degree": 2, "cp_degree": 2},
    "data, pieces": {"tp_degree": 8, "attention_dp_degree": 2, "ep_dispatch_cc_option": "RS_AG"},
    "cores": {"tp_degree": 4, "flash_decoding_enabled": True},
    "eight by eight": EIGHT_BY_EIGHT,
}
LAYERS: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"sliding_window": 5},
    "chunk": {"attention_chunk_size": 16},
    "norm": {"use_qk_norm": True, "rms_norm_eps": 1e-6},
    "adapters": {"lora": LoraServingConfig(max_loras=2, max_lora_rank=3)},
    "cores": {"num_cores_per_group": 4},
}


def served() -> Iterator[tuple[str, str]]:
    """Meshes and layers that go together: flash decoding has a mesh and a layer of its own."""
    for (mesh, fields), kind in itertools.product(MESHES.items(), LAYERS):
        limited = kind in ("window", "chunk")
        unlimited = mesh in ("strided", "cores")
        chunked_data = kind == "chunk" and fields.get("attention_dp_degree", 1) > 1
        if (
            not (limited and unlimited)
            and not chunked_data
            and (mesh == "cores") == (kind == "cores")
        ):
            yield mesh, kind


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    with one_rank(MESHES[request.param]) as fields:
        yield fields


def made(
    run: dict[str, Any], lora: LoraServingConfig | None = None, **features: Any
) -> NeuronAttentionBase:
    return layer_on({**run, "lora_config": lora}, 1, **features)


def steps(layer: NeuronAttentionBase, run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Arguments of a prefill and of a decode step on this rank, with its own cache."""
    pieces = run["tp_degree"] if run.get("sequence_parallel_enabled") else 1
    manager = layer.parallel.make_cache(layer.config)
    cache = {"kv_mgr": manager, "update_kv_per_layer": True, "idx": 0}
    if layer.lora is not None:
        cache["adapter_ids"] = torch.tensor([0, -1, 1, 0] * (BATCH // 4))
    return {
        "prefill": {
            "hidden_states": tokens(SEQ // pieces, BATCH, torch.float32),
            "attention_mask": torch.ones(BATCH, SEQ, dtype=torch.bool),
            "position_ids": positions(SEQ, batch=BATCH),
            **cache,
        },
        "decode": {
            "hidden_states": tokens(1, BATCH, torch.float32),
            "position_ids": positions(1, SEQ, BATCH),
            "get_kv_per_layer": True,
            **cache,
        },
    }


@pytest.mark.parametrize(("run", "kind"), tuple(served()), indirect=["run"])
def test_every_mesh_runs_on_fake_tensors(run: dict[str, Any], kind: str) -> None:
    layer = made(run, **LAYERS[kind])
    for arguments in steps(layer, run).values():
        assert_runs_on_fake_tensors(layer, arguments)


# those with a collective of their own; the others are made of the same
@pytest.mark.parametrize(
    ("run", "kind"),
    [
        *((mesh, "full") for mesh in ("tensor", "context, sequence", "strided", "data, pieces")),
        # each phase has its own part of the adapters
        *((mesh, "adapters") for mesh in ("context", "data, pieces")),
        ("cores", "cores"),
    ],
    indirect=["run"],
)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_mesh_compiles_as_one_graph_with_its_collectives(
    run: dict[str, Any], kind: str, phase: str
) -> None:
    layer = made(run, **LAYERS[kind])
    assert collectives(layer, steps(layer, run)[phase])
