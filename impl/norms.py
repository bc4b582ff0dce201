"""Root-mean-square norms, and where a layer may put them on its queries and keys.

All arithmetic is float32 (float64 for float64 inputs), weight included, and the result is rounded
to the input's dtype once.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor, nn

from impl.errors import ConfigError, explain
from impl.precision import compute_dtype


class QKNormPlacement(Enum):
    """Whether the norm of q and k comes before or after their rotation."""

    PRE_ROPE = 0
    POST_ROPE = 1


class QKNormScope(Enum):
    """What one norm of q or k runs over: a head's `head_dim`, or the whole flat projection."""

    HEAD = 0
    PROJECTION = 1


def rms_normalize(x: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square over the last axis.

    Args:
        x: `(..., width)`, any floating dtype.
        eps: added to the mean square, before the root.

    Returns:
        Like `x`, in the compute dtype (not yet rounded to the input's).
    """
    wide = x.to(compute_dtype(x.dtype))
    return wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)


def check_eps(eps: float | None, argument: str = "eps") -> float:
    """Return `eps` if it is a usable epsilon.

    Raises:
        ConfigError: it is None, or not positive.
    """
    if eps is None or not eps > 0:
        raise ConfigError(explain(argument, "be a positive number", eps, "1e-6 is common"))
    return float(eps)


class RMSNorm(nn.Module):
    """`(weight_offset + weight) * x / rms(x)` over the last axis.

    Args:
        hidden_size: width of the last axis.
        eps: added to the mean square, before the root.
        weight_offset: added to the weight: 0, or 1 for Gemma, whose weights are stored minus one.
        dtype: dtype of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        weight_offset: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.variance_epsilon = check_eps(eps)
        self.weight_offset = weight_offset
        self.weight = nn.Parameter(torch.full((hidden_size,), 1.0 - weight_offset, dtype=dtype))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise `(..., hidden_size)`; the result has its dtype."""
        normed = rms_normalize(hidden_states, self.variance_epsilon)
        weight = self.weight.to(normed.dtype)
        if self.weight_offset:
            weight = weight + self.weight_offset
        return (normed * weight).to(hidden_states.dtype)


class L2Norm(nn.Module):
    """`x / rms(x)` over the last axis, without a weight (Llama 4's norm of q and k).

    Args:
        eps: added to the mean square, before the root.
    """

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = check_eps(eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise `(..., width)`; the result has its dtype."""
        return rms_normalize(hidden_states, self.eps).to(hidden_states.dtype)
