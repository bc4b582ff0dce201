"""Whether a step will be asked for gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def trains(*tensors: Tensor | None) -> bool:
    """Whether gradients are recorded and one of the tensors wants its own.

    Args:
        *tensors: of the step; None for what it has not.
    """
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
