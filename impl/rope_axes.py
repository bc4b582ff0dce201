"""Multimodal positions (M-RoPE): which axis, such as time, height, width, turns a channel pair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from impl.errors import ConfigError, explain


def position_axes(given: Mapping[str, Any], pairs: int) -> tuple[int, ...]:
    """Return the axis of each rotated channel pair.

    * blocks: the first `mrope_section[0]` pairs follow axis 0, the next `mrope_section[1]` axis 1,
      and so on (Qwen2-VL);
    * interleaved: pair `i` follows axis `a = i % axes` if `i < axes * mrope_section[a]`, else axis
      0 (Qwen3-VL). Sections (3, 2, 2): 0 1 2 0 1 2 0.

    Args:
        given: `mrope_section`, pairs per axis, and `mrope_interleaved`, as in a Hugging Face
            configuration.
        pairs: rotated channel pairs.

    Returns:
        An axis per pair; empty where positions have one axis.

    Raises:
        ConfigError: the sections are negative, or do not add up to the pairs.

    Source: Wang et al. (2024), Qwen2-VL, arXiv 2409.12191, section 2.1; Qwen3-VL's model code.
    """
    section = [int(n) for n in given.get("mrope_section") or ()]
    interleaved = bool(given.get("mrope_interleaved", False))
    if not section:
        if interleaved:
            raise ConfigError(explain("mrope_interleaved", "come with mrope_section", None))
        return ()
    if min(section) < 0 or sum(section) != pairs:
        raise ConfigError(
            explain("mrope_section", f"add up to the {pairs} rotated channel pairs", section)
        )
    if not interleaved:
        return tuple(axis for axis, width in enumerate(section) for _ in range(width))
    axes = len(section)
    return tuple(i % axes if i < axes * section[i % axes] else 0 for i in range(pairs))
