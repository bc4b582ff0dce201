"""How far a step's results are from golden's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from forward_paths import Built
from torch import Tensor


def worst_error(built: Built, results: Sequence[Tensor]) -> float:
    """Largest difference over the largest expected value, at real tokens of what is expected."""
    worst = 0.0
    for got, expected in zip(results, built.expected, strict=len(built.expected) > 1):
        difference = np.abs(got.detach().numpy() - expected)
        assert difference.shape == expected.shape
        if expected.ndim == 3:
            difference = difference[built.valid]
        elif expected.shape[2] == built.valid.shape[1]:
            difference = difference.transpose(0, 2, 1, 3)[built.valid]
        worst = max(worst, float(difference.max() / np.abs(expected).max()))
    return worst
