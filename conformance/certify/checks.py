"""Runs golden on a case and measures each of its results against the exact formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

import golden
from conformance.certify.arithmetic import Arithmetic
from conformance.certify.attend_cases import AttendCase
from conformance.certify.attention_formula import attention
from conformance.certify.attention_gradient_formula import attention_gradients
from conformance.certify.layer_formula import LayerCase, layer
from conformance.certify.layer_gradient_formula import layer_gradients
from conformance.certify.measure import Measured, measure, together
from conformance.certify.tracked import Tracked, tracked
from golden import Array
from golden.gradients import attend_vjp, context_encoding_vjp, token_generation_vjp

Change: TypeAlias = Callable[[str, Array], Array]
"""Rewrites a result of golden before it is measured: how tests plant an error."""


def unchanged(name: str, value: Array) -> Array:
    """Return the result as golden computed it."""
    return value


def check_attend(
    case: AttendCase, arithmetic: Arithmetic, change: Change = unchanged
) -> dict[str, Measured]:
    """Measure output, log-sum-exp and gradients of `attend()`.

    Rows that see nothing must have a log-sum-exp of -inf, which is checked apart from the bound.

    Returns:
        Measured values of `output`, `logsumexp` and `gradients`.
    """
    q, k, v, sinks = _attend_arrays(case, arithmetic)
    exact = attention(q, k, v, case.visible, scale=case.scale, softcap=case.softcap, sinks=sinks)
    arguments: dict[str, Any] = {
        "q_positions": np.zeros(case.q.shape[2], dtype=np.int64),
        "kv_positions": np.zeros(case.k.shape[2], dtype=np.int64),
        "mask": golden.Explicit(case.visible),
        "softmax_scale": case.scale,
        "softcap": case.softcap,
        "sinks": case.sinks,
    }
    output, logsumexp = golden.attend(case.q, case.k, case.v, **arguments)
    expected_empty = np.where(exact.sees, logsumexp, -np.inf)
    logsumexp = np.where(logsumexp == expected_empty, np.where(exact.sees, logsumexp, 0.0), np.nan)
    d_output = cotangent(output.shape)
    gradients = attend_vjp(case.q, case.k, case.v, d_output, **arguments)
    exact_gradients = attention_gradients(
        exact, q, k, v, tracked(d_output, arithmetic), case.visible, scale=case.scale, sinks=sinks
    )
    computed = {name: getattr(gradients, name) for name in exact_gradients}
    return {
        "output": measure(change("output", output), exact.output),
        "logsumexp": measure(change("logsumexp", logsumexp), exact.logsumexp),
        "gradients": _together(computed, exact_gradients, change),
    }


def _attend_arrays(
    case: AttendCase, arithmetic: Arithmetic
) -> tuple[Tracked, Tracked, Tracked, Tracked | None]:
    q, k, v = (tracked(array, arithmetic) for array in (case.q, case.k, case.v))
    return q, k, v, None if case.sinks is None else tracked(case.sinks, arithmetic)


def check_layer(
    case: LayerCase, arithmetic: Arithmetic, change: Change = unchanged
) -> dict[str, Measured]:
    """Measure output, cached keys and values, and gradients of the layer.

    Returns:
        Measured values of `output`, `cache` and `gradients`.
    """
    exact = layer(case, arithmetic)
    weights = golden.make_weights(case.config, **case.weights)
    arguments: dict[str, Any] = {
        "position_ids": case.positions,
        "rotary_position_ids": case.rotary_positions,
    }
    d_output = cotangent(case.hidden_states.shape)
    d_cache: dict[str, Any] = {}
    if case.lengths is None:
        result = golden.context_encoding(case.config, weights, case.hidden_states, **arguments)
        real = case.positions >= 0
        rows, tokens = np.nonzero(real)
        slots = case.positions[real]
        cached = {
            "k": (result.cache.k[rows, :, slots], exact.k[rows, :, tokens]),
            "v": (result.cache.v[rows, :, slots], exact.v[rows, :, tokens]),
        }
        gradients = context_encoding_vjp(
            case.config, weights, case.hidden_states, d_output, **arguments
        )
    else:
        assert case.k_cache is not None
        assert case.v_cache is not None
        arguments["cache"] = golden.filled_cache(
            case.config, case.k_cache, case.v_cache, case.lengths
        )
        result = golden.token_generation(case.config, weights, case.hidden_states, **arguments)
        cached = {"k": (result.cache.k, exact.k), "v": (result.cache.v, exact.v)}
        d_cache = {f"d_cache_{name}": cotangent(case.k_cache.shape) for name in "kv"}
        gradients = token_generation_vjp(
            case.config, weights, case.hidden_states, d_output, **arguments, **d_cache
        )
    exact_gradients = layer_gradients(case, exact, d_output, **d_cache)
    computed = {
        name: getattr(gradients if hasattr(gradients, name) else gradients.weights, name)
        for name in exact_gradients
    }
    return {
        "output": measure(change("output", result.output), exact.output),
        "cache": _together(
            {name: got for name, (got, _) in cached.items()},
            {name: want for name, (_, want) in cached.items()},
            change,
        ),
        "gradients": _together(computed, exact_gradients, change),
    }


def cotangent(shape: tuple[int, ...]) -> Array:
    """Return the cotangent that gradients are measured with: seeded normal numbers."""
    return np.random.default_rng(7).standard_normal(shape)


def _together(computed: dict[str, Array], exact: dict[str, Tracked], change: Change) -> Measured:
    return together([measure(change(name, computed[name]), exact[name]) for name in exact])
