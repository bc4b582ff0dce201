"""A cache of any kind that stores low-precision codes instead of keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from golden.arrays import Positions
from golden.caches.held import Cache, Held
from golden.quantisation import Quantisation

Inner = TypeVar("Inner", bound=Cache)


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedCache(Generic[Inner]):
    """Codes in any other cache; a step's own keys and values are read as they are.

    K13: what is written is quantised, what is read is dequantised; the tokens of the call itself
        attend to each other's exact keys, as the public module's do.

    Attributes:
        codes: the cache that holds the codes.
        keys: how keys are stored.
        values: how values are stored.
    """

    codes: Inner
    keys: Quantisation
    values: Quantisation

    @property
    def rows(self) -> int:
        """Cache rows: sequences it can hold."""
        return self.codes.rows

    def prior(self, positions: Positions, *, seq_ids: Any = None) -> Held:
        """Return what tokens at these positions may find, dequantised."""
        held = self.codes.prior(positions, seq_ids=seq_ids)
        return Held(self.keys.dequantise(held.k), self.values.dequantise(held.v), held.positions)

    def write(
        self, k: Any, v: Any, positions: Any, *, seq_ids: Any = None
    ) -> QuantisedCache[Inner]:
        """Return a cache that also holds the codes of these keys and values.

        Raises:
            ShapeError: arrays do not fit the cache or the scales.
            ConfigError: the cache has no slot for a position.
        """
        codes = self.codes.write(
            self.keys.quantise(k), self.values.quantise(v), positions, seq_ids=seq_ids
        )
        return QuantisedCache(codes, self.keys, self.values)
