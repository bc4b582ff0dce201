"""Stacks of interleaved layers: local beside global, with and without RoPE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from golden.cache import empty_cache
from golden.caches.chunk import chunk_cache
from golden.caches.held import Cache
from golden.caches.rolling import rolling_cache
from golden.config import AttentionConfig
from golden.errors import ConfigError
from golden.serving import forward
from golden.stages import Array
from golden.weights import AttentionWeights


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers of a few kinds, repeating in a pattern.

    S1: layer `i` is of kind `pattern[i % len(pattern)]`; a last period may be cut short.

    Gemma 3 is `("local",) * 5 + ("global",)`, Llama 4 three chunked layers with RoPE and one
    global without (NoPE), GPT-OSS `("window", "global")`.

    Attributes:
        kinds: configuration by name.
        pattern: one period of names.
        num_layers: layers in all.

    Raises:
        ConfigError: a name is unknown, or the layers differ in `hidden_size`.
    """

    kinds: Mapping[str, AttentionConfig]
    pattern: tuple[str, ...]
    num_layers: int

    def __post_init__(self) -> None:
        unknown = sorted(set(self.pattern) - self.kinds.keys())
        if unknown or not self.pattern or self.num_layers < 1:
            raise ConfigError(
                f"pattern must name kinds among {', '.join(self.kinds)} for at least one layer, "
                f"got {self.pattern} for {self.num_layers}"
            )
        widths = {config.hidden_size for config in self.kinds.values()}
        if len(widths) != 1:
            raise ConfigError(f"kinds must share one hidden_size, got {sorted(widths)}")

    @property
    def layers(self) -> tuple[AttentionConfig, ...]:
        """Configuration of every layer in order (S1)."""
        period = len(self.pattern)
        return tuple(self.kinds[self.pattern[i % period]] for i in range(self.num_layers))

    def caches(
        self, *, batch: int, max_length: int, speculation_length: int = 1
    ) -> tuple[Cache, ...]:
        """Return each layer's smallest empty cache: rolling, chunk or contiguous.

        Raises:
            ConfigError: a number is not positive.
        """
        return tuple(
            _smallest_cache(config, batch, max_length, speculation_length) for config in self.layers
        )


def _smallest_cache(
    config: AttentionConfig, batch: int, max_length: int, speculation_length: int
) -> Cache:
    window, chunk = config.sliding_window, config.attention_chunk_size
    if window is not None and window + speculation_length - 2 < max_length:
        return rolling_cache(config, batch=batch, speculation_length=speculation_length)
    if chunk is not None and chunk < max_length:
        return chunk_cache(config, batch=batch)
    return empty_cache(config, batch=batch, max_length=max_length)


class StackResult(NamedTuple):
    """Result of a stack.

    Attributes:
        hidden_states: `(batch, q_len, hidden_size)`, float64.
        caches: one per layer, after this call.
    """

    hidden_states: Array
    caches: tuple[Cache, ...]


def run_stack(
    stack: Stack,
    weights: Sequence[AttentionWeights],
    hidden_states: Any,
    *,
    position_ids: Any,
    caches: Sequence[Cache],
) -> StackResult:
    """Run every layer in order, adding each one's output to its input; no MLP between them.

    Args:
        stack: the layers.
        weights: one per layer.
        hidden_states: `(batch, q_len, hidden_size)`.
        position_ids: `(batch, q_len)`, int; -1 marks padding. Layers share them.
        caches: one per layer, of `stack.caches` or of any kind.

    Raises:
        ConfigError: weights or caches are not one per layer.
        ShapeError: an array does not fit.
    """
    if not len(weights) == len(caches) == stack.num_layers:
        raise ConfigError(
            f"weights and caches must be one per layer, {stack.num_layers}, got {len(weights)} "
            f"and {len(caches)}"
        )
    hidden = np.asarray(hidden_states, dtype=np.float64)
    written: list[Cache] = []
    for config, layer_weights, cache in zip(stack.layers, weights, caches, strict=True):
        result = forward(config, layer_weights, hidden, position_ids=position_ids, cache=cache)
        hidden = hidden + result.output
        written.append(result.cache)
    return StackResult(hidden, tuple(written))
