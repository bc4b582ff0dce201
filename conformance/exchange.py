"""Cases as files, for subjects that run elsewhere or in another language.

`export_case` writes what a subject gets, `subject_from_file` judges what it wrote. Both files are
safetensors: named tensors in the case's dtype, with the case's id as metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from conformance.calls import Call, call_of
from conformance.case_ids import parse
from conformance.cases import Case
from conformance.errors import UsageError
from conformance.gradients.expected import gradient_names
from conformance.runner import inputs_of
from conformance.schedule_calls import walk
from conformance.subjects.base import LayerOutput, Subject
from conformance.subjects.serving import ServeCall, ServeOutput, ServeStep

_CASE = "attn_conformance_case"
_OUTPUTS = {"core": ("output",), "layer": ("output", "k_cache", "v_cache")}


def export_case(case: Case, path: Path) -> None:
    """Write a case's inputs.

    The tensors carry the names of `CoreCall`, `LayerCall` or `ServeCall`, those inside others with
    a dot: `weights.q_proj`, `steps.0.hidden_states`; those of a backward case are `d_output`, and
    `forward.` with the call's. The metadata holds the id, the configuration
    and the workload as JSON, the rest of every step of a schedule as `steps`, and the names of the
    outputs to hand back.

    Args:
        case: what to write.
        path: file to write, replaced if it exists.

    Raises:
        UsageError: the file cannot be written, or the case's inputs cannot be had here.
    """
    call = call_of(case, inputs_of(case))
    tensors = dict(_tensors("", call))
    metadata = {
        _CASE: case.id,
        "config": json.dumps(asdict(case.config)),
        "workload": json.dumps(asdict(case.workload)),
        "outputs": " ".join(_outputs(case)),
    }
    if isinstance(call, ServeCall):
        metadata["steps"] = json.dumps([_words(step) for step in call.steps])
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be written: {error}") from error


def _outputs(case: Case) -> tuple[str, ...]:
    """Return the names of the tensors that answer a case."""
    schedule = case.workload.schedule
    if case.workload.backward:
        return tuple(f"d_{name}" for name in gradient_names(case))
    if schedule is None:
        return _OUTPUTS[case.scope]
    steps = len(walk(schedule, case.workload.lengths).calls)
    return (*(f"outputs.{step}" for step in range(steps)), "k_cache", "v_cache")


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor inside a value, with its place."""
    if isinstance(value, torch.Tensor):
        yield name, value
        return
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, tuple):
        parts = enumerate(value)
    elif is_dataclass(value):
        parts = ((field.name, getattr(value, field.name)) for field in fields(value))
    for key, part in parts:
        yield from _tensors(f"{name}.{key}" if name else str(key), part)


def _words(step: ServeStep) -> dict[str, Any]:
    """Return what of a step is no tensor."""
    found = {field.name: getattr(step, field.name) for field in fields(step)}
    return {name: value for name, value in found.items() if not isinstance(value, torch.Tensor)}


def subject_from_file(path: Path, *, case: str | None, profile: str) -> tuple[Case, Subject]:
    """Return the case a file of outputs belongs to, and a subject that answers with them.

    Args:
        path: safetensors file with `output`, and for a layer `k_cache` and `v_cache`, as
            `CoreCall`'s and `LayerCall`'s subjects return them; for a schedule `outputs.0` and so
            on, one per step; for a backward case its gradients, `d_q` and so on.
        case: id of the case; None reads it from the file's metadata.
        profile: precision profile the outputs claim.

    Raises:
        UsageError: the file is no such file, or names no case.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors: dict[str, torch.Tensor] = {}
            for name in file.keys():  # noqa: SIM118  # the file is no dict
                tensors[name] = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} is no readable safetensors file: {error}") from error
    text = case or metadata.get(_CASE)
    if text is None:
        raise UsageError(f"{path} names no case in its metadata under {_CASE!r}; give --case")
    found = parse(text)
    wanted = _outputs(found)
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise UsageError(f"{path} must hold {', '.join(wanted)}, lacks {', '.join(missing)}")

    def answer(_: Call) -> torch.Tensor | LayerOutput | ServeOutput:
        if found.workload.schedule is not None:
            *steps, k_cache, v_cache = (tensors[name] for name in wanted)
            return ServeOutput(outputs=steps, k_cache=k_cache, v_cache=v_cache)
        if found.scope == "core":
            return tensors["output"]
        return LayerOutput(**{name: tensors[name] for name in wanted})

    gradients = {name.removeprefix("d_"): tensors[name] for name in wanted}
    return found, Subject(
        name=str(path),
        function=answer,
        scope=found.scope,
        profile=profile,
        serves=found.workload.schedule is not None,
        backward=(lambda *_: gradients) if found.workload.backward else None,
    )
