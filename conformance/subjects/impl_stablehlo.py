"""`impl` as a subject by the stages of Neuron's compiler: one graph, StableHLO, XLA's CPU code."""

from __future__ import annotations

from conformance.stablehlo import StableHLOBackend
from conformance.subjects.base import LayerCall, LayerOutput, subject
from conformance.subjects.impl import unsupported
from conformance.subjects.impl_compiled import CompiledLayers
from conformance.subjects.serving import ServeCall, ServeOutput

_layers = CompiledLayers(StableHLOBackend())


@subject(scope="layer", profile="xla-cpu", unsupported=unsupported, serves=True)
def attention_layer(call: LayerCall | ServeCall) -> LayerOutput | ServeOutput:
    """Run `NeuronAttentionBase` as one graph, lowered to StableHLO and compiled by XLA for CPU."""
    return _layers.run(call)
