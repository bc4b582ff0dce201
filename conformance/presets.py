"""The attention layers of published models by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from conformance.preset_models import MODELS
from conformance.preset_models.record import Preset, PresetError
from golden.config import AttentionConfig

__all__ = ["PRESETS", "Preset", "PresetError", "layer", "preset"]

PRESETS: Mapping[str, Preset] = MappingProxyType({model.name: model for model in MODELS})
"""Every preset under its name."""


def preset(name: str) -> Preset:
    """Return the preset of that name.

    Args:
        name: such as `gpt-oss-20b`.

    Returns:
        The model's attention layers.

    Raises:
        PresetError: there is none of that name; the message offers the nearest ones.
    """
    try:
        return PRESETS[name]
    except KeyError:
        near = difflib.get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.5)
        hint = f"did you mean {_listed(near)}?" if near else f"known are {_listed(PRESETS)}"
        raise PresetError(f"name must be that of a preset, got {name!r}; {hint}") from None


def layer(name: str, kind: str) -> AttentionConfig:
    """Return one kind of layer of a preset.

    Args:
        name: of the preset.
        kind: such as `global`, `sliding` or `chunked`.

    Returns:
        The configuration of that kind of layer.

    Raises:
        PresetError: there is no such preset, or it has no layer of that kind.
    """
    layers = preset(name).layers
    if kind not in layers:
        raise PresetError(
            f"kind must be one that {name!r} has, got {kind!r}; known are {_listed(layers)}"
        )
    return layers[kind]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
