"""Collectives of prefill over cached keys and of packed rows trace and compile as one graph."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from impl_layers import HIDDEN, WIDTH, model, positions, tokens
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from impl import NeuronAttentionBase, RotaryEmbedding

SEQ, BATCH, BLOCK = 32, 8, 8
MESHES: dict[str, dict[str, Any]] = {
    "context": {"tp_degree": 8, "cp_degree": 4},
    "context, sequence": {"tp_degree": 8, "cp_degree": 2, "sequence_parallel_enabled": True},
    "strided": {
        "tp_degree": 4,
        "cp_degree": 2,
        "strided_context_parallel_kernel_enabled": True,
        "logical_nc_config": 2,
    },
    "data": {"tp_degree": 8, "attention_dp_degree": 2},
    "context, data": {"tp_degree": 8, "cp_degree": 4, "attention_dp_degree": 2},
    "eight by eight": {"tp_degree": 64, "cp_degree": 8, "attention_dp_degree": 8},
    "cores": {"tp_degree": 8, "flash_decoding_enabled": True},
}
STEPS = ("window", "packed")


@pytest.fixture(params=MESHES)
def run(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    fields = dict(MESHES[request.param])
    dist.init_process_group(
        "fake",
        store=FakeStore(),
        rank=min(5, fields["tp_degree"] - 1),
        world_size=fields["tp_degree"],
    )
    fields["is_continuous_batching"] = fields.get("attention_dp_degree", 1) > 1
    yield {"batch_size": BATCH, "seq_len": 64, "fused_qkv": True, **fields}
    dist.destroy_process_group()


def step(run: dict[str, Any], kind: str) -> tuple[NeuronAttentionBase, dict[str, Any]]:
    """A layer on this rank, and the arguments of a step over its own cache."""
    spread = run["tp_degree"] if run.get("sequence_parallel_enabled") else 1
    cores = run["tp_degree"] // 4 if run.get("flash_decoding_enabled") else 1
    if kind == "window":
        run = {**run, "windowed_context_encoding_size": SEQ}
    else:
        run = {**run, "is_chunked_prefill": True, "is_block_kv_layout": True}
        run |= {"pa_num_blocks": 64, "pa_block_size": BLOCK}
    heads, kv = 64, 4
    config = model(
        torch.float32,
        run,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        num_cores_per_group=cores,
    )
    made = NeuronAttentionBase(
        config,
        HIDDEN,
        heads,
        kv,
        WIDTH,
        rotary_emb=RotaryEmbedding(WIDTH),
        qkv_bias=True,
        o_bias=True,
        num_cores_per_group=cores,
    ).eval()
    manager = made.parallel.make_cache(config)
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
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        got = layer(**fake)
    assert got.hidden_states.shape == arguments["hidden_states"].shape
    assert got.present_key_value[0].shape == arguments["kv_mgr"].past_key_values[0].shape


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
    layer, arguments = step(run, kind)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)
    got, expected = compiled(**arguments), layer(**arguments)
    assert got.hidden_states.shape == expected.hidden_states.shape
    assert len(graphs) == 1
    names = [str(node.target) for node in graphs[0].graph.nodes]
    started = [name for name in names if "_c10d_functional" in name and "wait" not in name]
    assert len(started) >= fewest, started
