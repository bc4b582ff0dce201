"""Cases as files, for subjects that run elsewhere or in another language.

`export_case` writes what a subject gets, `subject_from_file` judges what it wrote. Both files are
safetensors: named tensors in the case's dtype, with the case's id as metadata.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from conformance.case_ids import parse
from conformance.cases import Case
from conformance.errors import UsageError
from conformance.runner import call_of, inputs_of
from conformance.subjects.base import CoreCall, LayerCall, LayerOutput, Subject

_CASE = "attn_conformance_case"
_OUTPUTS = {"core": ("output",), "layer": ("output", "k_cache", "v_cache")}


def export_case(case: Case, path: Path) -> None:
    """Write a case's inputs.

    The tensors carry the names of `CoreCall` or `LayerCall`, weights as `weights.q_proj` and so on;
    the metadata holds the id, the configuration and the workload as JSON.

    Args:
        case: what to write.
        path: file to write, replaced if it exists.

    Raises:
        UsageError: the file cannot be written, or the case's inputs cannot be had here.
    """
    call = call_of(case, inputs_of(case))
    tensors = {name: value for name, value in _fields(call) if isinstance(value, torch.Tensor)}
    if isinstance(call, LayerCall):
        tensors |= {f"weights.{name}": value for name, value in call.weights.items()}
    metadata = {
        _CASE: case.id,
        "config": json.dumps(asdict(case.config)),
        "workload": json.dumps(asdict(case.workload)),
        "outputs": " ".join(_OUTPUTS[case.scope]),
    }
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be written: {error}") from error


def _fields(call: CoreCall | LayerCall) -> list[tuple[str, Any]]:
    return [(name, getattr(call, name)) for name in type(call).__slots__]


def subject_from_file(path: Path, *, case: str | None, profile: str) -> tuple[Case, Subject]:
    """Return the case a file of outputs belongs to, and a subject that answers with them.

    Args:
        path: safetensors file with `output`, and for a layer `k_cache` and `v_cache`, as
            `CoreCall`'s and `LayerCall`'s subjects return them.
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
    missing = [name for name in _OUTPUTS[found.scope] if name not in tensors]
    if missing:
        raise UsageError(
            f"{path} must hold {', '.join(_OUTPUTS[found.scope])}, lacks {', '.join(missing)}"
        )

    def answer(_: CoreCall | LayerCall) -> torch.Tensor | LayerOutput:
        if found.scope == "core":
            return tensors["output"]
        return LayerOutput(**{name: tensors[name] for name in _OUTPUTS["layer"]})

    return found, Subject(name=str(path), function=answer, scope=found.scope, profile=profile)
