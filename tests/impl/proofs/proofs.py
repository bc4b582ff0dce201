"""What can be shown of a step without a chip. Each proof raises when it does not hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

Results = tuple[Tensor, ...]
REVIEWED = Path(__file__).with_name("reviewed_operators.txt")


def reviewed(section: str) -> set[str]:
    """Return the reviewed operators of a section: `export`, `device` or `stablehlo`."""
    text = REVIEWED.read_text(encoding="utf-8").partition(f"[{section}]")[2].partition("[")[0]
    return {line for line in text.splitlines() if line and not line.startswith("#")}


def on_fake_tensors(step: nn.Module, tensors: dict[str, Tensor]) -> Results:
    """Run without values: fails where the step reads one, or makes a tensor from one it has."""
    with FakeTensorMode() as mode:
        given = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
        state = {**dict(step.named_parameters()), **dict(step.named_buffers())}
        held = {name: mode.from_tensor(tensor) for name, tensor in state.items()}
        results: Results = torch.func.functional_call(step, held, kwargs=given)
        return results


def as_one_graph(step: nn.Module, tensors: dict[str, Tensor], backend: Any) -> Results:
    """Compile with static shapes: fails where Dynamo would leave the graph."""
    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=False)
    results: Results = compiled(**tensors)
    return results


def exported_operators(step: nn.Module, tensors: dict[str, Tensor]) -> set[str]:
    """Export, and return the operators of the graph by name."""
    program = torch.export.export(step, (), kwargs=tensors)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    return called - {"<built-in function getitem>"}


class Planted(nn.Module):
    """A step that does one thing no compiler for the device could."""

    def __init__(self, spoil: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.spoil = spoil

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Spoil `x`."""
        return (self.spoil(x) + 1,)
