"""What a subject is: something that computes attention and claims a precision.

A subject is any callable. Given a `CoreCall` it returns the attention output, given a `LayerCall` a
`LayerOutput`, given a `ServeCall` (`conformance.subjects.serving`) a `ServeOutput`. The decorator
`subject` says which it takes and what it claims: scope `core` is for a `CoreCall`, scope `layer`
for a `LayerCall`, and with `serves=True` for a `ServeCall` too; with `backward` it claims gradients
as well. A bare callable takes a `CoreCall`
and claims the `eager` profile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch

from conformance.cases import Case, Scope
from conformance.errors import UsageError
from conformance.precision import PROFILES
from golden import AttentionConfig

EXACT_RULES = ("repeated run", "other strides", "masked values", "masked NaN", "batch mates")
"""Changes of a call that must change no bit; see `conformance.exact_rules`."""


class Unsupported(Exception):
    """Raised by a subject that does not claim to do what a case asks; its text says what."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CoreCall:
    """Arguments of an attention kernel; floating tensors are in the case's dtype.

    Attributes:
        q: `(batch, num_attention_heads, q_len, head_dim)`, BHSD.
        k: `(batch, num_key_value_heads, kv_len, head_dim)`, BHSD.
        v: like `k`.
        mask: `(batch, 1, q_len, kv_len)`, bool, True = attend; causality, window, chunk and
            padding are all in it.
        q_positions: `(batch, q_len)`, int64, -1 for padding.
        kv_positions: `(batch, kv_len)`, int64, -1 for padding.
        softmax_scale: factor on the dot products.
        softcap: `c` in `c * tanh(score / c)`, None for none.
        sinks: `(num_attention_heads,)`, None for none.
        sliding_window: keys a query may see, its own included; None is unbounded.
        attention_chunk_size: positions `i`, `j` meet only if `i // size == j // size`.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor
    q_positions: torch.Tensor
    kv_positions: torch.Tensor
    softmax_scale: float
    softcap: float | None
    sinks: torch.Tensor | None
    sliding_window: int | None
    attention_chunk_size: int | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Adapters:
    """Low-rank adapters (LoRA): row `b` adds `scaling[a] * up[a] @ down[a] @ x`, `a = ids[b]`.

    Attributes:
        ids: `(batch,)`, int64, adapter of each row, -1 for none.
        down: by projection (`q`, `k`, `v`, `o`), `(adapters, rank, in)`.
        up: by projection, `(adapters, out, rank)`.
        scaling: `(adapters,)`, powers of two, the same for every projection.
    """

    ids: torch.Tensor
    down: Mapping[str, torch.Tensor]
    up: Mapping[str, torch.Tensor]
    scaling: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class InputNorm:
    """Root mean square norm of a layer's input: `x * weight / sqrt(mean(x**2) + eps)`.

    Attributes:
        weight: `(input_size,)`.
        eps: added to the mean square.
    """

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerCall:
    """Arguments of an attention layer; floating tensors are in the case's dtype.

    Attributes:
        config: the layer.
        weights: tensors by the field names of `golden.AttentionWeights`, matrices `(out, in)`.
        hidden_states: `(batch, q_len, hidden_size)`; in token generation, the tokens to feed one
            after the other. An `Eagle3AttentionConfig` reads twice that width.
        position_ids: `(batch, q_len)`, int64, -1 for padding on the right.
        k_cache: `(batch, num_key_value_heads, max_length, head_dim)`, slot = position; None in
            context encoding. The subject may write to it.
        v_cache: like `k_cache`.
        cache_lengths: `(batch,)`, int64, tokens in the cache before the first step.
        adapters: low-rank adapters of the projections; None without.
        input_norm: how the layer norms its input before the projections; None where the input
            comes normed.
        residual: shaped like `hidden_states`, to be added to them before that norm; None without.
        rotary_position_ids: `(axes, batch, q_len)`, int64, positions for M-RoPE; None for RoPE at
            `position_ids`.
    """

    config: AttentionConfig
    weights: Mapping[str, torch.Tensor]
    hidden_states: torch.Tensor
    position_ids: torch.Tensor
    k_cache: torch.Tensor | None = None
    v_cache: torch.Tensor | None = None
    cache_lengths: torch.Tensor | None = None
    adapters: Adapters | None = None
    input_norm: InputNorm | None = None
    residual: torch.Tensor | None = None
    rotary_position_ids: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerOutput:
    """What a layer returns.

    Attributes:
        output: `(batch, q_len, hidden_size)`.
        k_cache: context encoding: keys of each token, `(batch, num_key_value_heads, q_len,
            head_dim)`; token generation: the whole cache after the last step.
        v_cache: like `k_cache`.
    """

    output: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GradientCall:
    """A call whose gradients are asked for.

    Attributes:
        forward: the call.
        d_output: cotangent of its output, shaped like it, zero for queries that are padding. The
            cache that a layer returns has none.
    """

    forward: CoreCall | LayerCall
    d_output: torch.Tensor


AUTOGRAD = "autograd"
"""Gradients are those that torch finds by going back through the subject's function."""

Backward: TypeAlias = Callable[[Any, torch.Tensor], Mapping[str, torch.Tensor]]
Function: TypeAlias = Callable[[Any], Any]
F = TypeVar("F", bound=Function)


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A callable under test and what it claims.

    Attributes:
        name: shown in reports, and accepted by `--subject`.
        function: takes a `CoreCall`, or a `LayerCall` and perhaps a `ServeCall`.
        scope: `core` or `layer`.
        profile: name of the precision profile it claims (`conformance.precision.PROFILES`).
        unsupported: returns why a case is not claimed, None when it is.
        disclaims: exact rules (`conformance.exact_rules`) that it does not claim to keep.
        serves: whether it also takes a `ServeCall`; scope `layer` only.
        backward: how its gradients are had: `autograd` goes back through `function`; a function of
            its own takes the call and the cotangent of the output and returns the gradients by
            name: `q`, `k`, `v` and `sinks` of a `CoreCall`; of a `LayerCall` `hidden_states`, each
            weight by its field, and the `k_cache` and `v_cache` it was given. None claims none.
    """

    name: str
    function: Function
    scope: Scope = "core"
    profile: str = "eager"
    unsupported: Callable[[Case], str | None] = lambda case: None
    disclaims: tuple[str, ...] = ("masked NaN",)
    serves: bool = False
    backward: Backward | str | None = None

    def __post_init__(self) -> None:
        if self.scope not in ("core", "layer"):
            raise UsageError(f"scope must be 'core' or 'layer', got {self.scope!r}")
        if self.serves and self.scope == "core":
            raise UsageError("serves needs scope 'layer'; a kernel has no cache")
        if isinstance(self.backward, str) and self.backward != AUTOGRAD:
            raise UsageError(f"backward must be 'autograd' or a function, got {self.backward!r}")
        if unknown := sorted(set(self.disclaims) - set(EXACT_RULES)):
            raise UsageError(
                f"disclaims must be among {', '.join(EXACT_RULES)}, got {', '.join(unknown)}"
            )
        if self.profile not in PROFILES:
            raise UsageError(f"profile must be one of {', '.join(PROFILES)}, got {self.profile!r}")


def subject(
    *,
    scope: Scope = "core",
    profile: str = "eager",
    unsupported: Callable[[Case], str | None] | None = None,
    disclaims: tuple[str, ...] = ("masked NaN",),
    serves: bool = False,
    backward: Backward | str | None = None,
) -> Callable[[F], F]:
    """Say what a function under test takes and claims.

    Args:
        scope: `core` for a function of a `CoreCall`, `layer` for one of a `LayerCall`.
        profile: name of the precision profile it claims.
        unsupported: returns why a case is not claimed, None when it is.
        disclaims: exact rules that it does not claim to keep.
        serves: whether a layer also takes a `ServeCall`.
        backward: how its gradients are had, if it claims any: `autograd`, or a function of its own
            (see `Subject`).
    """

    def mark(function: F) -> F:
        claims: dict[str, Any] = {
            "scope": scope,
            "profile": profile,
            "disclaims": disclaims,
            "serves": serves,
            "backward": backward,
        }
        if unsupported is not None:
            claims["unsupported"] = unsupported
        Subject(name="check", function=function, **claims)
        function.__conformance__ = claims  # type: ignore[attr-defined]
        return function

    return mark
