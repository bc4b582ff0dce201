"""Attention over keys in several parts, joined through their logsumexp: the second form.

The parts may be a cache and a step's own keys (prior and active), the cores of flash decoding, or
any cut of one key axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from golden.attention import Attended, attend
from golden.caches.held import Held
from golden.errors import ConfigError, ShapeError
from golden.masks import Mask


def merge_attended(parts: Sequence[Attended]) -> Attended:
    """Join the results of attending to disjoint sets of keys.

    With part `p` returning `o_p` and `l_p`, natural log::

        l = log(sum_p exp(l_p))        o = sum_p exp(l_p - l) o_p

    J1: the order and number of the parts change nothing but rounding.
    J2: a part in which a row saw nothing has `l_p = -inf` and counts nothing; if all have, the
        row is zeros and `l = -inf`.
    J3: a sink belongs to exactly one part, or its exponential is counted more than once.

    Args:
        parts: at least one, each of the same shape.

    Raises:
        ConfigError: there is no part.
        ShapeError: parts differ in shape.

    Source: Dao et al. (2023), Flash-Decoding; the joint softmax over prior and active keys of
    neuronx-distributed-inference (`manual_softmax`) is this sum with one shared maximum.
    """
    if not parts:
        raise ConfigError("parts must hold at least one result, got none")
    shapes = {part.output.shape for part in parts}
    if len(shapes) > 1:
        raise ShapeError(f"parts must have one shape, got {sorted(shapes)}")
    logs = np.stack([part.logsumexp for part in parts])
    top = logs.max(axis=0)
    top = np.where(np.isneginf(top), 0.0, top)
    shares = np.exp(logs - top)
    total = shares.sum(axis=0)
    output = np.zeros(parts[0].output.shape)
    for share, part in zip(shares, parts, strict=True):
        weight = np.divide(share, total, out=np.zeros_like(share), where=total > 0)
        output += weight[..., None] * part.output
    with np.errstate(divide="ignore"):
        return Attended(output, np.log(total) + top)


def attend_parts(
    q: Any,
    parts: Sequence[Held],
    *,
    q_positions: Any,
    mask: Mask | Sequence[Mask],
    softmax_scale: float | None = None,
    sinks: Any = None,
    softcap: float | None = None,
) -> Attended:
    """Attend to each part of the keys alone, then join: `attend()` in a second form.

    J4: the first part carries the sink. In the prior and active decomposition that is the prior,
        even when it is empty.

    Args:
        q: `(batch, num_attention_heads, q_len, head_dim)`, BHSD.
        parts: keys, values and positions; the slots of all parts together are the key axis.
        q_positions: `(batch, q_len)`, int; -1 marks a padded query.
        mask: one mask of positions for all parts, or one per part where a mask goes by index.
        softmax_scale: factor on the dot products; None is `head_dim ** -0.5`.
        sinks: `(num_attention_heads,)`; None for none.
        softcap: `c` in `c * tanh(x / c)`; None for none.

    Raises:
        ConfigError: there is no part, or the masks are not one per part.
        ShapeError: an array does not fit.
    """
    masks = [mask] * len(parts) if isinstance(mask, Mask) else list(mask)
    if len(masks) != len(parts):
        raise ConfigError(f"mask must be one, or one per part, got {len(masks)} for {len(parts)}")
    return merge_attended(
        [
            attend(
                q,
                part.k,
                part.v,
                q_positions=q_positions,
                kv_positions=part.positions,
                mask=part_mask,
                softmax_scale=softmax_scale,
                sinks=sinks if index == 0 else None,
                softcap=softcap,
            )
            for index, (part, part_mask) in enumerate(zip(parts, masks, strict=True))
        ]
    )


def cut_keys(held: Held, cuts: Sequence[int]) -> tuple[Held, ...]:
    """Cut the key axis before each of these slots; parts may be empty.

    Raises:
        ConfigError: cuts are not ascending slots of the key axis.
    """
    slots = held.positions.shape[1]
    edges = [0, *cuts, slots]
    if any(start > stop for start, stop in pairwise(edges)):
        raise ConfigError(f"cuts must ascend from 0 to {slots}, got {list(cuts)}")
    return tuple(
        Held(held.k[:, :, a:b], held.v[:, :, a:b], held.positions[:, a:b])
        for a, b in pairwise(edges)
    )
