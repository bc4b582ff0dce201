"""Subjects by name: those that ship here, and any `module:callable`."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

from conformance.errors import UsageError
from conformance.subjects.base import (
    CoreCall,
    LayerCall,
    LayerOutput,
    Subject,
    Unsupported,
    subject,
)
from conformance.subjects.serving import ServeCall, ServeOutput, ServeStep, StoredAs

__all__ = [
    "BUILT_IN",
    "CoreCall",
    "LayerCall",
    "LayerOutput",
    "ServeCall",
    "ServeOutput",
    "ServeStep",
    "StoredAs",
    "Subject",
    "Unsupported",
    "load_subject",
    "subject",
]

BUILT_IN = {
    "impl": "conformance.subjects.impl:attention_layer",
    "impl-compiled": "conformance.subjects.impl_compiled:attention_layer",
    "impl-stablehlo": "conformance.subjects.impl_stablehlo:attention_layer",
    "torch-sdpa": "conformance.subjects.torch_sdpa:attention",
}
"""Subjects that need no `module:callable`."""


def load_subject(name: str, *, profile: str | None = None) -> Subject:
    """Import a subject.

    Args:
        name: one of `BUILT_IN`, or `module:callable`; modules of the working directory count.
        profile: precision profile to judge it under instead of the one it claims.

    Raises:
        UsageError: it cannot be imported or is no callable.
    """
    path = BUILT_IN.get(name, name)
    module_name, colon, attribute = path.partition(":")
    if not colon or not module_name or not attribute:
        raise UsageError(
            f"subject must be one of {', '.join(BUILT_IN)} or 'module:callable', got {name!r}"
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(module_name)
    except UsageError as error:
        raise UsageError(f"subject {name!r}: {error}") from error
    except Exception as error:
        raise UsageError(
            f"subject {name!r} does not import: {type(error).__name__}: {error}"
        ) from error
    function: object = found
    for part in attribute.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        raise UsageError(f"subject {name!r}: {module_name} has no callable {attribute!r}")
    loaded = Subject(name=name, function=function, **getattr(function, "__conformance__", {}))
    return loaded if profile is None else replace(loaded, profile=profile)
