"""Runs the golden on a case: what a subject's outputs should be, and which of their rows count."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

import golden
from conformance.cases import Case
from conformance.closed_form import ClosedForm, closed_form, is_long
from conformance.error_model import Evaluate, Outputs, RowMask
from conformance.gradients.expected import gradient_evaluation
from conformance.gradients.inputs import GradientInputs
from conformance.inputs import CoreInputs, LayerInputs
from conformance.pieces import core_pieces, in_pieces
from conformance.precision import PrecisionProfile
from conformance.scale_cache import ScaleCache
from conformance.serve_expected import INPUT_NORM_EPS, ServeGolden, serve_rows
from conformance.serve_inputs import ServeInputs
from golden import (
    Array,
    AttentionConfig,
    AttentionWeights,
    LayerResult,
    Observer,
    unobserved,
)

Inputs: TypeAlias = LayerInputs | CoreInputs | ServeInputs | GradientInputs


@dataclass(frozen=True, slots=True)
class Reference:
    """The golden's answer to a case.

    Attributes:
        outputs: exact values by name. Scope `layer`: `output` `(batch, q_len, hidden_size)`,
            `k_cache` and `v_cache`, the entries written by this call
            `(batch, num_key_value_heads, q_len, head_dim)`; a schedule has an output for each of
            its parts, `1.prompt`, `2.decode`, and the whole cache by position. Scope `core`:
            `output` `(batch, num_attention_heads, q_len, head_dim)`, evaluated in pieces where
            there are many scores (`conformance.pieces`). A backward case has a gradient
            for each thing that is differentiated (`conformance.gradients`).
        rows: per output, which rows (all axes but the last) hold something: not padding.
        evaluate: runs the golden again: with an observer (`observe=`), with another configuration
            of the same shapes (`config=`), or with some arrays replaced by name (`weights=`;
            scope `core` has `sinks` alone). Scope `core` can evaluate some queries alone
            (`queries=`, a slice of them), and leave out keys that none of them sees (`keys=`).
        form: closed form of a long core's errors, if it was evaluated along with the outputs.
    """

    outputs: Outputs
    rows: Mapping[str, RowMask]
    evaluate: Evaluate
    form: ClosedForm | None = None


def reference(
    case: Case,
    inputs: Inputs,
    cache: ScaleCache | None = None,
    profile: PrecisionProfile | None = None,
) -> Reference:
    """Evaluate the golden on a case's inputs.

    Args:
        case: the case.
        inputs: its inputs.
        cache: where outputs may be kept; those of a schedule are not, since golden's later runs
            need what its first one wrote.
        profile: what the outputs will be judged under, if it is known: without a cache the closed
            form of a long core's errors comes of the same evaluation.
    """
    if isinstance(inputs, ServeInputs):
        served = ServeGolden(case, inputs)
        return Reference(served.exact, serve_rows(case, inputs), served.evaluate)
    if isinstance(inputs, GradientInputs):
        gradients = gradient_evaluation(case, inputs)
        found = gradients()
        every = {name: np.ones(value.shape[:-1], dtype=np.bool_) for name, value in found.items()}
        return Reference(found, every, gradients)
    if isinstance(inputs, CoreInputs):
        evaluate: Evaluate = _core(case, inputs)
        used = inputs.q_positions >= 0
        heads = case.config.num_attention_heads
        rows = {"output": np.repeat(used[:, None], heads, axis=1)}
    else:
        evaluate = _layer(case, inputs)
        used = inputs.position_ids >= 0
        written = np.repeat(used[:, None], case.config.num_key_value_heads, axis=1)
        rows = {"output": used, "k_cache": written, "v_cache": written}
    exact = evaluate
    if isinstance(inputs, CoreInputs):
        pieces = core_pieces(inputs, golden.layer_mask(case.config))
        if cache is None and profile is not None and is_long(case, inputs, profile):
            form = closed_form(evaluate, inputs, case.config, profile, pieces)
            return Reference({"output": form.output}, rows, evaluate, form)
        exact = in_pieces(evaluate, pieces)
    outputs = exact() if cache is None else cache.outputs(case, inputs, exact)
    return Reference(outputs, rows, evaluate)


def _core(case: Case, inputs: CoreInputs) -> Callable[..., Outputs]:
    given: Mapping[str, Array | None] = {"sinks": inputs.sinks}

    def evaluate(
        *,
        observe: Observer = unobserved,
        config: AttentionConfig = case.config,
        weights: Mapping[str, Array] = MappingProxyType({}),
        queries: slice = slice(None),
        keys: slice = slice(None),
    ) -> Outputs:
        attended = golden.attend(
            inputs.q[:, :, queries],
            inputs.k[:, :, keys],
            inputs.v[:, :, keys],
            q_positions=inputs.q_positions[:, queries],
            kv_positions=inputs.kv_positions[:, keys],
            mask=golden.layer_mask(config),
            softmax_scale=config.softmax_scale,
            sinks={**given, **weights}["sinks"],
            softcap=config.softcap,
            observe=observe,
        )
        return {"output": attended.output}

    return evaluate


def by_pieces(case: Case, inputs: CoreInputs, expected: Reference) -> Reference:
    """Return the golden of a core evaluated in pieces of its queries; the same one if it is small.

    Its outputs are so already: a sum over fewer keys may be rounded another way, and a run that
    changes nothing must find no error.
    """
    pieces = core_pieces(inputs, golden.layer_mask(case.config))
    if len(pieces) == 1:
        return expected
    return replace(expected, evaluate=in_pieces(expected.evaluate, pieces))


def _layer(case: Case, inputs: LayerInputs) -> Callable[..., Outputs]:
    positions, lora = inputs.position_ids, inputs.lora
    cache, one_call = None, True
    if inputs.k_cache is not None:
        cache = golden.filled_cache(
            case.config, inputs.k_cache, inputs.v_cache, inputs.cache_lengths
        )
        one_call = not _scaled_by_length(case.config)

    def project(observe: Observer) -> golden.Projected:
        hidden = inputs.hidden_states
        if inputs.input_norm is not None:
            hidden = golden.add_and_normalise(
                hidden,
                weight=inputs.input_norm,
                eps=INPUT_NORM_EPS,
                residual=inputs.residual,
                observe=observe,
            ).hidden_states
        return golden.project_qkv(case.config, inputs.weights, hidden, lora=lora, observe=observe)

    # nothing is observed before the products of a bare layer, so they are the same in every run
    bare = lora is None and inputs.input_norm is None
    known = functools.cache(lambda: project(unobserved))

    def evaluate(
        *,
        observe: Observer = unobserved,
        config: AttentionConfig = case.config,
        weights: Mapping[str, Array] = MappingProxyType({}),
    ) -> Outputs:
        result: LayerResult
        arrays = replace(inputs.weights, **weights)
        projected = known() if bare else project(observe)
        rest: dict[str, Any] = {
            "position_ids": positions,
            "observe": observe,
            "rotary_position_ids": inputs.rotary_position_ids,
            "lora": lora,
        }
        if cache is None:
            # keys are compared by token, so a prompt far from position 0 needs no long cache
            result = golden.encode_projected(config, arrays, projected, **rest)
        elif one_call:
            result = golden.generate_projected(config, arrays, projected, cache=cache, **rest)
        else:
            result = _step_by_step(config, arrays, inputs, cache, observe)
        return {
            "output": result.output,
            "k_cache": written(result.cache.k, positions),
            "v_cache": written(result.cache.v, positions),
        }

    return evaluate


def _scaled_by_length(config: AttentionConfig) -> bool:
    """Tell whether a token's RoPE depends on how far the call it came with reaches."""
    scaling = None if config.rope is None else config.rope.scaling
    if isinstance(scaling, (golden.DynamicNTKScaling, golden.LongRopeScaling)):
        return not scaling.seq_len
    return False


def _step_by_step(
    config: AttentionConfig,
    weights: AttentionWeights,
    inputs: LayerInputs,
    cache: golden.ContiguousCache,
    observe: Observer,
) -> LayerResult:
    """Generate token by token, a call each."""
    outputs = []
    for step in range(inputs.position_ids.shape[1]):
        now, rotary = slice(step, step + 1), inputs.rotary_position_ids
        result = golden.token_generation(
            config,
            weights,
            inputs.hidden_states[:, now],
            position_ids=inputs.position_ids[:, now],
            cache=cache,
            observe=observe,
            rotary_position_ids=None if rotary is None else rotary[..., now],
            lora=inputs.lora,
        )
        cache = result.cache
        outputs.append(result.output)
    return LayerResult(np.concatenate(outputs, axis=1), cache)


def written(cache: Array, positions: golden.Positions) -> Array:
    """Return the cache's entries at these positions, zeros for padding.

    Args:
        cache: `(batch, num_key_value_heads, max_length, head_dim)`, slot = position.
        positions: `(batch, q_len)`, int64, -1 for padding.

    Returns:
        `(batch, num_key_value_heads, q_len, head_dim)`.
    """
    slots = np.maximum(positions, 0)[:, None, :, None]
    entries = np.take_along_axis(cache, slots, axis=2)
    return np.where(positions[:, None, :, None] >= 0, entries, 0.0)


def kept_slots(inputs: LayerInputs) -> RowMask:
    """Tell which cache slots token generation must leave alone, `(batch, max_length)`, bool."""
    if inputs.k_cache is None:
        raise ValueError("inputs must be those of token generation, got context encoding")
    batch, _, max_length, _ = inputs.k_cache.shape
    kept = np.ones((batch, max_length), dtype=np.bool_)
    np.put_along_axis(kept, inputs.position_ids, False, axis=1)
    return kept
