"""Directions in which a wrong parameter moves the outputs: derivatives of the golden.

A parameter that is slightly wrong moves all elements of an output at once, along the derivative of
golden with respect to it. `conformance.score_tests` projects a subject's error on these.

Derivatives are forward differences over a relative step of 2**-20: their own error, about 2**-20
from the curvature and 2**-33 of the output from float64's roundoff, is far below what a direction
needs, and one evaluation gives each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from conformance.cases import Case
from conformance.expected import Inputs, Reference
from conformance.inputs import CoreInputs, LayerInputs
from conformance.score_tests import Direction
from conformance.serve_inputs import ServeInputs
from golden import FORMATS, Accumulation, Array, AttentionConfig, QKNorm, RopeConfig

_STEP = 2.0**-20
_ROUNDOFF = 2.0**-26
"""Slopes below this share of the output, per unit, are roundoff of the difference: 64 * 2**-33."""
_CONSTANT = 2.0 * FORMATS["float32"].unit_roundoff
"""Relative error of a constant held in float32, folded from at most two factors."""


def directions(case: Case, inputs: Inputs, expected: Reference) -> Iterator[Direction]:
    """Yield every direction that a case has, those that move nothing left out."""
    config, exact = case.config, expected.outputs

    def moved(
        name: str, unit: str, factor: float, slack: float, **change: object
    ) -> Iterator[Direction]:
        """Differentiate; `factor` turns a change of the step's own unit into `unit`."""
        changed = expected.evaluate(**change)
        for output, values in exact.items():
            slope = (changed[output] - values) / _STEP
            if _tells(slope, values):
                yield Direction(name, unit, output, slope / factor, slack=slack * factor)

    def relative(name: str, altered: AttentionConfig) -> Iterator[Direction]:
        return moved(name, "%", 100.0, _CONSTANT, config=altered)

    grown = 1.0 + _STEP
    yield from relative(
        "softmax scale", replace(config, softmax_scale=config.softmax_scale * grown)
    )
    if config.softcap is not None:
        yield from relative("softcap", replace(config, softcap=config.softcap * grown))
    if config.learned_sinks_size is not None:
        yield from _sinks(case, inputs, expected)
    if case.scope == "layer":
        if config.rope is not None:
            rope = replace(config.rope, theta=config.rope.theta * grown)
            yield from relative("RoPE theta", replace(config, rope=rope))
            if not _stores_codes(inputs):  # a code has no derivative
                shift = _Shift(config.rope)
                yield from moved("position offset", "position", 1.0, 0.0, observe=shift)
        if config.qk_norm is not None and config.qk_norm.eps > 0:
            yield from relative("norm epsilon", _with_eps(config, config.qk_norm, grown))
        for name, array in _biases(inputs).items():
            weights = {f"{name}_bias": array + _STEP}
            yield from moved(f"{name} bias", "", 1.0, 0.0, weights=weights)
    if getattr(inputs, "lora", None) is not None:
        yield from moved("LoRA scale", "%", 100.0, _CONSTANT, observe=_grown_lora)
    for output, values in exact.items():
        yield from output_shifts(case.dtype, output, values)


def output_shifts(dtype: str, output: str, values: Array) -> Iterator[Direction]:
    """Yield the shifts that truncation makes, in ulps of the output's dtype."""
    ulp = FORMATS[dtype].ulp(values)
    yield Direction("shift towards zero", "ulp", output, -np.sign(values) * ulp)
    yield Direction("shift downwards", "ulp", output, -ulp)


def _tells(slope: Array, values: Array) -> bool:
    largest = np.abs(slope).max(initial=0.0)
    return bool(largest > _ROUNDOFF * np.abs(values).max(initial=0.0))


def _stores_codes(inputs: Inputs) -> bool:
    return isinstance(inputs, ServeInputs) and inputs.quantisation is not None


def _with_eps(config: AttentionConfig, norm: QKNorm, factor: float) -> AttentionConfig:
    return replace(config, qk_norm=replace(norm, eps=norm.eps * factor))


def _biases(inputs: Inputs) -> Mapping[str, Array]:
    weights = getattr(inputs, "weights", None)
    found = {name: getattr(weights, f"{name}_bias", None) for name in "qkvo"}
    return {name: array for name, array in found.items() if array is not None}


def _served_sinks(case: Case, inputs: ServeInputs, expected: Reference) -> Iterator[Direction]:
    """Yield one direction per head and output, each head's sink moved on its own."""
    heads, sinks = case.config.num_attention_heads, inputs.weights.sinks
    assert sinks is not None
    for head in range(heads):
        step = np.where(np.arange(heads) == head, _STEP, 0.0)
        changed = expected.evaluate(weights={"sinks": sinks + step})
        for output, values in expected.outputs.items():
            slope = (changed[output] - values) / _STEP
            if _tells(slope, values):
                yield Direction(f"sink of head {head}", "logit", output, slope)


def _sinks(case: Case, inputs: Inputs, expected: Reference) -> Iterator[Direction]:
    """Yield one direction per head, unless served from one evaluation that moves all.

    A sink moves its own head alone. In scope `core` that is a slice of the output; in scope
    `layer` the heads' changes go through the output projection, which is linear.
    """
    heads = case.config.num_attention_heads
    if isinstance(inputs, ServeInputs):
        yield from _served_sinks(case, inputs, expected)
        return
    if isinstance(inputs, CoreInputs):
        assert inputs.sinks is not None
        exact = expected.outputs["output"]
        changed = expected.evaluate(weights={"sinks": inputs.sinks + _STEP})["output"]
        slope = (changed - exact) / _STEP
        for head in range(heads):
            part = (slice(None), slice(head, head + 1))
            if _tells(slope[part], exact[part]):
                yield Direction(f"sink of head {head}", "logit", "output", slope[part], part)
        return
    assert isinstance(inputs, LayerInputs)
    weights = inputs.weights
    assert weights.sinks is not None
    before, after = _Attended(), _Attended()
    expected.evaluate(observe=before)
    expected.evaluate(observe=after, weights={"sinks": weights.sinks + _STEP})
    slope = (after.value - before.value) / _STEP
    width = case.config.head_dim
    for head in range(heads):
        if _tells(slope[:, head], before.value[:, head]):
            columns = weights.o_proj[:, head * width : (head + 1) * width]
            moved = slope[:, head] @ columns.T
            yield Direction(f"sink of head {head}", "logit", "output", moved)


def _grown_lora(stage: str, value: Array, accumulation: Accumulation | None = None, /) -> Array:
    """Scale what adapters add to projections."""
    return value * (1.0 + _STEP) if stage.endswith("_lora") else value


@dataclass(slots=True, eq=False)
class _Attended:
    """Observer that keeps the attention output, `(batch, heads, q_len, head_dim)`."""

    value: Array = None  # type: ignore[assignment]

    def __call__(
        self, stage: str, value: Array, accumulation: Accumulation | None = None, /
    ) -> Array:
        if stage == "attn":
            self.value = value
        return value


@dataclass(slots=True, eq=False)
class _Shift:
    """Observer that moves every token by a fraction of a position, which is no integer."""

    rope: RopeConfig
    frequencies: Array | None = None

    def __call__(
        self, stage: str, value: Array, accumulation: Accumulation | None = None, /
    ) -> Array:
        if stage in ("rope_frequencies", "rope_scaled_frequencies"):
            self.frequencies = value
        if stage == "rope_angles" and self.frequencies is not None:
            return value + _STEP * self.frequencies
        return value
