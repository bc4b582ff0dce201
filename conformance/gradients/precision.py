"""Where backward rounds, by precision profile: what autograd and kernels really store.

Torch's autograd goes back through each operator of the forward pass and stores what it finds in
that operator's dtype; a cast to a wider dtype in the forward pass is a rounding in the backward.

* `eager`: every cotangent is stored in the tensors' dtype, but for the softmax's insides; a group's
  keys gather one rounded gradient per query head; the row's `delta` is the sum of weights times
  `d_weights`.
* `native`, `impl`'s: as eager, but float32 between the rounded weights and the queries and keys,
  so that scores, groups, the insides of norms and of RoPE keep float32. `d_weights` is rounded,
  since the weights were. Its streamed gradient takes `delta` from a float32 output.
* `flash`: scores' gradients are computed in float32 and rounded for their products with queries
  and keys, weights for theirs with `d_attn`; `delta` is taken from the output as it was stored.
  PyTorch's CPU kernels do so, or compute in float32 throughout.

Products accumulate in float32 everywhere; sums over tokens and batch rows are stored once.

Source: PyTorch 2.13, `torch/csrc/autograd` and `FlashAttentionKernel.cpp`; Dao (2023), arXiv
2307.08691, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from conformance.precision import PrecisionProfile
from golden import GRADIENT_STAGES

_SOFTMAX = ("delta", "d_shifted_scores")
_SCORES = ("d_softcap", "d_softcap_tanh", "d_softcap_ratio", "d_scores", "d_qk")
_AGAIN = ("logsumexp", "delta_weights", "delta_output", "delta_sum")
_MEANS = ("d_q_norm_mean", "d_k_norm_mean")
_INSIDE = tuple(
    f"d_{name}_{stage}"
    for name in "qk"
    for stage in ("heads", "norm_unit", "norm_terms", "rope_cos", "rope_sin")
    if f"d_{name}_{stage}" in GRADIENT_STAGES
)


def _eager(dtype: str) -> dict[str, str]:
    stores = {stage: dtype for stage in GRADIENT_STAGES if stage not in _AGAIN}
    return stores | dict.fromkeys((*_SOFTMAX, *_MEANS), "float32")


def _native(dtype: str) -> dict[str, str]:
    inside = (*_SCORES, *_INSIDE, "d_v_heads", "logsumexp", "delta_output", "delta_sum")
    return _eager(dtype) | dict.fromkeys(inside, "float32")


def _flash(dtype: str) -> dict[str, str]:
    inside = ("d_weights", *_SCORES, "logsumexp", "delta_sum")
    stores = _eager(dtype) | dict.fromkeys(inside, "float32")
    stores |= {"d_qk": dtype, "delta_weights": dtype, "delta_output": dtype}
    del stores["delta"]
    return stores


_FAMILIES = {"eager": _eager, "native": _native}
"""What profiles round; the others are kinds of `flash`, PyTorch's CPU kernels among them."""


def gradient_profile(profile: PrecisionProfile, name: str, dtype: str) -> PrecisionProfile:
    """Return a profile that also says what backward rounds.

    Args:
        profile: of the forward pass.
        name: its name in `conformance.precision.PROFILES`.
        dtype: of the subject's tensors.
    """
    stores: Mapping[str, str] = _FAMILIES.get(name, _flash)(dtype)
    return replace(profile, stores={**profile.stores, **stores})
