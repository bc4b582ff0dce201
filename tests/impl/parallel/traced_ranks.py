"""One rank of a group of fake processes, and a layer's step traced on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from impl_layers import HIDDEN, WIDTH, model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from impl import NeuronAttentionBase, RotaryEmbedding

SEQ, BATCH = 32, 8
HEADS = 64
STRIDED = {
    "tp_degree": 4,
    "cp_degree": 2,
    "strided_context_parallel_kernel_enabled": True,
    "logical_nc_config": 2,
}
EIGHT_BY_EIGHT = {"tp_degree": 64, "cp_degree": 8, "attention_dp_degree": 8}


@contextmanager
def one_rank(mesh: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Be rank 5, or the last, of a mesh; gives how a layer is run there."""
    ranks, data = mesh["tp_degree"], mesh.get("attention_dp_degree", 1) > 1
    dist.init_process_group("fake", store=FakeStore(), rank=min(5, ranks - 1), world_size=ranks)
    yield {
        "batch_size": BATCH,
        "seq_len": 64,
        "fused_qkv": True,
        "is_continuous_batching": data,
        **mesh,
    }
    dist.destroy_process_group()


def layer_on(run: dict[str, Any], kv_heads: int, **features: Any) -> NeuronAttentionBase:
    """A layer in float32 on this rank."""
    config = model(
        torch.float32,
        run,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        num_cores_per_group=features.get("num_cores_per_group", 1),
    )
    return NeuronAttentionBase(
        config,
        HIDDEN,
        HEADS,
        kv_heads,
        WIDTH,
        rotary_emb=RotaryEmbedding(WIDTH),
        qkv_bias=True,
        o_bias=True,
        **features,
    ).eval()


def assert_runs_on_fake_tensors(layer: NeuronAttentionBase, arguments: dict[str, Any]) -> None:
    """Check the shapes of what a step returns; its cache is in `kv_mgr`."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        got = layer(**fake)
    assert got.hidden_states.shape == arguments["hidden_states"].shape
    assert got.present_key_value[0].shape == arguments["kv_mgr"].past_key_values[0].shape


def collectives(layer: NeuronAttentionBase, arguments: dict[str, Any]) -> list[str]:
    """Compile a step as one graph and return the collectives that it begins."""
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
    return [name for name in names if "_c10d_functional" in name and "wait" not in name]
