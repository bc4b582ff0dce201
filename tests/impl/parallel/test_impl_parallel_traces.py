"""Collectives trace: fake tensors and whole-graph compilation on one rank of a fake group."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from impl_layers import HIDDEN, WIDTH, model, positions, tokens
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from impl import LoraServingConfig, NeuronAttentionBase, RotaryEmbedding

SEQ, BATCH = 32, 8
MESHES: dict[str, dict[str, Any]] = {
    "tensor": {"tp_degree": 4},
    "sequence": {"tp_degree": 4, "sequence_parallel_enabled": True},
    "context": {"tp_degree": 8, "cp_degree": 4},
    "context, sequence": {"tp_degree": 8, "cp_degree": 2, "sequence_parallel_enabled": True},
    "strided": {
        "tp_degree": 4,
        "cp_degree": 2,
        "strided_context_parallel_kernel_enabled": True,
        "logical_nc_config": 2,
    },
    "data": {"tp_degree": 4, "attention_dp_degree": 2, "cp_degree": 2},
    "data, pieces": {"tp_degree": 8, "attention_dp_degree": 2, "ep_dispatch_cc_option": "RS_AG"},
    "cores": {"tp_degree": 4, "flash_decoding_enabled": True},
    "eight by eight": {"tp_degree": 64, "cp_degree": 8, "attention_dp_degree": 8},
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
    fields = dict(MESHES[request.param])
    dist.init_process_group(
        "fake",
        store=FakeStore(),
        rank=min(5, fields["tp_degree"] - 1),
        world_size=fields["tp_degree"],
    )
    if fields.get("attention_dp_degree", 1) > 1:
        fields["is_continuous_batching"] = True
    yield {"batch_size": BATCH, "seq_len": 64, "fused_qkv": True, **fields}
    dist.destroy_process_group()


def made(
    run: dict[str, Any], lora: LoraServingConfig | None = None, **features: Any
) -> NeuronAttentionBase:
    heads, kv = 64, 1
    run = {**run, "lora_config": lora}
    config = model(
        torch.float32,
        run,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        num_cores_per_group=features.get("num_cores_per_group", 1),
    )
    return NeuronAttentionBase(
        config,
        HIDDEN,
        heads,
        kv,
        WIDTH,
        rotary_emb=RotaryEmbedding(WIDTH),
        qkv_bias=True,
        o_bias=True,
        **features,
    ).eval()


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
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = {
                name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
                for name, value in arguments.items()
            }
            got = layer(**fake)
        assert got.hidden_states.shape == arguments["hidden_states"].shape
        assert got.present_key_value[0].shape == arguments["kv_mgr"].past_key_values[0].shape


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
    arguments = steps(layer, run)[phase]
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)
    got, expected = compiled(**arguments), layer(**arguments)
    assert got.hidden_states.shape == expected.hidden_states.shape
    assert len(graphs) == 1
    collectives = [node for node in graphs[0].graph.nodes if "_c10d_functional" in str(node.target)]
    assert collectives
