"""How far a step's results are from golden's and may be, and whether bits are the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from impl_layers import ROUNDOFF
from path_build import Built
from torch import Tensor


def worst_error(built: Built, results: Sequence[Tensor]) -> float:
    """Largest difference over the largest expected value, wherever golden promises one."""
    worst = 0.0
    for got, expected in zip(built.read(results), built.expected, strict=True):
        assert got.shape == expected.shape
        promised = ~np.isnan(expected)
        difference = np.abs(got - expected)[promised]
        worst = max(worst, float(difference.max() / np.abs(expected[promised]).max()))
    return worst


def roundoff(built: Built) -> float:
    """`ROUNDOFF`, which is that of sums of 100 terms, for sums over as many keys as there are."""
    return ROUNDOFF * max(1.0, built.keys / 100)


def same_bits(got: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are of one dtype and shape and hold the same bits, NaN included."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return False
    return torch.equal(*(t.contiguous().view(torch.uint8) for t in (got, expected)))
