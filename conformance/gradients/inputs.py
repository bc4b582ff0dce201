"""The seeded inputs of a backward case: those of its call, and a cotangent of its output."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from conformance.cases import Case
from conformance.draws import Source
from conformance.inputs import CoreInputs, LayerInputs, draw_core, draw_layer
from golden import Array


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GradientInputs:
    """Inputs of a call and a cotangent, float64, exact in the case's dtype.

    Attributes:
        forward: what the call reads.
        d_output: cotangent of its output, shaped like it; zero where the query is padding, whose
            output nothing reads.
    """

    forward: LayerInputs | CoreInputs
    d_output: Array


def draw_gradients(case: Case) -> GradientInputs:
    """Draw the inputs of a backward case."""
    stream = zlib.crc32(case.id.encode())
    # a stream of its own: drawn from the call's, a cotangent would repeat its first array
    source = Source(np.random.default_rng([case.seed, stream, 1]), case.regime, case.dtype)
    config, work = case.config, case.workload
    if case.scope == "core":
        core = draw_core(case)
        d_heads = source.normal(*core.q.shape)
        used = (core.q_positions >= 0)[:, None, :, None]
        return GradientInputs(forward=core, d_output=np.where(used, d_heads, 0.0))
    layer = draw_layer(case)
    d_output = source.normal(work.batch, work.q_len, config.hidden_size)
    used = (layer.position_ids >= 0)[..., None]
    return GradientInputs(forward=layer, d_output=np.where(used, d_output, 0.0))
