"""What a subject returned, as arrays: shapes, dtypes and finiteness checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from conformance.cases import Case
from conformance.error_model import Outputs
from conformance.expected import Inputs, Reference, kept_slots, written
from conformance.gradients.inputs import GradientInputs
from conformance.inputs import CoreInputs, LayerInputs
from conformance.schedule_calls import part_names
from conformance.serve_inputs import ServeInputs
from conformance.subjects.base import LayerOutput
from conformance.subjects.serving import ServeOutput
from golden import Array
from reports.records import Statistic


class Malformed(Exception):
    """A subject's output has the wrong shape, dtype or holds NaN or infinity."""


def observe(
    returned: Any, case: Case, inputs: Inputs, expected: Reference
) -> tuple[Outputs, tuple[Statistic, ...]]:
    """Turn what a subject returned into float64 arrays, refusing wrong shapes and dtypes.

    Args:
        returned: whatever the subject returned.
        case: what it was asked.
        inputs: what it was given.
        expected: golden's answer.

    Returns:
        Its outputs by name, and what else can be told from them without an error scale.

    Raises:
        Malformed: they are not what the case's call asks for.
    """
    wanted = {name: values.shape for name, values in expected.outputs.items()}
    if isinstance(inputs, ServeInputs):
        return _served(returned, case, inputs, wanted), ()
    if isinstance(inputs, GradientInputs):
        return _gradients(returned, case, wanted), ()
    if isinstance(inputs, CoreInputs):
        output = _array("output", returned, wanted["output"], case.dtype)
        return {"output": output}, ()
    if not isinstance(returned, LayerOutput):
        raise Malformed(f"a layer must return a LayerOutput, got {type(returned).__name__}")
    observed = {"output": _array("output", returned.output, wanted["output"], case.dtype)}
    kept: tuple[Statistic, ...] = ()
    if inputs.k_cache is None:
        observed["k_cache"] = _array("k_cache", returned.k_cache, wanted["k_cache"], case.dtype)
        observed["v_cache"] = _array("v_cache", returned.v_cache, wanted["v_cache"], case.dtype)
    else:
        k = _array("k_cache", returned.k_cache, inputs.k_cache.shape, case.dtype)
        v = _array("v_cache", returned.v_cache, inputs.k_cache.shape, case.dtype)
        observed["k_cache"] = written(k, inputs.position_ids)
        observed["v_cache"] = written(v, inputs.position_ids)
        kept = _kept(k, v, inputs)
    return observed, kept


def _served(
    returned: Any, case: Case, inputs: ServeInputs, wanted: Mapping[str, tuple[int, ...]]
) -> Outputs:
    """Put the steps' outputs together by part."""
    if not isinstance(returned, ServeOutput):
        raise Malformed(f"a ServeCall wants a ServeOutput, got {type(returned).__name__}")
    calls, names = inputs.walk.calls, part_names(inputs.schedule)
    if len(returned.outputs) != len(calls):
        raise Malformed(
            f"outputs must be one per step, {len(calls)} of them, got {len(returned.outputs)}"
        )
    observed = {name: np.zeros(wanted[name]) for name in names}
    for number, (call, output) in enumerate(zip(calls, returned.outputs, strict=True)):
        batch, _, hidden = wanted[names[call.part]]
        shape = (batch, call.q_len, hidden)
        columns = slice(call.first, call.first + call.q_len)
        observed[names[call.part]][:, columns] = _array(
            f"outputs[{number}]", output, shape, case.dtype
        )
    for name in ("k_cache", "v_cache"):
        observed[name] = _array(name, getattr(returned, name), wanted[name], case.dtype)
    return observed


def _gradients(returned: Any, case: Case, wanted: Mapping[str, tuple[int, ...]]) -> Outputs:
    """Take every gradient by the name of what it is the gradient of; one of a vector is a row."""
    if not isinstance(returned, Mapping):
        raise Malformed(f"a backward must return a mapping, got {type(returned).__name__}")
    observed = {}
    for output, shape in wanted.items():
        name = output.removeprefix("d_")
        if name not in returned:
            raise Malformed(f"a backward must return a gradient named {name}, got none")
        own = shape[1:] if getattr(returned[name], "ndim", 0) == 1 else shape
        observed[output] = _array(output, returned[name], own, case.dtype).reshape(shape)
    return observed


def _array(name: str, value: Any, shape: tuple[int, ...], dtype: str) -> Array:
    if not isinstance(value, torch.Tensor):
        raise Malformed(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if tuple(value.shape) != shape:
        raise Malformed(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    if value.dtype != getattr(torch, dtype):
        raise Malformed(f"{name} must have dtype {dtype}, got {str(value.dtype)[6:]}")
    array: Array = value.detach().to("cpu", torch.float64).numpy()
    return array


def check_finite(observed: Outputs, expected: Reference) -> None:
    """Refuse NaN and infinity in rows that count.

    Raises:
        Malformed: there is some.
    """
    for name, values in observed.items():
        bad = ~np.isfinite(values) & expected.rows[name][..., None]
        if bad.any():
            index = tuple(int(i) for i in np.argwhere(bad)[0])
            raise Malformed(
                f"{name}{list(index)} is {values[index]}, golden has "
                f"{expected.outputs[name][index]:.4g}; {np.count_nonzero(bad)} of {values.size} "
                "values are not finite"
            )


def _kept(k: Array, v: Array, inputs: LayerInputs) -> tuple[Statistic, ...]:
    """Count slots that token generation changed without having a token to put there."""
    slots = kept_slots(inputs)
    found = []
    for name, now, before in (("k_cache", k, inputs.k_cache), ("v_cache", v, inputs.v_cache)):
        changed = ((now != before).any(axis=-1)) & slots[:, None]
        found.append(
            Statistic(
                output=name,
                name="slots left alone",
                value=float(np.count_nonzero(changed)),
                limit=0.0,
                derivation="slots of tokens not generated here keep their bits",
                where=tuple(int(i) for i in np.argwhere(changed)[0]) if changed.any() else (),
            )
        )
    return tuple(found)
