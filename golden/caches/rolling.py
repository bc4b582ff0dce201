"""The cache of a sliding window: a ring of slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from golden.arrays import Positions
from golden.caches.held import (
    Held,
    before_first,
    cache_rows,
    checked_write,
    empty_held,
    first_positions,
    rows_of,
    scattered,
)
from golden.config import AttentionConfig
from golden.errors import ConfigError


@dataclass(frozen=True, slots=True, eq=False)
class RollingCache:
    """The last keys of a sliding window, token `t` in slot `t % ring`.

    K1: `ring = window - 1 + (speculation_length - 1)`: the next token brings its own key, and up
        to `speculation_length - 1` rejected drafts may have overwritten the oldest.
    K2: of a call with more tokens than slots, the last ones stay.
    K3: slots beyond `ring` are never used; the public module allocates `window` of them.

    With window 4, slots after a prompt whose last position is 2, 3, 4 and 9::

        0 1 2    3 1 2    3 4 2    9 7 8

    Attributes:
        held: keys, values and positions by slot.
        window: keys a query may see, its own included.
        ring: slots in use.

    Source: neuronx-distributed-inference, `get_last_kv_window` and its sliding-window masks.
    """

    held: Held
    window: int
    ring: int

    @property
    def positions(self) -> Positions:
        """The position each slot holds, `(batch, slots)`; -1 if empty."""
        return self.held.positions

    @property
    def rows(self) -> int:
        """Cache rows: sequences it can hold."""
        return int(self.held.positions.shape[0])

    def prior(self, positions: Positions, *, seq_ids: Any = None) -> Held:
        """Return what the window still reaches (C1, C2).

        Raises:
            ConfigError: more drafts were rejected than the ring was made for.
        """
        rows = cache_rows(seq_ids, positions.shape[0], self.rows)
        held = rows_of(self.held, rows)
        first = first_positions(positions)[:, None]
        lost = np.where(held.positions >= first, held.positions - self.ring, -1)
        reached = (lost >= 0) & (lost > first - self.window) & (lost < first)
        if bool(reached.any()):
            raise ConfigError(
                f"a ring of {self.ring} slots lost position {int(lost[reached].max())}, which the "
                f"window of {self.window} still reaches; make it for a longer speculation_length"
            )
        return before_first(held, positions)

    def write(self, k: Any, v: Any, positions: Any, *, seq_ids: Any = None) -> RollingCache:
        """Return a cache that also holds these keys and values (K1, K2).

        Raises:
            ShapeError: arrays do not fit the cache.
            ConfigError: two tokens of a row share a position.
        """
        rows = cache_rows(seq_ids, np.shape(k)[0], self.rows)
        k, v, positions = checked_write(self.held.geometry, k, v, positions, rows)
        newest = positions.max(axis=1, initial=-1, keepdims=True)
        kept = np.where(positions > newest - self.ring, positions, -1)
        held = scattered(self.held, k, v, kept, kept % max(self.ring, 1), rows)
        return RollingCache(held, self.window, self.ring)


def rolling_cache(
    config: AttentionConfig, *, batch: int, speculation_length: int = 1, slots: int | None = None
) -> RollingCache:
    """Return an empty rolling cache for a layer with a sliding window.

    Args:
        config: the layer.
        batch: rows of the cache.
        speculation_length: tokens of a step, drafts included; 1 without speculation.
        slots: slots allocated, at least the ring's; None is just the ring's.

    Raises:
        ConfigError: the layer has no window, or a number is too small.
    """
    if config.sliding_window is None:
        raise ConfigError("a rolling cache needs a layer with sliding_window, got one without")
    if batch < 1 or speculation_length < 1:
        raise ConfigError(
            f"batch and speculation_length must be positive, got {batch} and {speculation_length}"
        )
    ring = config.sliding_window + speculation_length - 2
    slots = ring if slots is None else slots
    if slots < ring:
        raise ConfigError(f"slots must hold the ring of {ring}, got {slots}")
    return RollingCache(empty_held(config, batch=batch, slots=slots), config.sliding_window, ring)


def kernel_bucket(slots: int, *, multiple: int = 128) -> int:
    """Return the slots the public module allocates for its block kernel.

    That is `(slots // 128 + 1) * 128`: an exact multiple gets a whole spare bucket, 128 become 256.

    Source: neuronx-distributed-inference, `get_kernel_cache_size_bucket`.
    """
    return (slots // multiple + 1) * multiple
