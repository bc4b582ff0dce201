"""Acceptance rules of other projects, written from their published description."""

from __future__ import annotations

import math

import numpy as np

from conformance.benchmarks.rules_record import Rule, Trial
from golden import FORMATS, Array
from golden.tiles import BoolArray


def _within(trial: Trial, rtol: float, atol: float) -> BoolArray:
    gap = np.abs(trial.output - trial.reference)
    within: BoolArray = gap <= atol + rtol * np.abs(trial.reference)
    return within


def _largest(error: Array) -> float:
    return float(np.abs(error).max(initial=0.0))


_TORCH_RTOL = {"float32": 1.3e-6, "float16": 1e-3, "bfloat16": 1.6e-2}
_VLLM_ATOL = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-3}


def torch_defaults(trial: Trial) -> bool:
    """Elementwise, atol 1e-5, rtol by dtype.

    Source: `torch.testing.assert_close`, documented defaults.
    """
    return bool(_within(trial, _TORCH_RTOL[trial.dtype], 1e-5).all())


def vllm_defaults(trial: Trial) -> bool:
    """Elementwise, rtol as torch, atol 1e-3 for 16-bit formats.

    Source: vLLM, `tests/kernels/allclose_default.py`.
    """
    return bool(_within(trial, _TORCH_RTOL[trial.dtype], _VLLM_ATOL[trial.dtype]).all())


def one_percent(trial: Trial) -> bool:
    """Elementwise, rtol 1e-2 and atol 1e-2.

    Source: flashinfer-bench `config.py`, KernelBench `eval.py` for 16-bit formats, aiter
    `checkAllclose`.
    """
    return bool(_within(trial, 1e-2, 1e-2).all())


def flash_attention_2(trial: Trial) -> bool:
    """Largest error at most twice that of PyTorch in the same dtype.

    Source: flash-attention, `tests/test_flash_attn.py`.
    """
    error = _largest(trial.output - trial.reference)
    return error <= 2 * _largest(trial.baseline - trial.reference)


def flash_attention_3(trial: Trial) -> bool:
    """Twice PyTorch's largest error (3 times with a soft cap) plus twice the noise of one addition.

    The noise is the largest change of the reference by `+ 0.3 - 0.3` in the tensors' dtype.

    Source: flash-attention, `hopper/test_flash_attn.py`.
    """
    stored = FORMATS[trial.dtype].nearest
    noise = stored(stored(trial.reference + 0.3) - 0.3) - trial.reference
    factor = 3 if trial.softcapped else 2
    limit = factor * _largest(trial.baseline - trial.reference) + 2 * _largest(noise)
    return _largest(trial.output - trial.reference) <= limit


def pytorch_sdpa(trial: Trial) -> bool:
    """Largest error at most 4 times that of the low-precision reference, and 1e-5 is allowed.

    Source: PyTorch, `test/test_transformers.py`, fudge factor of `out`.
    """
    limit = max(1e-5, 4 * _largest(trial.baseline - trial.golden))
    return _largest(trial.output - trial.golden) <= limit


def nki_max_all_close(trial: Trial) -> bool:
    """Error at most 2e-2 of the largest value of the whole tensor, plus 1e-5.

    Source: NKI library, `maxAllClose` and the tolerance of its `attention_cte` tests.
    """
    return _largest(trial.output - trial.golden) <= 1e-5 + 2e-2 * _largest(trial.golden)


def neuron_three_way(trial: Trial) -> bool:
    """Compare errors with those of PyTorch on a CPU in the same dtype.

    Passes if the distributions overlap (Bhattacharyya coefficient >= 0.99) or are no wider (ratio
    of standard deviations <= 1), and the largest error is below 5 times, its 2-norm below 3 times
    the CPU's. The coefficient is that of normal distributions fitted to the errors, since the
    description leaves their form open.

    Source: AWS Neuron documentation, vLLM Neuron, module-level accuracy test guidelines.
    """
    ours, theirs = trial.output - trial.golden, trial.baseline - trial.golden
    narrow = float(ours.std()) <= float(theirs.std())
    overlap = _normal_overlap(ours, theirs) >= 0.99
    largest = _largest(ours) < 5 * _largest(theirs)
    norm = float(np.linalg.norm(ours)) < 3 * float(np.linalg.norm(theirs))
    return (narrow or overlap) and largest and norm


def _normal_overlap(left: Array, right: Array) -> float:
    a, b = float(left.var()), float(right.var())
    if not a + b > 0:
        return 1.0 if a + b == 0 else 0.0
    gap = float(left.mean() - right.mean()) ** 2
    return math.sqrt(2 * math.sqrt(a * b) / (a + b)) * math.exp(-gap / (4 * (a + b)))


def llama_cpp_nmse(trial: Trial) -> bool:
    """Mean squared error at most 5e-4 of the mean square.

    Source: llama.cpp, `tests/test-backend-ops.cpp`, FLASH_ATTN_EXT.
    """
    error = float(np.square(trial.output - trial.golden).mean())
    return error <= 5e-4 * float(np.square(trial.golden).mean())


def torchao_sqnr(trial: Trial) -> bool:
    """Signal to quantisation noise of at least 25 dB.

    Source: torchao, `compute_error` and the thresholds of its float8 tests.
    """
    error = float(np.linalg.norm(trial.output - trial.golden))
    return error <= float(np.linalg.norm(trial.golden)) * 10 ** (-25 / 20)


def most_within(trial: Trial) -> bool:
    """At least 98 % of the elements within rtol 1e-2 and atol 1e-2.

    Source: flashinfer, `tests/attention/test_xqa.py`.
    """
    return float(_within(trial, 1e-2, 1e-2).mean()) >= 0.98


def cosine(trial: Trial) -> bool:
    """Cosine of the angle between output and reference at least 0.99.

    Source: NKI library, `attention_block_tkg` tests; flashinfer's paged append asks for 0.9.
    """
    norms = float(np.linalg.norm(trial.output)) * float(np.linalg.norm(trial.golden))
    product = float((trial.output * trial.golden).sum())
    return product >= 0.99 * norms and norms > 0


PEERS = (
    Rule("torch.testing defaults", torch_defaults),
    Rule("vLLM table by dtype", vllm_defaults),
    Rule("1e-2 / 1e-2", one_percent),
    Rule("flash-attention 2x", flash_attention_2),
    Rule("flash-attention 3 form", flash_attention_3),
    Rule("PyTorch SDPA 4x", pytorch_sdpa),
    Rule("NKI maxAllClose 2e-2", nki_max_all_close),
    Rule("Neuron three-way", neuron_three_way),
    Rule("llama.cpp NMSE 5e-4", llama_cpp_nmse),
    Rule("torchao SQNR 25 dB", torchao_sqnr),
    Rule("98 % within 1e-2", most_within),
    Rule("cosine 0.99", cosine),
)
"""Rules of other projects; a NaN fails each of them."""
