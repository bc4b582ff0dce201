"""A case: one layer, one workload, one dtype, one draw of inputs. Its id alone rebuilds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from conformance.errors import UsageError
from conformance.extras import NO_EXTRAS, Extras
from conformance.schedule_calls import walk
from conformance.schedules import Schedule
from golden import AttentionConfig, Eagle3AttentionConfig

DTYPES = ("float32", "bfloat16", "float16")
"""Dtypes a subject's tensors may have."""

REGIMES = ("gaussian", "peaked", "outlier", "large", "integers")
"""How inputs are drawn; see `conformance.draws`."""

Phase = Literal["cte", "tkg", "serve"]
Scope = Literal["layer", "core"]

PHASE_NAMES: dict[str, str] = {
    "cte": "context encoding",
    "tkg": "token generation",
    "serve": "serving",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What the layer is asked to do.

    Attributes:
        phase: `cte`, context encoding (prefill); `tkg`, token generation (decode); or `serve`, the
            calls of a schedule.
        lengths: one number per batch row. `cte`: tokens of the prompt; shorter rows are padded on
            the right. `tkg`: tokens already in the cache; `serve`: those of each cache row.
        start: position of the prompt's first token; `cte` only.
        prior: keys before the prompt that its queries also see; scope `core` with `cte` only.
        steps: tokens generated one after the other; `tkg` only.
        schedule: the cache and the calls; `serve` only.
        backward: whether gradients are asked for, of everything the call reads that is no integer,
            from a cotangent of its output (`conformance.gradients`).
    """

    phase: Phase
    lengths: tuple[int, ...]
    start: int = 0
    prior: int = 0
    steps: int = 1
    schedule: Schedule | None = None
    backward: bool = False

    def __post_init__(self) -> None:
        if self.phase not in PHASE_NAMES:
            raise UsageError(f"phase must be 'cte', 'tkg' or 'serve', got {self.phase!r}")
        least = 1 if self.phase == "cte" else 0
        if not self.lengths or min(self.lengths) < least:
            raise UsageError(f"lengths must be at least {least}, one per row, got {self.lengths}")
        if self.phase != "cte" and (self.start or self.prior):
            raise UsageError(
                f"start and prior belong to context encoding; {self.phase} has lengths instead"
            )
        if self.phase != "tkg" and self.steps != 1:
            raise UsageError(
                f"steps belongs to token generation, got {self.steps} with {self.phase}"
            )
        if (self.phase == "serve") != (self.schedule is not None):
            raise UsageError("a schedule belongs to serve, and serve to a schedule")
        if self.backward and (self.phase == "serve" or self.steps != 1):
            raise UsageError(
                "backward goes through one call: context encoding, or token generation of one "
                f"step, got {self.phase} of {self.steps}"
            )
        if min(self.start, self.prior) < 0 or self.steps < 1:
            raise UsageError(
                "start and prior must not be negative and steps must be positive, got "
                f"{self.start}, {self.prior} and {self.steps}"
            )
        if self.schedule is not None:
            walk(self.schedule, self.lengths)

    @property
    def batch(self) -> int:
        """Rows of the batch; of the cache, for a schedule."""
        return len(self.lengths)

    @property
    def q_len(self) -> int:
        """Queries per row, padding included; a schedule's calls have their own."""
        return max(self.lengths) if self.phase == "cte" else self.steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One thing to judge a subject on.

    Attributes:
        config: the attention layer; scope `core` reads only its heads, mask and softmax.
        workload: what the layer is asked to do.
        dtype: of the subject's tensors; inputs are exact in it.
        regime: how inputs are drawn, or `prompt` for a real model's own activations.
        seed: of the draw.
        scope: `layer` from hidden states to output, `core` from q, k, v to attention output.
        model: published model the layer comes from, empty for a synthetic layer.
        layer: kind of layer in the model (`sliding`) or its index (`layer07`).
        extras: what comes with the layer beyond its configuration.
    """

    config: AttentionConfig
    workload: Workload
    dtype: str
    regime: str = "gaussian"
    seed: int = 0
    scope: Scope = "layer"
    model: str = ""
    layer: str = ""
    extras: Extras = NO_EXTRAS

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.regime not in (*REGIMES, "prompt"):
            raise UsageError(
                f"regime must be one of {', '.join(REGIMES)} or prompt, got {self.regime!r}"
            )
        if self.seed < 0:
            raise UsageError(f"seed must not be negative, got {self.seed}")
        if self.workload.prior and self.scope == "layer":
            raise UsageError("prior needs scope 'core'; a layer makes its own keys")
        if self.workload.prior and self.workload.start:
            raise UsageError("start and prior exclude each other; prior keys come first")
        if self.extras != NO_EXTRAS and (self.model or self.scope == "core"):
            raise UsageError("extras need a synthetic layer of scope 'layer'")
        if self.workload.backward and (
            self.extras != NO_EXTRAS or isinstance(self.config, Eagle3AttentionConfig)
        ):
            raise UsageError(
                "backward needs a layer without adapters, input norm, residual and EAGLE-3 width"
            )
        if self.workload.schedule is not None:
            self._check_schedule(self.workload.schedule)

    def _check_schedule(self, schedule: Schedule) -> None:
        if self.scope == "core":
            raise UsageError("a schedule needs scope 'layer'; a kernel has no cache")
        schedule.check_layer(self.config)
        several = self.config.rope is not None and self.config.rope.mrope_section
        if any(part.kind == "packed" for part in schedule.parts) and (
            several or self.extras.adapters
        ):
            raise UsageError(
                "packed sequences share a row, so they can have no adapters per row and no "
                "positions of several axes"
            )

    @property
    def id(self) -> str:
        """Readable, stable name of the case; `conformance.case_ids.parse` turns it back."""
        from conformance.case_ids import render

        return render(self)

    @property
    def suite(self) -> str:
        """Suite: `gradients`, `core`, `serving`, `model`, `presets` or `features`."""
        if self.workload.backward:
            return "gradients"
        if self.scope == "core":
            return "core"
        if self.workload.schedule is not None:
            return "serving"
        if self.regime == "prompt":
            return "model"
        return "presets" if self.model else "features"

    @property
    def features(self) -> tuple[str, ...]:
        """What the case exercises beyond plain causal attention with one KV head per head."""
        config = self.config
        found = []
        if config.group_size > 1:
            found.append("MQA" if config.num_key_value_heads == 1 else "GQA")
        if config.sliding_window is not None:
            found.append("sliding window")
        if config.attention_chunk_size is not None:
            found.append("chunked")
        if config.learned_sinks_size is not None:
            found.append("learned sinks")
        if config.softcap is not None:
            found.append("softcap")
        if config.softmax_scale != config.head_dim**-0.5:
            found.append("softmax scale")
        if self.scope == "layer":
            found += self._projection_features()
            found += self.extras.features
        if self.workload.schedule is not None:
            found += self.workload.schedule.features(self.workload.lengths)
        elif len(set(self.workload.lengths)) > 1:
            found.append("unequal lengths")
        if self.workload.prior:
            found.append("q_len != kv_len")
        if self.workload.start:
            found.append("position offset")
        return tuple(found) or ("plain causal",)

    def _projection_features(self) -> list[str]:
        config, found = self.config, []
        if isinstance(config, Eagle3AttentionConfig):
            found.append("EAGLE-3 width")
        if config.qkv_bias:
            found.append("QKV bias")
        if config.o_bias:
            found.append("output bias")
        if config.fused_qkv:
            found.append("fused QKV")
        if config.clip_qkv is not None:
            found.append("clip_qkv")
        if config.qk_norm is not None:
            when = config.qk_norm.placement.replace("_rope", "-RoPE")
            found.append(f"QK {config.qk_norm.kind} norm {when}")
        if config.rope is not None:
            found.append(f"RoPE {config.rope.pairing}")
            if config.rotary_dim < config.head_dim:
                found.append("RoPE partial")
            if config.rope.scaling is not None:
                name = type(config.rope.scaling).__name__.removesuffix("Scaling")
                found.append(f"RoPE {name}")
            if config.rope.mrope_section:
                found.append("M-RoPE interleaved" if config.rope.mrope_interleaved else "M-RoPE")
        if config.temperature_tuning is not None:
            found.append("temperature tuning")
        return found
