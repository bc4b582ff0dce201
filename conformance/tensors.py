"""Float64 arrays as tensors of a case's dtype, and integers as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray

import golden
from conformance.serve_expected import INPUT_NORM_EPS
from conformance.subjects.base import Adapters, InputNorm
from golden import Array, AttentionConfig, AttentionWeights, Lora


@dataclass(frozen=True, slots=True)
class Tensors:
    """Makes tensors of one dtype.

    Attributes:
        dtype: of every floating tensor.
    """

    dtype: torch.dtype

    def __call__(self, array: Array) -> torch.Tensor:
        """Return an array as a tensor that shares nothing with it."""
        return torch.from_numpy(np.array(array)).to(self.dtype)

    def maybe(self, array: Array | None) -> torch.Tensor | None:
        """Return an array as a tensor, None as None."""
        return None if array is None else self(array)

    def weights(
        self, config: AttentionConfig, weights: AttentionWeights
    ) -> dict[str, torch.Tensor]:
        """Return a layer's arrays by field name."""
        return {name: self(getattr(weights, name)) for name in golden.weight_shapes(config)}

    def adapters(self, lora: Lora | None) -> Adapters | None:
        """Return low-rank adapters."""
        if lora is None:
            return None
        return Adapters(
            ids=torch.from_numpy(lora.adapter_ids.copy()),
            down={name: self(adapter.down) for name, adapter in lora.adapters.items()},
            up={name: self(adapter.up) for name, adapter in lora.adapters.items()},
            scaling=self(lora.adapters["q"].scaling),
        )

    def input_norm(self, weight: Array | None) -> InputNorm | None:
        """Return the norm of a layer's input."""
        return None if weight is None else InputNorm(weight=self(weight), eps=INPUT_NORM_EPS)


@overload
def whole(array: NDArray[np.int64]) -> torch.Tensor: ...
@overload
def whole(array: NDArray[np.int64] | None) -> torch.Tensor | None: ...
def whole(array: NDArray[np.int64] | None) -> torch.Tensor | None:
    """Return integers or booleans as a tensor that shares nothing with them, None as None."""
    return None if array is None else torch.from_numpy(array.copy())
