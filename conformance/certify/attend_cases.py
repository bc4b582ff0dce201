"""What `attend()` is certified on: head groups, caps, sinks, logits of every size, long rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from conformance.certify.attention_formula import BoolArray
from conformance.certify.layer_cases import drawn
from golden import Array


@dataclass(frozen=True, kw_only=True, slots=True)
class AttendCase:
    """What `attend()` is evaluated on; arrays are float64 and exact.

    Attributes:
        q: `(batch, num_attention_heads, q_len, head_dim)`.
        k: `(batch, num_key_value_heads, kv_len, head_dim)`.
        v: `(batch, num_key_value_heads, kv_len, value_dim)`.
        visible: `(batch, num_attention_heads, q_len, kv_len)`, True = attend.
        scale: factor on the dot products.
        softcap: None for none.
        sinks: `(num_attention_heads,)`, None for none.
    """

    q: Array
    k: Array
    v: Array
    visible: BoolArray
    scale: float = 0.5
    softcap: float | None = None
    sinks: Array | None = None


def attend_case(
    seed: int,
    *,
    heads: tuple[int, int] = (4, 2),
    q_len: int = 3,
    kv_len: int = 6,
    head_dim: int = 4,
    size: float = 1.0,
    density: float = 0.7,
    **changes: Any,
) -> AttendCase:
    """Return normal queries, keys and values under a random mask, whose second row is empty.

    Args:
        seed: of the inputs.
        heads: query heads and key/value heads.
        q_len: queries.
        kv_len: keys.
        head_dim: channels; values have one more.
        size: standard deviation of queries.
        density: share of keys that a row sees.
        **changes: further fields of `AttendCase`.
    """
    rng = drawn(seed)
    visible = rng.random((1, heads[0], q_len, kv_len)) < density
    visible[:, :, 1:2] = False
    return AttendCase(
        q=size * rng.standard_normal((1, heads[0], q_len, head_dim)),
        k=rng.standard_normal((1, heads[1], kv_len, head_dim)),
        v=rng.standard_normal((1, heads[1], kv_len, head_dim + 1)),
        visible=visible,
        **changes,
    )


def attend_cases(seed: int) -> dict[str, AttendCase]:
    """Return the cases of `attend()` by the name of what they stress."""
    sinks = drawn(seed + 1).standard_normal(4)
    plain = attend_case(seed)
    return {
        "attend": plain,
        "attend, group of 7": attend_case(seed, heads=(7, 1)),
        "attend, soft cap": replace(plain, softcap=0.5),
        "attend, sinks": replace(plain, sinks=sinks),
        "attend, sinks and soft cap": replace(plain, sinks=sinks, softcap=0.5),
        "attend, large logits": attend_case(seed, size=300.0),
        "attend, huge logits": attend_case(seed, size=1e6),
        "attend, peaked": attend_case(seed, size=12.0, kv_len=24),
        "attend, sink far above": replace(plain, sinks=sinks + 200.0),
        "attend, 256 keys": attend_case(seed, heads=(2, 1), kv_len=256, density=1.0),
    }


def long_rows(seed: int, *, kv_len: int, head_dim: int = 64, size: float = 1.0) -> AttendCase:
    """Return a causal attention whose sums are long, with sinks."""
    rng = drawn(seed)
    shape = (1, 2, kv_len, head_dim)
    return AttendCase(
        q=size * rng.standard_normal(shape),
        k=rng.standard_normal((1, 1, kv_len, head_dim)),
        v=rng.standard_normal((1, 1, kv_len, head_dim)),
        visible=np.broadcast_to(np.tri(kv_len, dtype=np.bool_), (1, 2, kv_len, kv_len)),
        scale=head_dim**-0.5,
        sinks=rng.standard_normal(2),
    )
