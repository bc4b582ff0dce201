"""What a cached value depends on, as one SHA-256: every byte of it, so that no other gives it."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import scipy

import golden
from conformance.errors import UsageError


def content_key(*parts: Any) -> str:
    """Return the SHA-256 of these values, the code that works on them and its libraries.

    Args:
        *parts: arrays, numbers, texts, None, and dataclasses, mappings, lists and tuples of them.

    Raises:
        TypeError: a part is of another type, whose bytes would not tell what it is.
    """
    found = hashlib.sha256()
    _feed(found, (source_digest(), np.__version__, scipy.__version__, platform.machine(), parts))
    return found.hexdigest()


@cache
def source_digest(folders: tuple[Path, ...] | None = None) -> str:
    """Return the SHA-256 of golden's modules and the judge's: a change of any makes all anew.

    Args:
        folders: whose modules to take; None is golden's folder and this one.

    Raises:
        UsageError: there is no source to read.
    """
    if folders is None:
        folders = (Path(golden.__file__).parent, Path(__file__).parent)
    found = hashlib.sha256()
    modules = [
        (path.relative_to(folder).as_posix(), path)
        for folder in folders
        for path in sorted(folder.rglob("*.py"))
    ]
    if not modules:
        raise UsageError(f"folders must hold Python source, got none in {folders}")
    for name, path in modules:
        _feed(found, (name, path.read_bytes()))
    return found.hexdigest()


def _feed(found: Any, value: Any) -> None:
    """Add a value with its type and length, so that no two values give the same bytes."""
    if is_dataclass(value) and not isinstance(value, type):
        _feed_items(found, value, ((f.name, getattr(value, f.name)) for f in fields(value)))
    elif isinstance(value, Mapping):
        _feed_items(found, value, sorted(value.items()))
    elif isinstance(value, (list, tuple)):
        _feed_items(found, value, enumerate(value))
    elif isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufU":
        _add(found, f"array {value.dtype.str} {value.shape}", np.asarray(value).tobytes())
    elif isinstance(value, bytes):
        _add(found, "bytes", value)
    elif value is None or isinstance(value, (bool, int, float, str)):
        _add(found, type(value).__name__, repr(value).encode())
    else:
        raise TypeError(f"a key must be made of data, got {type(value).__name__}")


def _feed_items(found: Any, value: Any, items: Iterable[tuple[Any, Any]]) -> None:
    items = list(items)
    _add(found, f"{type(value).__qualname__} of {len(items)}", b"")
    for name, item in items:
        _feed(found, name)
        _feed(found, item)


def _add(found: Any, kind: str, data: bytes) -> None:
    found.update(f"{kind} {len(data)}:".encode())
    found.update(data)
