"""`impl` as a subject once more, each layer compiled to one static graph by `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from conformance.subjects.base import LayerCall, LayerOutput, subject
from conformance.subjects.impl import build_module, run_layer, unsupported
from conformance.subjects.impl_layer import Layer
from conformance.subjects.impl_serving import build_served, serve
from conformance.subjects.serving import ServeCall, ServeOutput


class CompiledLayers:
    """Builds the layer of a call and compiles it, without leaving the graph anywhere.

    Cases that follow each other and differ in values alone, as those of another regime do, share
    one compilation: the layer built last is kept, and takes the weights of the next call if
    nothing else changed.

    Args:
        backend: of `torch.compile`.
    """

    def __init__(self, backend: str | Callable[..., Any]) -> None:
        self._backend = backend
        self._made_for: Any = None
        self._module: torch.nn.Module | None = None
        self._compiled: Any = None

    def run(self, call: LayerCall | ServeCall) -> LayerOutput | ServeOutput:
        """Run a call through its compiled layer; each shape of a schedule's steps is a graph.

        Raises:
            Unsupported: the module refuses a step or the cache; its own sentence says why.
        """
        if not isinstance(call, ServeCall):
            return run_layer(call, self)
        try:
            return serve(call, self)
        except torch._dynamo.exc.Unsupported:
            serve(call)  # Dynamo has other words for what the module raises while it is traced
            raise

    def __call__(self, call: LayerCall | ServeCall) -> Layer:
        """Return the compiled module of a call, and keyword arguments for its forward."""
        if isinstance(call, ServeCall):
            module, keywords = build_served(call)
        else:
            module, keywords = build_module(call)
        made_for = (_signature(call), module.neuron_config)
        if self._module is not None and made_for == self._made_for:
            self._module.load_state_dict(module.state_dict())
            return self._compiled, keywords
        torch._dynamo.reset()  # or graphs of layers that are gone pile up to Dynamo's limit
        self._made_for, self._module = made_for, module
        self._compiled = torch.compile(module, backend=self._backend, fullgraph=True, dynamic=False)
        return self._compiled, keywords


def _signature(value: Any) -> Any:
    """Return what a graph depends on: everything but the values of tensors."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if is_dataclass(value):
        named = {field.name: _signature(getattr(value, field.name)) for field in fields(value)}
        return type(value), named
    if isinstance(value, Mapping):
        return {name: _signature(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_signature(item) for item in value]
    return value


_layers = CompiledLayers("inductor")


@subject(scope="layer", profile="native", unsupported=unsupported, serves=True)
def attention_layer(call: LayerCall | ServeCall) -> LayerOutput | ServeOutput:
    """Run `NeuronAttentionBase` as one graph, with the code that Inductor makes of it."""
    return _layers.run(call)
