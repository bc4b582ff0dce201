"""Attention proper: from queries, keys and values to the output of each head."""

from impl.kernels.decode import decode
from impl.kernels.prefill import PrefillRule, PriorKeys, prefill

__all__ = ["PrefillRule", "PriorKeys", "decode", "prefill"]
