"""The contiguous cache whose keys are stored transposed, as a matrix engine wants them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from golden.arrays import Positions
from golden.cache import ContiguousCache, empty_cache
from golden.caches.held import Held
from golden.config import AttentionConfig
from golden.stages import Array


@dataclass(frozen=True, slots=True, eq=False)
class TransposedCache:
    """A contiguous cache with keys as `(batch, heads, head_dim, slots)`; values stay BHSD.

    K10: the layout changes no value: it holds bit for bit what `ContiguousCache` holds. The
        public module refuses it beside a window, blocks or flash decoding; those are limits of
        its kernels, not of the layout.

    Attributes:
        k_transposed: `(batch, num_key_value_heads, head_dim, max_length)`, BHDS, float64.
        v: `(batch, num_key_value_heads, max_length, head_dim)`, BHSD, float64.
        positions: `(batch, max_length)`, int64; -1 if empty.

    Source: neuronx-distributed-inference, `k_cache_transposed`.
    """

    k_transposed: Array
    v: Array
    positions: Positions

    @property
    def rows(self) -> int:
        """Cache rows: sequences it can hold."""
        return int(self.v.shape[0])

    def prior(self, positions: Positions, *, seq_ids: Any = None) -> Held:
        """Return what tokens at these positions may find, BHSD."""
        return self._plain().prior(positions, seq_ids=seq_ids)

    def write(self, k: Any, v: Any, positions: Any, *, seq_ids: Any = None) -> TransposedCache:
        """Return a cache that also holds these keys (BHSD) and values.

        Raises:
            ShapeError: arrays do not fit the cache.
            ConfigError: a position is beyond the last slot.
        """
        return _transposed(self._plain().write(k, v, positions, seq_ids=seq_ids))

    def _plain(self) -> ContiguousCache:
        return ContiguousCache(self.k_transposed.swapaxes(2, 3), self.v, self.positions)


def _transposed(cache: ContiguousCache) -> TransposedCache:
    k = np.ascontiguousarray(cache.k.swapaxes(2, 3))
    return TransposedCache(k, cache.v, cache.positions)


def transposed_cache(config: AttentionConfig, *, batch: int, max_length: int) -> TransposedCache:
    """Return an empty cache with transposed keys.

    Raises:
        ConfigError: `batch` or `max_length` is not positive.
    """
    return _transposed(empty_cache(config, batch=batch, max_length=max_length))
