"""GGUF files that ship inside a Python package, read without importing that package."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from golden import Array


class ModelUnavailable(ValueError):
    """A model's weights, or the package that reads them, are not installed."""


class GgufFile:
    """Tensors and metadata of one GGUF file, mapped into memory and dequantised on request."""

    def __init__(self, path: Path, gguf: Any) -> None:
        self.path = path
        self._gguf = gguf
        self._reader = gguf.GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    @property
    def tensor_types(self) -> dict[str, str]:
        """Tensor name to the name of its storage format, such as `F32`, `Q8_0` or `Q4_1`."""
        return {name: tensor.tensor_type.name for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> Array:
        """Return a tensor, dequantised to float32 by its format's rule and widened to float64.

        The float32 values are the weights by definition: every reader of the file makes the same
        ones, so widening them adds no error of its own.

        Args:
            name: such as `blk.0.attn_q.weight`.

        Returns:
            A fresh array, float64; a matrix as `(out, in)`.
        """
        stored = self._tensors[name]
        values = self._gguf.dequantize(stored.data, stored.tensor_type)
        array: Array = values.astype(np.float64)
        return array

    def number(self, key: str) -> float:
        """Return a number of the metadata; a float32 is widened as it is stored."""
        return float(self._reader.get_field(key).parts[-1][0])

    def text(self, key: str) -> str:
        """Return a string of the metadata."""
        return bytes(self._reader.get_field(key).parts[-1]).decode("utf-8")


def open_packaged(package: str, *, advice: str) -> GgufFile:
    """Open the one GGUF file inside an installed package, whose own code does not run.

    Args:
        package: import name of the package that holds the file.
        advice: the one sentence to raise when the file or the `gguf` reader is missing.

    Returns:
        The opened file.

    Raises:
        ModelUnavailable: the package or the reader is not installed, or the package does not hold
            exactly one GGUF file.
    """
    spec = find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    paths = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if len(paths) != 1:
        raise ModelUnavailable(advice)
    try:
        gguf = importlib.import_module("gguf")
    except ImportError as error:
        raise ModelUnavailable(advice) from error
    return GgufFile(paths[0], gguf)
