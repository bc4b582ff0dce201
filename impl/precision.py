"""Which dtype the float32 islands of the layer run in."""

from __future__ import annotations

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of norms, angles, scores and softmax for values stored as `dtype`.

    float32, or float64 for float64 values: the layer in float64 is then accurate to float64
    roundoff, which is what lets it be compared with a float64 definition.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32
