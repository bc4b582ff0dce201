"""One entry to every prefill kernel: what a layer asks for, whichever kernel computes it.

The native form takes any positions. The others read positions from the order of the tokens, as the
kernels of NxD Inference do: the tokens of a row stand at consecutive positions, and padding is on
the side that `padding_side` says. A row that breaks this promise comes out as NaN, because it
would otherwise be wrong without a word, and to look before the step would wait for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from impl.errors import ConfigError, explain
from impl.kernels import native
from impl.kernels.flash import flash_attention
from impl.kernels.fused import fused_attention
from impl.kernels.kept import nan_where, zero_unless
from impl.kernels.native import ScoreRule
from impl.kernels.nki import attention_cte
from impl.kernels.nki_arguments import attention_cte_obstacle
from impl.masks import as_bool, context_encoding_mask, visible
from impl.strategy import Implementation


@dataclass(frozen=True, kw_only=True, slots=True)
class PriorKeys:
    """Cached keys that a prefill step also sees.

    Attributes:
        k: `(batch, num_key_value_heads, prior_len, head_dim)`, BHSD.
        v: like `k`.
        positions: `(batch, prior_len)`, integer: the position each slot holds, before those of the
            step; negative for a slot that is empty or not to be seen.
    """

    k: Tensor
    v: Tensor
    positions: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillRule:
    """What a layer's prefill computes, apart from its tensors.

    Attributes:
        score: scale and softcap.
        sliding_window: keys a query may see, its own included; None is unbounded.
        attention_chunk_size: positions meet only within one chunk of this size; None is one chunk.
        padding_side: side of a row that holds its padding, "right" or "left".
        q_offset: place of the first query among the step's tokens (context parallelism).
        q_stride: tokens from one query to the next (its strided layout).
        logical_nc_config: physical cores that an NKI kernel is launched on.
    """

    score: ScoreRule
    sliding_window: int | None = None
    attention_chunk_size: int | None = None
    padding_side: str = "right"
    q_offset: int = 0
    q_stride: int = 1
    logical_nc_config: int = 1

    @property
    def limited(self) -> bool:
        """Whether there is a window or a chunk."""
        return self.sliding_window is not None or self.attention_chunk_size is not None

    def plain(self, *, explicit_mask: bool, prior: bool) -> bool:
        """Whether this is causal or full attention, padding on the right, with sinks at most."""
        extras = explicit_mask or prior or self.limited or self.score.softcap is not None
        moved = self.q_offset != 0 or self.q_stride != 1
        return not extras and not moved and self.padding_side == "right"

    def nki_obstacle(
        self, *, head_dim: int, dtype: torch.dtype, explicit_mask: bool = False
    ) -> str | None:
        """Why nki-library's kernel cannot compute this, in words; None if it can."""
        return attention_cte_obstacle(
            head_dim=head_dim,
            dtype=dtype,
            softcap=self.score.softcap,
            attention_chunk_size=self.attention_chunk_size,
            padding_side=self.padding_side,
            explicit_mask=explicit_mask,
        )


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    implementation: Implementation,
    rule: PrefillRule,
    sink: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    kv_position_ids: Tensor | None = None,
    prior: PriorKeys | None = None,
) -> Tensor:
    """Attention of a prefill step.

    Args:
        q: `(batch, num_attention_heads, q_len, head_dim)`, BHSD, rotated.
        k: `(batch, num_key_value_heads, kv_len, head_dim)`, BHSD, rotated.
        v: like `k`.
        implementation: who computes it, from `impl.strategy.resolve_kernel`.
        rule: what is computed.
        sink: `(num_attention_heads,)`, or None.
        attention_mask: as in `impl.masks.context_encoding_mask`, of the step's own keys.
        position_ids: `(batch, q_len)`, integer, negative for padding.
        kv_position_ids: `(batch, kv_len)`, integer, where the queries are only some of the step's
            tokens; None is `position_ids`.
        prior: cached keys, or None.

    Returns:
        Like `q`, in its dtype.

    Raises:
        ConfigError: the implementation cannot express the rule.
        DeviceError: it is NKI, and no NKI kernel runs here.
        ShapeError: a tensor that does not fit.
    """
    keys_at = position_ids if kv_position_ids is None else kv_position_ids
    if implementation is Implementation.NATIVE:
        return _native(q, k, v, rule, sink, attention_mask, position_ids, keys_at, prior)
    given = None if attention_mask is None else as_bool(attention_mask, "attention_mask")
    explicit = given is not None and given.dim() == 4
    by_position = rule.limited or (given is not None and not explicit)
    mask = given if explicit else None
    if by_position:
        valid = keys_at >= 0
        if given is not None and not explicit:
            valid = valid & given
        k, v = _promised(k, v, valid, keys_at, rule.padding_side)
        # padding on the right lies after every token, so causality alone hides it
        if rule.padding_side != "right":
            seen = valid[:, None, None, :]
            mask = seen if mask is None else mask & seen
    if implementation is Implementation.SDPA:
        if not rule.plain(explicit_mask=explicit, prior=prior is not None):
            raise ConfigError(
                explain(
                    "implementation",
                    "be able to express the layer",
                    implementation.value,
                    "resolve_kernel says which one is",
                )
            )
        heads = fused_attention(q, k, v, divisor=rule.score.divisor, causal=by_position, sink=sink)
    elif implementation is Implementation.NKI:
        obstacle = rule.nki_obstacle(
            head_dim=q.shape[3], dtype=q.dtype, explicit_mask=mask is not None
        )
        if obstacle is not None:
            raise ConfigError(
                explain("implementation", "be able to express the layer", "nki", obstacle)
            )
        heads = _nki(q, k, v, rule, sink, keys_at, by_position, prior)
    else:
        heads = _flash(q, k, v, rule, sink, mask, keys_at, by_position, prior)
    if not by_position:
        return heads
    return zero_unless(heads, (position_ids >= 0)[:, None, :, None], reuse=True)


def _native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: PrefillRule,
    sink: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    keys_at: Tensor,
    prior: PriorKeys | None,
) -> Tensor:
    mask = context_encoding_mask(
        attention_mask,
        position_ids,
        sliding_window=rule.sliding_window,
        attention_chunk_size=rule.attention_chunk_size,
        kv_position_ids=keys_at,
    )
    if prior is None:
        return native.context_encoding(q, k, v, mask, sink, rule.score)
    prior_mask = visible(
        position_ids,
        prior.positions,
        sliding_window=rule.sliding_window,
        attention_chunk_size=rule.attention_chunk_size,
    )
    return native.token_generation(q, k, v, prior.k, prior.v, prior_mask, mask, sink, rule.score)


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: PrefillRule,
    sink: Tensor | None,
    mask: Tensor | None,
    keys_at: Tensor,
    by_position: bool,
    prior: PriorKeys | None,
) -> Tensor:
    origin = _origin(keys_at, rule.padding_side)
    cached: dict[str, Any] = {}
    if prior is not None:
        cached = {
            "k_prior": prior.k,
            "v_prior": prior.v,
            "prior_mask": (prior.positions >= 0)[:, None, None, :],
            "prior_positions": prior.positions - origin[:, None],
        }
    window = rule.sliding_window
    if prior is None and window is not None and window >= k.shape[2]:
        window = None
    return flash_attention(
        q,
        k,
        v,
        rule=rule.score,
        sink=sink,
        causal=by_position,
        sliding_window=window,
        attention_chunk_size=rule.attention_chunk_size,
        chunk_origin=None if rule.attention_chunk_size is None else origin,
        q_offset=rule.q_offset,
        q_stride=rule.q_stride,
        mask=mask,
        **cached,
    )


def _nki(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: PrefillRule,
    sink: Tensor | None,
    keys_at: Tensor,
    by_position: bool,
    prior: PriorKeys | None,
) -> Tensor:
    cached: dict[str, Any] = {}
    if prior is not None:
        # a second promise: slot s holds position s, and the step follows the last of them
        index = torch.arange(prior.positions.shape[1], device=q.device)
        held = prior.positions >= 0
        used = held.sum(dim=1)
        moved = torch.where(held, prior.positions, -1) != torch.where(
            index < used[:, None], index, -1
        )
        broken = moved.any(dim=1) | (keys_at[:, 0] != used)
        v = nan_where(v, broken[:, None, None, None])
        cached = {"k_prior": prior.k, "v_prior": prior.v, "prior_lengths": used}
    return attention_cte(
        q,
        k,
        v,
        divisor=rule.score.divisor,
        sink=sink,
        causal=by_position,
        sliding_window=rule.sliding_window,
        q_offset=rule.q_offset,
        q_stride=rule.q_stride,
        logical_nc_config=rule.logical_nc_config,
        **cached,
    )


def _origin(positions: Tensor, padding_side: str) -> Tensor:
    """Position of the token at index 0 of each row, `(batch,)`, were there no padding before it."""
    if padding_side == "right":
        return positions[:, 0]
    return positions[:, -1] - (positions.shape[1] - 1)


def _promised(
    k: Tensor, v: Tensor, valid: Tensor, positions: Tensor, padding_side: str
) -> tuple[Tensor, Tensor]:
    """Keys and values with padding zeroed, and the values of a row that breaks the promise NaN.

    Args:
        k: `(batch, num_key_value_heads, kv_len, head_dim)`.
        v: like `k`.
        valid: `(batch, kv_len)`, bool: tokens, not padding.
        positions: `(batch, kv_len)`, integer.
        padding_side: "right" or "left".
    """
    index = torch.arange(positions.shape[1], device=positions.device)
    moved = positions - index != _origin(positions, padding_side)[:, None]
    broken = (valid & moved).any(dim=1)
    if padding_side == "right":
        broken = broken | (valid[:, 1:] & ~valid[:, :-1]).any(dim=1)
    tokens = valid[:, None, :, None]
    k, v = zero_unless(k, tokens), zero_unless(v, tokens)
    return k, nan_where(v, broken[:, None, None, None], reuse=True)
