"""Low-rank adapters on the four projections, one adapter per batch row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from golden.arrays import as_float64
from golden.config import AttentionConfig
from golden.errors import ConfigError, ShapeError
from golden.stages import Accumulation, Array, Observer, unobserved
from golden.weights import weight_shapes

TARGETS = ("q", "k", "v", "o")
"""Projections that can carry adapters."""


class Adapters(NamedTuple):
    """The adapters of one projection.

    Attributes:
        down: `(adapters, rank, in)`, float64; the literature's A.
        up: `(adapters, out, rank)`, float64; the literature's B, zero at the start of training.
        scaling: `(adapters,)`, float64; `lora_alpha / rank`.
    """

    down: Array
    up: Array
    scaling: Array


@dataclass(frozen=True, slots=True, eq=False)
class Lora:
    """Adapters, and which of them each batch row uses.

    L1: a row with adapter `a` adds `scaling[a] * up[a] @ (down[a] @ x)` to the product `W @ x`,
        before the bias.
    L2: a row whose id is -1 adds nothing.

    Attributes:
        adapters: by target, `q`, `k`, `v` or `o`; a missing target has none.
        adapter_ids: `(batch,)`, int64; -1 for none.

    Source: Hu et al. (2021), LoRA, arXiv 2106.09685, equation 3.
    """

    adapters: Mapping[str, Adapters]
    adapter_ids: np.ndarray[Any, np.dtype[np.int64]]

    def add(
        self,
        target: str,
        x: Array,
        product: Array,
        accumulation: Accumulation,
        observe: Observer = unobserved,
    ) -> tuple[Array, Accumulation]:
        """Add each row's low-rank term to a projection's product.

        Args:
            target: `q`, `k`, `v` or `o`.
            x: `(batch, length, in)`, the projection's input.
            product: `(batch, length, out)`.
            accumulation: how `product` was summed.
            observe: sees the product and the low-rank term's stages (`golden.CALL_STAGES`).

        Returns:
            The sum, and how it was summed.

        Raises:
            ShapeError: `adapter_ids` has another batch.
        """
        if target not in self.adapters:
            return product, accumulation
        if self.adapter_ids.shape != x.shape[:1]:
            raise ShapeError(
                f"adapter_ids must have shape {x.shape[:1]}, (batch,), got {self.adapter_ids.shape}"
            )
        down, up, scaling = self.adapters[target]
        used = np.maximum(self.adapter_ids, 0)
        factor = np.where(self.adapter_ids >= 0, scaling[used], 0.0)[:, None, None]
        a, b = down[used].swapaxes(-1, -2), up[used].swapaxes(-1, -2)

        def inner_squares() -> Array:
            squared: Array = np.square(x) @ np.square(a)
            return squared

        inner = observe(f"{target}_lora_down", x @ a, Accumulation(x.shape[-1], inner_squares))

        def low_rank_squares() -> Array:
            squared: Array = np.square(inner) @ np.square(b)
            return squared

        low_rank = Accumulation(down.shape[1], low_rank_squares)
        delta = observe(
            f"{target}_lora", factor * observe(f"{target}_lora_up", inner @ b, low_rank)
        )

        def squares() -> Array:
            total: Array = accumulation.squares() + np.square(factor) * low_rank_squares()
            return total

        product = observe(f"{target}_base", product, accumulation)
        return product + delta, Accumulation(accumulation.length + down.shape[1], squares)


def make_lora(
    config: AttentionConfig,
    *,
    adapter_ids: Any,
    down: Mapping[str, Any],
    up: Mapping[str, Any],
    scaling: float | Mapping[str, Any] = 1.0,
) -> Lora:
    """Check adapters against a layer.

    Args:
        config: the layer.
        adapter_ids: `(batch,)`, int, -1 for none.
        down: by target, `(adapters, rank, in)`.
        up: by target, `(adapters, out, rank)`.
        scaling: one factor for all, or by target `(adapters,)`.

    Raises:
        ConfigError: a target is unknown or lacks one of its matrices, or an id has no adapter.
        ShapeError: an array does not fit.
    """
    if down.keys() != up.keys() or not down.keys() <= set(TARGETS):
        raise ConfigError(
            f"down and up must name the same targets among {', '.join(TARGETS)}, got "
            f"{sorted(down)} and {sorted(up)}"
        )
    ids = np.asarray(adapter_ids)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ShapeError(
            f"adapter_ids must be integers of shape (batch,), got {ids.dtype} {ids.shape}"
        )
    shapes = weight_shapes(config)
    adapters: dict[str, Adapters] = {}
    for target in down:
        out, width = shapes[f"{target}_proj"]
        a = as_float64(
            f"down[{target!r}]", down[target], (None, None, width), "(adapters, rank, in)"
        )
        b = as_float64(
            f"up[{target!r}]", up[target], (a.shape[0], out, a.shape[1]), "(adapters, out, rank)"
        )
        given = scaling[target] if isinstance(scaling, Mapping) else np.full(a.shape[0], scaling)
        factors = as_float64(f"scaling[{target!r}]", given, (a.shape[0],), "(adapters,)")
        if ids.size and not -1 <= int(ids.min()) <= int(ids.max()) < a.shape[0]:
            raise ConfigError(
                f"adapter_ids must lie between -1 and {a.shape[0] - 1}, got {ids.tolist()}"
            )
        adapters[target] = Adapters(a, b, factors)
    return Lora(adapters, ids.astype(np.int64))
