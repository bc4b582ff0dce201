"""Golden's gradients of a backward case."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import golden
from conformance.cases import Case
from conformance.gradients.inputs import GradientInputs
from conformance.inputs import CoreInputs, LayerInputs
from golden import Array, LayerGradients, Observer, unobserved

Gradients = Mapping[str, Array]


def gradient_evaluation(case: Case, inputs: GradientInputs) -> Callable[..., Gradients]:
    """Return what evaluates golden's vector-Jacobian product, through an observer (`observe=`).

    It returns every gradient by name, those of vectors as one row, `(1, width)`.
    """
    forward = inputs.forward
    if isinstance(forward, CoreInputs):
        return _core(case, forward, inputs.d_output)
    return _layer(case, forward, inputs.d_output)


def gradient_names(case: Case) -> tuple[str, ...]:
    """Return the names of what a case's gradients are of, as a subject's backward returns them."""
    if case.scope == "core":
        return ("q", "k", "v", *(["sinks"] if case.config.learned_sinks_size is not None else []))
    cache = ("k_cache", "v_cache") if case.workload.phase == "tkg" else ()
    return ("hidden_states", *golden.weight_shapes(case.config), *cache)


def _core(case: Case, forward: CoreInputs, d_output: Array) -> Callable[..., Gradients]:
    config = case.config

    def evaluate(*, observe: Observer = unobserved) -> Gradients:
        found = golden.attend_vjp(
            forward.q,
            forward.k,
            forward.v,
            d_output,
            q_positions=forward.q_positions,
            kv_positions=forward.kv_positions,
            mask=golden.layer_mask(config),
            softmax_scale=config.softmax_scale,
            sinks=forward.sinks,
            softcap=config.softcap,
            observe=observe,
        )
        return _named(case, found._asdict())

    return evaluate


def _layer(case: Case, forward: LayerInputs, d_output: Array) -> Callable[..., Gradients]:
    config = case.config

    def evaluate(*, observe: Observer = unobserved) -> Gradients:
        given: dict[str, Any] = {
            "position_ids": forward.position_ids,
            "rotary_position_ids": forward.rotary_position_ids,
            "observe": observe,
        }
        arguments = (config, forward.weights, forward.hidden_states, d_output)
        found: LayerGradients
        if forward.k_cache is None:
            found = golden.context_encoding_vjp(*arguments, **given)
        else:
            cache = golden.filled_cache(
                config, forward.k_cache, forward.v_cache, forward.cache_lengths
            )
            found = golden.token_generation_vjp(*arguments, cache=cache, **given)
        values = {"hidden_states": found.hidden_states, "k_cache": found.cache_k}
        values["v_cache"] = found.cache_v
        values |= {name: getattr(found.weights, name) for name in golden.weight_shapes(config)}
        return _named(case, values)

    return evaluate


def _named(case: Case, values: Mapping[str, Array | None]) -> Gradients:
    found = {}
    for name in gradient_names(case):
        value = values[name]
        assert value is not None
        found[f"d_{name}"] = value[None] if value.ndim == 1 else value
    return found
