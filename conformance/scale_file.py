"""Golden's outputs and error scales as bytes, and back: arrays and JSON, no code.

A file is the SHA-256 of all that follows, and a safetensors image whose metadata is one JSON text.
Every number comes back bit for bit, and arrays with the order of axes they had in memory, since
sums depend on it. What is damaged or comes from elsewhere is refused before a number is taken.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from conformance.covariance import RowCovariance
from conformance.error_model import ErrorScale, Outputs
from conformance.score_tests import ScoreTest

_DIGEST = hashlib.sha256().digest_size
_LENGTH = 8
"""Bytes in which safetensors says how long its header is."""
_ARRAYS = ("row_sigma", "sigma", "row_squares", "largest_square", "sampled", "rounded")
_COVARIANCE = tuple(item.name for item in fields(RowCovariance))


class DamagedFileError(Exception):
    """Bytes that are no such file, or not of this key."""


def pack_outputs(key: str, outputs: Outputs) -> bytes:
    """Return golden's outputs as a file's bytes; `key` says what they belong to."""
    return _pack(key, dict(outputs), {})


def unpack_outputs(key: str, data: bytes) -> Outputs:
    """Return the outputs that `pack_outputs` was given.

    Raises:
        DamagedFileError: the bytes are not those, or of another key.
    """
    return _unpack(key, data)[0]


def pack_scales(key: str, scales: Mapping[str, ErrorScale]) -> bytes:
    """Return the error scales of a case as a file's bytes; `key` says what they belong to."""
    arrays: dict[str, NDArray[Any]] = {}
    told: dict[str, Any] = {}
    for name, scale in scales.items():
        for field in _ARRAYS:
            arrays[f"{name}/{field}"] = getattr(scale, field)
        if scale.covariance is not None:
            for field in _COVARIANCE:
                arrays[f"{name}/covariance/{field}"] = getattr(scale.covariance, field)
        for place, test in enumerate(scale.score_tests):
            arrays[f"{name}/test{place}/weights"] = test.weights
            arrays[f"{name}/test{place}/inverse"] = test.inverse
        told[name] = {"runs": scale.runs, "tests": [_test_told(test) for test in scale.score_tests]}
    return _pack(key, {path: x for path, x in arrays.items() if x is not None}, told)


def unpack_scales(key: str, data: bytes) -> dict[str, ErrorScale]:
    """Return the scales that `pack_scales` was given.

    Raises:
        DamagedFileError: the bytes are not those, or of another key.
    """
    arrays, told = _unpack(key, data)
    scales = {}
    for name, one in told.items():
        tests = tuple(
            _test(
                test, arrays[f"{name}/test{place}/weights"], arrays[f"{name}/test{place}/inverse"]
            )
            for place, test in enumerate(one["tests"])
        )
        parts = [arrays.get(f"{name}/covariance/{field}") for field in _COVARIANCE]
        covariance = None if parts[0] is None else RowCovariance(*parts)  # type: ignore[arg-type]
        found: dict[str, Any] = {field: arrays.get(f"{name}/{field}") for field in _ARRAYS}
        scales[name] = ErrorScale(
            **found, runs=one["runs"], score_tests=tests, covariance=covariance
        )
    return scales


def _test_told(test: ScoreTest) -> dict[str, Any]:
    told = {
        field.name: getattr(test, field.name)
        for field in fields(test)
        if field.name not in ("weights", "inverse", "part")
    }
    return told | {"part": [[s.start, s.stop, s.step] for s in test.part]}


def _test(told: dict[str, Any], weights: Any, inverse: Any) -> ScoreTest:
    part = tuple(slice(*ends) for ends in told["part"])
    return ScoreTest(**{**told, "part": part, "weights": weights, "inverse": inverse})


def _pack(key: str, arrays: Mapping[str, NDArray[Any]], told: Any) -> bytes:
    orders = {}
    stored = {}
    for name, array in arrays.items():
        order = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
        orders[name] = order
        stored[name] = np.ascontiguousarray(array.transpose(order))
    metadata = {"told": json.dumps({"key": key, "orders": orders, "told": told})}
    image = save(stored, metadata)
    return hashlib.sha256(image).digest() + image


def _unpack(key: str, data: bytes) -> tuple[dict[str, NDArray[Any]], Any]:
    image = data[_DIGEST:]
    if hashlib.sha256(image).digest() != data[:_DIGEST]:
        raise DamagedFileError("its bytes do not add up to its SHA-256")
    length = int.from_bytes(image[:_LENGTH], "little")
    header = json.loads(image[_LENGTH : _LENGTH + length])
    told = json.loads(header["__metadata__"]["told"])
    if told["key"] != key:
        raise DamagedFileError(f"it belongs to another key, {told['key'][:12]}")
    arrays = {}
    for name, array in load(image).items():
        back = np.argsort(told["orders"][name])
        arrays[name] = array.copy().transpose(back)
    return arrays, told["told"]
