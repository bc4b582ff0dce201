"""A `torch.compile` backend with the stages of Neuron's: Dynamo, AOT Autograd, StableHLO, compiler.

Neuron's native backend gives the StableHLO to neuronx-cc; this one gives it to XLA's compiler for
CPU. A graph that does not lower, or that no compiler of StableHLO takes, fails here without a
chip. What XLA's code for CPU rounds is its own and says nothing of a chip's precision.

torch-mlir lowers, jaxlib brings XLA: the extra `stablehlo`, pinned, for neither promises to keep
the seams used here. Both are imported at first use.

Source: the stages are those AWS documents for `torch.compile(backend="neuron")`, Neuron 2.33.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch.fx import GraphModule, Node

from conformance.errors import UsageError

_PACKAGES = {"torch_mlir": "torch-mlir", "jax": "jax", "jaxlib": "jaxlib"}
_NARROW = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
}
"""Dtypes NumPy lacks: torch's integers of their width, and ml_dtypes' own."""

Executable = Callable[[list[torch.Tensor]], list[torch.Tensor | None]]


def missing() -> list[str]:
    """Return the packages of the extra that are not installed here."""
    return [name for module, name in _PACKAGES.items() if find_spec(module) is None]


def require() -> None:
    """Refuse to go on without torch-mlir and jaxlib.

    Raises:
        UsageError: one of them is not installed; says how to get it.
    """
    absent = missing()
    if absent:
        raise UsageError(
            f"StableHLO needs {' and '.join(absent)}, not installed here: "
            "pip install 'attn-conformance[stablehlo]'"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """One lowered graph.

    Attributes:
        graph: the graph of ATen operators that AOT Autograd made.
        stablehlo: its StableHLO, as text.
    """

    graph: GraphModule
    stablehlo: str

    @property
    def operators(self) -> set[str]:
        """Names of the operators of the StableHLO, such as `stablehlo.dot_general`."""
        return set(re.findall(r"\b(?:stablehlo|chlo|mhlo)\.\w+", self.stablehlo))

    @property
    def is_static(self) -> bool:
        """Whether every tensor of the StableHLO has a shape known when it was compiled."""
        return re.search(r"tensor<(?:\?|\d+x)*\?", self.stablehlo) is None


class StableHLOBackend:
    """Pass one as `torch.compile(..., backend=)`.

    Args:
        observe: called with every graph that was lowered.

    Raises:
        UsageError: torch-mlir or jaxlib is not installed.
    """

    def __init__(self, observe: Callable[[Program], object] = lambda program: None) -> None:
        require()
        self._observe = observe

    def __call__(self, graph: GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
        """Compile what Dynamo captured, forward and backward."""
        from torch._dynamo.backends.common import aot_autograd
        from torch_mlir.extras.fx_decomp_util import get_decomposition_table

        compiled: Callable[..., Any] = aot_autograd(
            fw_compiler=self._compile, decompositions=get_decomposition_table()
        )(graph, inputs)
        return compiled

    def _compile(self, graph: GraphModule, inputs: Sequence[torch.Tensor]) -> Executable:
        returned = tuple(graph.graph.output_node().args[0])  # type: ignore[arg-type]
        graph.graph.output_node().args = (tuple(out for out in returned if isinstance(out, Node)),)
        program = Program(graph=graph, stablehlo=lower(graph))
        self._observe(program)
        execute = load(program.stablehlo)

        def run(arguments: list[torch.Tensor]) -> list[torch.Tensor | None]:
            results = iter(execute(arguments))
            return [next(results) if isinstance(out, Node) else None for out in returned]

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def lower(graph: GraphModule) -> str:
    """Return the StableHLO of a graph of ATen operators whose outputs are all tensors."""
    from torch_mlir import fx

    module = fx.stateless_fx_import(graph, output_type="stablehlo", model_name="main")
    return _with_constants_inside(str(module))


def _with_constants_inside(text: str) -> str:
    """Write constants where they stand; torch-mlir keeps them apart, where XLA does not look.

    A resource is the alignment, as 4 bytes, and the elements; an inline constant is these alone.
    """
    apart = re.findall(r'(\S+): "0x[0-9A-Fa-f]{8}([0-9A-Fa-f]*)"', text)
    for name, elements in apart:
        text = text.replace(f"dense_resource<{name}>", f'dense<"0x{elements}">')
    return text


def load(stablehlo: str) -> Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]:
    """Compile StableHLO with XLA for CPU and return it as a function of its arguments."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jax._src.lib.mlir import ir

    device = jax.devices("cpu")[0]
    with mlir.make_ir_context():
        loaded = device.client.compile_and_load(
            ir.Module.parse(stablehlo),
            xla_client.DeviceList((device,)),
            xla_client.CompileOptions(),
            [],
        )

    def execute(arguments: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        with jax.enable_x64(True):  # or int64 and float64 would be cut to 32 bits
            given = [jax.device_put(_to_numpy(argument), device) for argument in arguments]
        results = loaded.execute_sharded(given).disassemble_into_single_device_arrays()
        return [_to_torch(np.array(parts[0])) for parts in results]

    return execute


def _to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    tensor = tensor.detach().contiguous()
    if tensor.dtype in _NARROW:
        bits, dtype = _NARROW[tensor.dtype]
        return tensor.view(bits).numpy().view(dtype)
    values: np.ndarray[Any, Any] = tensor.numpy()
    return values


def _to_torch(values: np.ndarray[Any, Any]) -> torch.Tensor:
    for dtype, (bits, narrow) in _NARROW.items():
        if values.dtype == narrow:
            width = np.int16 if bits == torch.int16 else np.uint8
            return torch.from_numpy(values.view(width)).view(dtype)
    return torch.from_numpy(values)
