"""Which query and key/value heads each tensor-parallel rank holds: padding and replication."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from golden.checks import require, require_count
from golden.config import AttentionConfig

GQAStrategy = Literal["replicate-to-tp-degree", "convert-to-mha"]
"""How key/value heads meet the ranks."""

REPLICATE_TO_TP_DEGREE: GQAStrategy = "replicate-to-tp-degree"
CONVERT_TO_MHA: GQAStrategy = "convert-to-mha"

PADDING = -1
"""Stands for a head of zeros."""

Heads = tuple[int, ...]
"""Heads of the layer, `PADDING` for one of zeros."""


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """Heads over all ranks, in equal consecutive parts.

    D5: replicated, a key/value head is repeated for as many consecutive ranks as share it, and the
        queries of each key/value head are padded at the end of their group. With 6 query heads, 2
        key/value heads and 4 ranks::

            q0 q1 | q2 -- | q3 q4 | q5 --
            k0    | k0    | k1    | k1

    D6: converted to multi-head attention, each key/value head is repeated for every query of its
        group and both are padded at the end.
    D7: on each rank, query head `h` reads key/value head `h // group` of that rank (A1), and a
        head of zeros contributes nothing, since its columns of the output projection are zero.

    Attributes:
        strategy: what was done.
        tp_degree: parts.
        q_heads: source of every query head, `PADDING` for zeros.
        kv_heads: source of every key/value head.
    """

    strategy: GQAStrategy
    tp_degree: int
    q_heads: Heads
    kv_heads: Heads

    def q_part(self, part: int) -> Heads:
        """Return the query heads of one part."""
        return _part(self.q_heads, part, self.tp_degree)

    def kv_part(self, part: int) -> Heads:
        """Return the key/value heads of one part."""
        return _part(self.kv_heads, part, self.tp_degree)


def _part(heads: Heads, part: int, parts: int) -> Heads:
    width = len(heads) // parts
    return heads[part * width : (part + 1) * width]


def sharding_strategy(
    tp_degree: int, num_key_value_heads: int, desired: GQAStrategy | None = None
) -> GQAStrategy:
    """Return the strategy: replication unless other heads are asked for or it comes out uneven.

    Source: neuronx-distributed-inference, `determine_sharding_strategy`.
    """
    if desired == CONVERT_TO_MHA or tp_degree % num_key_value_heads != 0:
        return CONVERT_TO_MHA
    return REPLICATE_TO_TP_DEGREE


def head_layout(
    config: AttentionConfig, tp_degree: int, *, desired: GQAStrategy | None = None
) -> HeadLayout:
    """Lay a layer's heads over the ranks of a tensor-parallel group.

    D8: `len(q_heads)` is the next multiple of `tp_degree`. Key/value heads that already divide
        evenly stay as they are under `convert-to-mha`; multi-head attention is padded at the end
        or, replicated, group by group.

    Raises:
        ConfigError: `tp_degree` is not positive or the strategy unknown.

    Source: neuronx-distributed-inference, `get_shardable_head_counts` and the preshard hooks of
    `gqa.py`. Its converted heads are padded from the count before replication, which for 4 ranks
    and 6 over 3 heads leaves 16 key/value heads where 8 are meant; here they are 8.
    """
    require_count("tp_degree", tp_degree)
    require(
        desired in (None, REPLICATE_TO_TP_DEGREE, CONVERT_TO_MHA),
        f"strategy must be {REPLICATE_TO_TP_DEGREE!r} or {CONVERT_TO_MHA!r}, got {desired!r}",
    )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    padded = -(-heads // tp_degree) * tp_degree
    strategy = sharding_strategy(tp_degree, kv_heads, desired)
    if strategy == REPLICATE_TO_TP_DEGREE:
        q = tuple(
            head
            for group in range(kv_heads)
            for head in _padded(_group(config, group), padded // kv_heads)
        )
        return HeadLayout(strategy, tp_degree, q, repeated(kv_heads, tp_degree // kv_heads))
    q = _padded(tuple(range(heads)), padded)
    if kv_heads % tp_degree == 0:
        return HeadLayout(strategy, tp_degree, q, tuple(range(kv_heads)))
    kv = _padded(repeated(kv_heads, config.group_size), padded)
    return HeadLayout(strategy, tp_degree, q, kv)


def _group(config: AttentionConfig, group: int) -> Heads:
    return tuple(range(group * config.group_size, (group + 1) * config.group_size))


def repeated(kv_heads: int, times: int) -> Heads:
    """Return every head `times` in a row: `k0 k0 k1 k1`, never `k0 k1 k0 k1`."""
    return tuple(head for head in range(kv_heads) for _ in range(times))


def _padded(heads: Heads, length: int) -> Heads:
    return heads + (PADDING,) * (length - len(heads))
