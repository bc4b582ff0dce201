"""Which heads of the model each tensor-parallel shard holds, padding and copies included.

A shard has as many slots as any other; slots of all shards stand one after another. A slot holds a
head of the model, or nothing (`PADDING`, weights of zero). Query slot `i` of a shard reads its KV
slot `i // (query slots / KV slots)`, and that is the KV head the model gives it.

Six query heads and two KV heads over four shards, and eight over three:

    replicate   q0 q1 | q2 -  | q3 q4 | q5 -      k0 | k0 | k1 | k1
    to MHA      q0 q1 q2 | q3 q4 q5 | q6 q7 -     k0 k0 k0 | k0 k1 k1 | k1 k1 -

Source: neuronx-distributed-inference, `gqa`.
"""

from __future__ import annotations

from dataclasses import dataclass

from impl.parallel.sharding_strategy import (
    GQA,
    determine_sharding_strategy,
    get_shardable_head_counts,
)

PADDING = -1
Slots = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ShardHeads:
    """Heads of one shard.

    Attributes:
        query: query head in each slot, or `PADDING`.
        key_value: KV head in each slot, or `PADDING`.
    """

    query: Slots
    key_value: Slots


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """Heads of every shard.

    Attributes:
        tp_degree: shards.
        query: query head in each slot of all shards.
        key_value: KV head in each slot of all shards.
    """

    tp_degree: int
    query: Slots
    key_value: Slots

    def shard(self, index: int) -> ShardHeads:
        """Heads of shard `index`."""
        return ShardHeads(*(self._of(slots, index) for slots in (self.query, self.key_value)))

    def _of(self, slots: Slots, index: int) -> Slots:
        count = len(slots) // self.tp_degree
        return slots[index * count : (index + 1) * count]


def head_layout(
    tp_degree: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    desired_sharding_strategy: GQA | None = None,
) -> HeadLayout:
    """Lay heads over shards.

    Args:
        tp_degree: shards.
        num_attention_heads: query heads of the model.
        num_key_value_heads: KV heads of the model, which divide them.
        desired_sharding_strategy: see `impl.parallel.sharding_strategy`.
    """
    heads, kv_heads = num_attention_heads, num_key_value_heads
    strategy = determine_sharding_strategy(tp_degree, kv_heads, desired_sharding_strategy)
    q_count, kv_count = get_shardable_head_counts(tp_degree, heads, kv_heads, strategy)
    group = heads // kv_heads
    if strategy is GQA.REPLICATE_TO_TP_DEGREE:
        copies, padded = kv_count // kv_heads, q_count // kv_heads
        key_value = tuple(slot // copies for slot in range(kv_count))
        query = tuple(
            slot // padded * group + slot % padded if slot % padded < group else PADDING
            for slot in range(q_count)
        )
        return HeadLayout(tp_degree, query, key_value)
    copies = 1 if kv_count == kv_heads else group
    return HeadLayout(
        tp_degree,
        _padded(tuple(range(heads)), q_count),
        _padded(tuple(slot // copies for slot in range(kv_heads * copies)), kv_count),
    )


def _padded(heads: Slots, count: int) -> Slots:
    return heads + (PADDING,) * (count - len(heads))


def slots_of(wanted: Slots, held: Slots) -> tuple[int | None, ...]:
    """Where a rank that holds some heads finds those that another layout wants of it.

    Args:
        wanted: head in each slot of decode; each is held, or padding.
        held: head in each slot of prefill.

    Returns:
        Per wanted slot, a slot of `held` with that head; None for padding.
    """
    return tuple(None if head == PADDING else held.index(head) for head in wanted)
