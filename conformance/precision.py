"""Precision profiles: where a subject says it rounds, and to what.

A profile is a claim. The error model turns it into the error scale a subject is held to; a
subject that is more precise than its profile passes, one that is less precise does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from conformance.errors import UsageError
from golden import CALL_STAGES, FORMATS, GRADIENT_STAGES, STAGES

_ROPE_TABLES = (
    "rope_exponents",
    "rope_powers",
    "rope_frequencies",
    "rope_scaled_frequencies",
    "rope_angles",
)
_ALL_STAGES = (*STAGES, *CALL_STAGES)
_ADAPTERS = tuple(stage for stage in CALL_STAGES if "_lora" in stage)
_FLOAT32_INSIDE = (
    *_ROPE_TABLES,
    "input_norm_scale",
    "q_norm_scale",
    "k_norm_scale",
    "shifted_scores",
    "exp",
    "denominator",
)
_SCORES = ("qk", "scores", "softcap_ratio", "softcap_tanh", "softcap")
_FUSED = (
    "input_norm_unit",
    "q_norm_unit",
    "k_norm_unit",
    "q_rope_cos",
    "k_rope_cos",
    "q_rope_sin",
    "k_rope_sin",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionProfile:
    """Where a subject rounds.

    Attributes:
        name: such as `eager-bfloat16`.
        reason: what kind of implementation rounds like this.
        stores: stage (of `golden.STAGES`) to the format its value is rounded to.
        accumulation: format in which sums of products are accumulated.
        block_length: terms summed one after the other before partial sums are added; longer
            blocks mean larger errors. 384 is the longest found in PyTorch's products on CPUs.
            Modelled where the accumulation format is also what the stage stores, since a coarser
            store hides it.
        few_rows: rows from which on a product with a matrix is cut into blocks; fewer take another
            path, weights times values one key after the other.
        lanes: a projection of few rows may instead run along its whole length in this many
            interleaved partial sums, as the lanes of a vector unit do; the larger of the two
            errors is what is claimed (`conformance.sums`).
        exp_ulps: error of exp, tanh, powers, sine and cosine beyond rounding, in ulps of the
            stage's format.
        tanh_ulps: that of tanh where it differs; None is `exp_ulps`.
        operands: format that products round what they read to, as tensor cores do; empty for none.
        order: `sequence` if terms are added in the order of their indices, keys and channels, each
            a product rounded before it is added; empty if any order is as likely as any other.
    """

    name: str
    reason: str
    stores: Mapping[str, str]
    accumulation: str = "float32"
    block_length: int = 384
    few_rows: int = 4
    lanes: int = 4
    exp_ulps: float = 0.5
    tanh_ulps: float | None = None
    operands: str = ""
    order: str = ""

    def __post_init__(self) -> None:
        unknown = sorted(self.stores.keys() - {*_ALL_STAGES, *GRADIENT_STAGES})
        if unknown:
            raise UsageError(f"stores must name stages of golden.STAGES, got {', '.join(unknown)}")
        formats = {*self.stores.values(), self.accumulation, self.operands or self.accumulation}
        if not formats <= FORMATS.keys():
            raise UsageError(
                f"formats must be among {', '.join(FORMATS)}, got "
                f"{', '.join(sorted(formats - FORMATS.keys()))}"
            )
        if self.order not in ("", "sequence"):
            raise UsageError(f"order must be 'sequence' or empty, got {self.order!r}")
        if self.order and self.accumulation != "float32":
            raise UsageError(
                "accumulation must be float32 where an order of sums is claimed, got "
                f"{self.accumulation}"
            )
        ulps = (self.exp_ulps, self.tanh_ulps)
        if min(self.block_length, self.lanes) < 1 or any(u is not None and u < 0 for u in ulps):
            raise UsageError(
                "block_length and lanes must be positive, exp_ulps and tanh_ulps not negative, got "
                f"{self.block_length}, {self.lanes}, {self.exp_ulps} and {self.tanh_ulps}"
            )

    def function_ulps(self, stage: str) -> float:
        """Error beyond rounding of the function whose value a stage is, in ulps of its format."""
        if stage == "softcap_tanh" and self.tanh_ulps is not None:
            return self.tanh_ulps
        return self.exp_ulps


def eager(dtype: str) -> PrecisionProfile:
    """Every stage is stored in the model's dtype; RoPE angles, norms and softmax in float32.

    This is plain PyTorch in bfloat16 or float16: each operator rounds its result, matrix products
    accumulate in float32, and the softmax is upcast.
    """
    stores = {stage: dtype for stage in _ALL_STAGES if stage not in _FLOAT32_INSIDE}
    stores |= dict.fromkeys(_FLOAT32_INSIDE, "float32")
    if dtype != "float32":
        del stores["unnormalised_weights"]
    return PrecisionProfile(
        name=f"eager-{dtype}",
        reason="each operator stores its result in the model's dtype; softmax and RoPE angles "
        "in float32",
        stores=stores,
    )


def native(dtype: str) -> PrecisionProfile:
    """Scores and softmax in float32, normalised weights stored for the product; RoPE fused.

    This is the native path of `impl`: projections, norms, cos and sin, rotated heads, weights,
    attention output and projection are stored in the model's dtype, everything between in
    float32, as are low-rank terms until they are added.
    """
    stores = dict(eager(dtype).stores)
    stores |= dict.fromkeys(_SCORES + _FUSED + _ADAPTERS, "float32")
    return PrecisionProfile(
        name=f"native-{dtype}",
        reason="scores, softmax and the insides of norms and RoPE in float32; weights rounded "
        "to the model's dtype before their product with the values",
        stores=stores,
    )


def xla_cpu(dtype: str) -> PrecisionProfile:
    """The native path of `impl` as XLA compiles it for CPUs, whose tanh is rational.

    Against float64, on 200,000 arguments from each of eight ranges between 1e-4 and 20, jaxlib
    0.10.2's tanh of float32 errs by up to 4.41 ulps with its rounding, and by 0.5 to 1.3 in the
    root mean square; its exp by 0.99, its sine and cosine by 0.56, as others claim. PyTorch's own
    tanh errs by 0.57.

    Source: `EmitFastTanh` in XLA's `xla/service/llvm_ir/math_ops.cc`.
    """
    return replace(
        native(dtype),
        name=f"xla-cpu-{dtype}",
        reason="scores, softmax and the insides of norms and RoPE in float32, compiled by XLA for "
        "CPUs: a tanh to 4 ulps of float32; weights rounded to the model's dtype",
        tanh_ulps=4.0,
    )


def flash(dtype: str) -> PrecisionProfile:
    """Scores and softmax stay in float32; unnormalised weights are rounded for the product.

    This is an online-softmax kernel: `exp(score - running maximum)` is cast to the dtype of the
    values for the matrix product, its row sum stays in float32, and the output is divided at the
    end and rounded once.
    """
    stores = dict(eager(dtype).stores)
    stores |= dict.fromkeys(_SCORES, "float32")
    stores["unnormalised_weights"] = dtype
    if dtype != "float32":
        del stores["weights"]
    return PrecisionProfile(
        name=f"flash-{dtype}",
        reason="online softmax: scores in float32, unnormalised weights stored in the model's "
        "dtype, one division at the end",
        stores=stores,
    )


def in_sequence(dtype: str) -> PrecisionProfile:
    """Every operation of attention correctly rounded, sums in the order of keys and channels.

    Weights are relative to the row's largest score or sink and stay unnormalised: the sums of
    weights times values are divided by the sum of weights, the sink its last term. The order is
    claimed where sums are stored as they are accumulated; a coarser store hides it.
    """
    claims = flash(dtype)
    return replace(
        claims,
        name=f"in-sequence-{dtype}",
        reason="sums in the order of keys and channels, functions rounded correctly, one division "
        "at the end",
        stores={stage: form for stage, form in claims.stores.items() if stage != "weights"},
        exp_ulps=0.0,
        order="sequence" if dtype == claims.accumulation else "",
    )


def sdpa(dtype: str) -> PrecisionProfile:
    """PyTorch's CPU attention, whichever of its kernels a call is given to.

    The eager kernel rounds normalised weights, the flash kernel unnormalised ones, so both are
    claimed; so is the flash kernel's fast exponential.

    Source: `exp_u20` in PyTorch's `ATen/cpu/vec/vec512/vec512_float.h`, which states 20 ulps.
    """
    return replace(
        eager(dtype),
        name=f"sdpa-{dtype}",
        reason="PyTorch's CPU attention: weights rounded to the model's dtype before or after "
        "their normalisation, an exponential with an error of up to 20 ulps of float32",
        stores={**eager(dtype).stores, "unnormalised_weights": dtype},
        exp_ulps=20.0,
    )


def token_generation(dtype: str) -> PrecisionProfile:
    """A fused token-generation block: one pass over the cache and the new keys.

    Scores stay in float32, weights are rounded unnormalised for their product with the values, and
    that product is summed in float32 in blocks of 128 keys, the rows that a tile of the cache has
    on a NeuronCore's partitions, whatever the number of queries.
    """
    return replace(
        flash(dtype),
        name=f"tkg-{dtype}",
        reason="one pass over the cache: scores in float32, unnormalised weights in the model's "
        "dtype, sums over blocks of 128 keys, one division at the end",
        block_length=128,
        few_rows=0,
    )


def nki(dtype: str) -> PrecisionProfile:
    """A kernel for NeuronCores: products of the model's dtype summed in float32 in PSUM.

    A matrix product takes 128 terms at a time and PSUM adds them up, so sums are blocks of 128.
    The exponential is the activation engine's, whose accuracy is not published: 64 ulps of float32
    are claimed, 2**-18, which shows in float32 alone and awaits a measurement on a device.
    """
    return replace(
        token_generation(dtype),
        name=f"nki-{dtype}",
        reason="NeuronCore: products summed in float32 in blocks of 128, unnormalised weights in "
        "the model's dtype, the activation engine's exponential to 64 ulps of float32",
        exp_ulps=64.0,
    )


def tf32(dtype: str) -> PrecisionProfile:
    """Float32 tensors whose products read them as TensorFloat-32; other dtypes fit it exactly.

    Source: NVIDIA A100 whitepaper (2020): 10 fraction bits, the exponent of float32.
    """
    return replace(
        flash(dtype),
        name=f"tf32-{dtype}",
        reason="online softmax whose products read float32 operands rounded to 10 fraction bits",
        operands="tensorfloat32",
    )


def _float8_weights(name: str, form: str) -> Callable[[str], PrecisionProfile]:
    def profile(dtype: str) -> PrecisionProfile:
        claims = flash(dtype)
        return replace(
            claims,
            name=f"{name}-{dtype}",
            reason=f"online softmax whose weights are rounded to {form} for their product with "
            "the values, as FP8 attention kernels do",
            stores={**claims.stores, "unnormalised_weights": form},
        )

    return profile


PROFILES: dict[str, Callable[[str], PrecisionProfile]] = {
    "eager": eager,
    "native": native,
    "xla-cpu": xla_cpu,
    "flash": flash,
    "in-sequence": in_sequence,
    "sdpa": sdpa,
    "tkg": token_generation,
    "nki": nki,
    "tf32": tf32,
    "flash-e4m3": _float8_weights("flash-e4m3", "float8_e4m3fn"),
    "flash-e5m2": _float8_weights("flash-e5m2", "float8_e5m2"),
}
"""Profiles by name; each takes the dtype of the subject's tensors."""


def profile_named(name: str, dtype: str) -> PrecisionProfile:
    """Return the profile of this name for tensors of `dtype`.

    Raises:
        UsageError: there is none.
    """
    if name not in PROFILES:
        raise UsageError(f"profile must be one of {', '.join(PROFILES)}, got {name!r}")
    return PROFILES[name](dtype)
