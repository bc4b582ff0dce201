"""Which slot of a cache a position is written to, and which position a slot holds.

Both follow from the layout and from how many tokens a row has cached, so a decode step knows what
every slot holds from static shapes and `position_ids` alone. Token `t` of a row goes to:

| layout | slot | slots in use |
| --- | --- | --- |
| `ContiguousSlots` | `t` (also a paged cache, gathered by its block table) | all |
| `RollingSlots(ring)` | `t % ring` | `ring` |
| `ChunkSlots(size)` | `t % size`, and only tokens of the newest chunk stay | `size` |
| `ShardSlots(core, cores)` | `t // cores` on core `t % cores`, nowhere on the others | all |
| `ShardGroupSlots(cores, room)` | `t % cores * room + t // cores`: all cores side by side | all |
| `LeftPaddedSlots` | the last one, once earlier tokens moved left | all |

With 4 tokens cached, slots of `RollingSlots(3)` hold `3 1 2`, of `ChunkSlots(4)` nothing (a new
chunk starts), of `ShardSlots(1, 2)` `1 3`, and the last four of `LeftPaddedSlots` `0 1 2 3`.

Source: neuronx-distributed-inference, `get_last_kv_window` and the masks of `NeuronBaseModel`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from impl.errors import ConfigError, ShapeError, explain

NOWHERE = -1
"""Slot of a token that is not cached, and position of a slot that holds none."""


class SlotLayout(ABC):
    """Where a kind of cache keeps the tokens of a row."""

    @abstractmethod
    def slot_of(self, positions: Tensor) -> Tensor:
        """Slot of each position, int64; `NOWHERE` for a position that this cache never holds.

        Args:
            positions: int64, none negative.
        """

    def stays(self, positions: Tensor, newest: Tensor) -> Tensor:
        """Whether each position of a step is still held once the newest one is written.

        Args:
            positions: `(batch, seq_len)`, int64, those of the step.
            newest: `(batch, 1)`, int64, the largest of each row.

        Returns:
            `(batch, seq_len)`, bool.
        """
        return torch.ones_like(positions, dtype=torch.bool)

    @abstractmethod
    def slots_for(self, length: int) -> int:
        """Slots that positions below `length` use; they are the first ones of the cache."""

    @abstractmethod
    def held(self, cached: Tensor, slots: Tensor, count: int) -> Tensor:
        """Position in each slot, before those that are not cached (negative) are cleared.

        Args:
            cached: `(batch, 1)`, int64: tokens the row has cached.
            slots: `(1, count)`, int64: slot numbers.
            count: slots of the cache.

        Returns:
            Broadcastable to `(batch, count)`, int64.
        """


@dataclass(frozen=True, slots=True)
class ContiguousSlots(SlotLayout):
    """Slot `p` holds position `p`."""

    def slot_of(self, positions: Tensor) -> Tensor:
        """See `SlotLayout`."""
        return positions

    def slots_for(self, length: int) -> int:
        """See `SlotLayout`."""
        return length

    def held(self, cached: Tensor, slots: Tensor, count: int) -> Tensor:
        """See `SlotLayout`."""
        return slots


@dataclass(frozen=True, slots=True)
class RollingSlots(SlotLayout):
    """Slot `t % ring` holds token `t` until token `t + ring` takes it.

    A draft that was rejected has overwritten the token `ring` before it; `of` makes the ring so
    long that no window reaches that token again.

    Attributes:
        ring: slots in use; 0 holds nothing, which is the window of one key.
    """

    ring: int

    def __post_init__(self) -> None:
        if self.ring < 0:
            raise ConfigError(explain("ring", "be >= 0", self.ring))

    @classmethod
    def of(cls, sliding_window: int, speculation_length: int = 1) -> RollingSlots:
        """Ring for a window of `W` keys and steps of up to `T` tokens: `W - 1 + T - 1` slots.

        A token brings its own key, so `W - 1` earlier ones are enough; of `T` drafts all but one
        may be rejected.

        Args:
            sliding_window: keys a query may see, its own included.
            speculation_length: tokens of a decode step, drafts included; 0 and 1 are alike.
        """
        return cls(sliding_window - 1 + max(speculation_length, 1) - 1)

    def slot_of(self, positions: Tensor) -> Tensor:
        """See `SlotLayout`."""
        if self.ring == 0:
            return torch.full_like(positions, NOWHERE)
        return torch.remainder(positions, self.ring)

    def stays(self, positions: Tensor, newest: Tensor) -> Tensor:
        """See `SlotLayout`."""
        return positions > newest - self.ring

    def slots_for(self, length: int) -> int:
        """See `SlotLayout`; one slot even if the ring has none, as a cache is never empty."""
        return max(min(self.ring, length), 1)

    def held(self, cached: Tensor, slots: Tensor, count: int) -> Tensor:
        """See `SlotLayout`."""
        if self.ring == 0:
            return torch.full_like(slots, NOWHERE)
        newest = cached - 1
        latest = newest - torch.remainder(newest - slots, self.ring)
        return latest.masked_fill(slots >= self.ring, NOWHERE)


@dataclass(frozen=True, slots=True)
class ChunkSlots(SlotLayout):
    """Slot `s` holds the token at offset `s` of the chunk that the next token belongs to.

    Attributes:
        size: positions of a chunk, which is the slots in use.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(explain("size", "be >= 1", self.size))

    def slot_of(self, positions: Tensor) -> Tensor:
        """See `SlotLayout`."""
        return torch.remainder(positions, self.size)

    def stays(self, positions: Tensor, newest: Tensor) -> Tensor:
        """See `SlotLayout`."""
        return positions >= newest - torch.remainder(newest, self.size)

    def slots_for(self, length: int) -> int:
        """See `SlotLayout`."""
        return min(self.size, length)

    def held(self, cached: Tensor, slots: Tensor, count: int) -> Tensor:
        """See `SlotLayout`."""
        start = cached - torch.remainder(cached, self.size)
        return (start + slots).masked_fill(slots >= self.size, NOWHERE)


@dataclass(frozen=True, slots=True)
class ShardSlots(SlotLayout):
    """Slot `s` of core `r` of `g` holds position `s * g + r` (flash decoding).

    Attributes:
        core: this core's rank in its group.
        cores: cores that share a KV head.
    """

    core: int
    cores: int

    def __post_init__(self) -> None:
        if not 0 <= self.core < self.cores:
            raise ConfigError(explain("core", f"be in 0..{self.cores - 1}", self.core))

    def slot_of(self, positions: Tensor) -> Tensor:
        """See `SlotLayout`."""
        slots = torch.div(positions, self.cores, rounding_mode="floor")
        elsewhere = torch.remainder(positions, self.cores) != self.core
        return slots.masked_fill(elsewhere, NOWHERE)

    def slots_for(self, length: int) -> int:
        """See `SlotLayout`; as many on every core."""
        return -(-length // self.cores)

    def held(self, cached: Tensor, slots: Tensor, count: int) -> Tensor:
        """See `SlotLayout`."""
        return slots * self.cores + self.core


@dataclass(frozen=True, slots=True)
class ShardGroupSlots(SlotLayout):
    """The shards of a flash-decoding group side by side in one process, core 0 first.

    Attributes:
        cores: cores that share a KV head.
        room: slots of each.
    """

    cores: int
    room: int

    def __post_init__(self) -> None:
        for name in ("cores", "room"):
            if getattr(self, name) < 1:
                raise ConfigError(explain(name, "be >= 1", getattr(self, name)))

    def slot_of(self, positions: Tensor) -> Tensor:
        """See `SlotLayout`; beyond the last position it is past the end on every core."""
        slots = torch.div(positions, self.cores, rounding_mode="floor")
        own = torch.remainder(positions, self.cores) * self.room + slots
        return torch.where(slots < self.room, own, self.cores * self.room)

    def slots_for(self, length: int) -> int:
        """See `SlotLayout`; all, as those of a core are not the first ones of the cache."""
        return self.cores * self.room

    def held(self, cached: Tensor, slots: Tensor, count: int) -> Tensor:
        """See `SlotLayout`."""
        core = torch.div(slots, self.room, rounding_mode="floor")
        return torch.remainder(slots, self.room) * self.cores + core


@dataclass(frozen=True, slots=True)
class LeftPaddedSlots(SlotLayout):
    """The last slot holds the newest token, and padding lies to the left of the first.

    Slots change with every token, so tokens are appended and not written by position.
    """

    def slot_of(self, positions: Tensor) -> Tensor:
        """Refuse: a position has no fixed slot here."""
        raise ConfigError(
            explain("layout", "give each position a slot", "LeftPaddedSlots", "append instead")
        )

    def slots_for(self, length: int) -> int:
        """See `SlotLayout`; here they are the last ones of the cache."""
        return length

    def held(self, cached: Tensor, slots: Tensor, count: int) -> Tensor:
        """See `SlotLayout`."""
        return slots - count + cached


def first_positions(position_ids: Tensor) -> Tensor:
    """Tokens each row has cached before a step: its first position.

    Args:
        position_ids: `(batch, seq_len)`, integer; negative marks padding.

    Returns:
        `(batch,)`, int64; 0 for a row of padding alone.
    """
    positions = position_ids.to(torch.int64)
    beyond = torch.iinfo(torch.int64).max
    first = positions.masked_fill(positions < 0, beyond).amin(dim=1)
    return first.masked_fill(first == beyond, 0)


def slot_positions(layout: SlotLayout, first_positions: Tensor, slots: int) -> Tensor:
    """Position that each slot of a cache holds before a step.

    What lies at or beyond a row's first position is left from drafts that were rejected, or from
    an earlier sequence, and counts as empty.

    Args:
        layout: the kind of cache.
        first_positions: `(batch,)`, integer: each row's first position of this step, which is how
            many tokens it has cached.
        slots: slots of the cache.

    Returns:
        `(batch, slots)`, int64; -1 for an empty or stale slot.

    Raises:
        ShapeError: `first_positions` is not one integer per row.
    """
    kind = first_positions.dtype
    if first_positions.dim() != 1 or kind.is_floating_point or kind == torch.bool:
        raise ShapeError(
            explain(
                "first_positions", "be integers (batch,)", f"{kind} {tuple(first_positions.shape)}"
            )
        )
    cached = first_positions.to(torch.int64)[:, None]
    numbers = torch.arange(slots, device=first_positions.device)[None, :]
    held = layout.held(cached, numbers, slots)
    return torch.where((held >= 0) & (held < cached), held, NOWHERE)
