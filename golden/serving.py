"""One call of a served layer: tokens attend to a cache of any kind and to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from golden.arrays import Positions, as_positions
from golden.caches.held import Cache, Held, seated
from golden.config import AttentionConfig
from golden.errors import ShapeError
from golden.heads import layer_heads, project_qkv
from golden.layer import attend_and_project
from golden.lora import Lora
from golden.masks import Explicit, Mask, layer_mask
from golden.stages import Array, Observer, unobserved
from golden.weights import AttentionWeights

C = TypeVar("C", bound=Cache)


@dataclass(frozen=True, slots=True, eq=False)
class ForwardResult(Generic[C]):
    """Result of `forward`.

    Attributes:
        output: `(batch, q_len, hidden_size)`, float64; rows of padded tokens hold the bias alone.
        cache: the cache after this call's keys and values were written.
    """

    output: Array
    cache: C


class Step(NamedTuple):
    """One call's output and keys, not yet written to a cache.

    Attributes:
        output: `(batch, q_len, hidden_size)`, float64.
        k: `(batch, num_key_value_heads, q_len, head_dim)`, after norm and RoPE.
        v: like `k`.
        positions: `(batch, q_len)`, int64.
    """

    output: Array
    k: Array
    v: Array
    positions: Positions


def forward(
    config: AttentionConfig,
    weights: AttentionWeights,
    hidden_states: Any,
    *,
    position_ids: Any,
    cache: C,
    seq_ids: Any = None,
    active_mask: Any = None,
    rotary_position_ids: Any = None,
    lora: Lora | None = None,
    observe: Observer = unobserved,
) -> ForwardResult[C]:
    """Run tokens through a layer with any cache, then write them.

    F1: a token sees what the cache held before the call and the call's own tokens, each by the
        layer's mask, in one softmax; a sink counts once.
    F2: so one call is a prefill (empty cache), a prefix-cached prefill or a window of one
        (prefix in the cache), a decode step (`q_len` 1) or a speculative one (`q_len` > 1).
    F3: rows are independent: each has its own positions, and with `seq_ids` its own cache row,
        so sequences join and leave a running batch (continuous batching).

    Args:
        config: the layer.
        weights: its arrays.
        hidden_states: `(batch, q_len, hidden_size)`.
        position_ids: `(batch, q_len)`, int; -1 marks padding, on either side.
        cache: what earlier tokens left; not changed.
        seq_ids: `(batch,)`, int, the cache row of each batch row; an id outside the cache makes
            the row idle: padding from end to end. None takes rows in order.
        active_mask: which of the call's tokens see which, besides the layer's mask: bool,
            `(q_len, q_len)` or `(batch, q_len, q_len)`, True = attend; None restricts nothing.
        rotary_position_ids: positions for RoPE alone, `(batch, q_len)` or, for M-RoPE,
            `(axes, batch, q_len)`, int; None takes `position_ids`.
        lora: adapters on the projections, None for none.
        observe: sees and may change each stage.

    Returns:
        Output and cache.

    Raises:
        ShapeError: an array does not fit the layer.
        ConfigError: the cache has no slot for a token.

    Source: neuronx-distributed-inference's prior and active parts, `compute_for_token_gen`.
    """
    step = attend_with_cache(
        config,
        weights,
        hidden_states,
        position_ids=position_ids,
        cache=cache,
        seq_ids=seq_ids,
        active_mask=active_mask,
        rotary_position_ids=rotary_position_ids,
        lora=lora,
        observe=observe,
    )
    written = cache.write(step.k, step.v, step.positions, seq_ids=seq_ids)
    return ForwardResult(step.output, written)


def attend_with_cache(
    config: AttentionConfig,
    weights: AttentionWeights,
    hidden_states: Any,
    *,
    position_ids: Any,
    cache: Cache,
    seq_ids: Any = None,
    active_mask: Any = None,
    rotary_position_ids: Any = None,
    lora: Lora | None = None,
    observe: Observer = unobserved,
) -> Step:
    """Do what `forward` does but write nothing: drafts that may yet be rejected."""
    projected = project_qkv(config, weights, hidden_states, lora=lora, observe=observe)
    batch, q_len = projected.q.shape[:2]
    positions = as_positions("position_ids", position_ids, (batch, q_len))
    positions = seated(cache, positions, seq_ids)
    q, k, v = layer_heads(config, weights, projected, positions, observe, rotary_position_ids)
    prior = cache.prior(positions, seq_ids=seq_ids)
    keys = prior.and_active(k, v, positions)
    mask = layer_mask(config)
    if active_mask is not None:
        mask = mask & active_part(active_mask, prior)
    output = attend_and_project(
        config, weights, q, keys.k, keys.v, positions, keys.positions, mask, observe, lora
    )
    return Step(output, k, v, positions)


def active_part(active_mask: Any, prior: Held) -> Mask:
    """Return a mask that restricts a call's own tokens and lets all prior keys pass.

    Raises:
        ShapeError: `active_mask` is not bool of shape `([batch,] q_len, q_len)`.
    """
    active = np.asarray(active_mask)
    if (
        active.dtype != np.bool_
        or active.ndim not in (2, 3)
        or active.shape[-1] != active.shape[-2]
    ):
        raise ShapeError(
            "active_mask must be bool of shape (q_len, q_len) or (batch, q_len, q_len), got "
            f"{active.dtype} {active.shape}"
        )
    seen = np.ones((*active.shape[:-1], prior.positions.shape[1]), dtype=np.bool_)
    return Explicit(np.concatenate([seen, active], axis=-1))
