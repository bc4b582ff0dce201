"""What a preset is: one published model's attention layers, and where each number was read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from golden.config import AttentionConfig


class PresetError(ValueError):
    """A preset or layer kind that does not exist, or a preset that contradicts itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """The attention layers of one published model.

    Weight layout (fused or separate projections, RoPE pairing) is that of the model's Hugging Face
    checkpoint. A `sliding_window` is the published number and counts the query's own key.

    Attributes:
        name: short name, such as `llama-3.1-8b`.
        title: the model's full name.
        num_hidden_layers: decoder layers.
        layers: one configuration per kind of layer, read-only; the only kind of a uniform model is
            called `global`, also when its mask is a window.
        pattern: the kind of every layer, by index.
        sources: where the numbers were read, as repository and file.

    Raises:
        PresetError: `pattern` does not name a kind for every layer, or `layers` and `pattern` name
            different kinds, or `sources` is empty.
    """

    name: str
    title: str
    num_hidden_layers: int
    layers: Mapping[str, AttentionConfig] = field(hash=False)
    pattern: tuple[str, ...]
    sources: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))
        if len(self.pattern) != self.num_hidden_layers:
            raise PresetError(
                f"pattern of {self.name!r} must name {self.num_hidden_layers} layers, "
                f"got {len(self.pattern)}"
            )
        if set(self.pattern) != set(self.layers):
            raise PresetError(
                f"pattern and layers of {self.name!r} must name the same kinds, "
                f"got {sorted(set(self.pattern))} and {sorted(self.layers)}"
            )
        if not self.sources:
            raise PresetError(f"sources of {self.name!r} must not be empty")


def repeated(cycle: tuple[str, ...], num_hidden_layers: int) -> tuple[str, ...]:
    """Return the kind of every layer when the kinds recur in a cycle that may end cut short.

    Args:
        cycle: kinds of the first layers, from layer 0.
        num_hidden_layers: layers of the model.

    Returns:
        One kind per layer.
    """
    return tuple(cycle[index % len(cycle)] for index in range(num_hidden_layers))


def uniform(
    *,
    name: str,
    title: str,
    num_hidden_layers: int,
    layer: AttentionConfig,
    sources: tuple[str, ...],
) -> Preset:
    """Return the preset of a model whose layers are all alike."""
    return Preset(
        name=name,
        title=title,
        num_hidden_layers=num_hidden_layers,
        layers={"global": layer},
        pattern=repeated(("global",), num_hidden_layers),
        sources=sources,
    )
