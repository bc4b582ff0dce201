"""How numbers and settings are written in a report: short, aligned, never misleading."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

LONGEST_TEXT = 2000
"""Characters of one setting that are shown; longer ones are cut and say so."""

_POSITIONAL = (1e-3, 1e6)
"""Magnitudes written without an exponent."""


def number(value: float) -> str:
    """Write a figure with three significant digits, with an exponent when it is far from 1.

    Large figures keep every digit before the point: `12345.6` is written `12346`.
    """
    if not math.isfinite(value):
        return _not_finite(value)
    if value == 0:
        return "0"
    if not _POSITIONAL[0] <= abs(value) < _POSITIONAL[1]:
        return f"{value:.2e}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:#.3g}".rstrip(".")


def exact(value: float) -> str:
    """Write an element with eight significant digits, enough to tell bfloat16 neighbours apart."""
    return f"{value:.8g}" if math.isfinite(value) else _not_finite(value)


def ratio(value: float) -> str:
    """Write a multiple of a limit, so that rounding never moves it across the limit.

    A ratio that would round to 1 without being 1 is written `<1.00x` or `>1.00x`.
    """
    if not math.isfinite(value):
        return f"{_not_finite(value)}\N{MULTIPLICATION SIGN}"
    if value != 1 and f"{value:.2f}" == "1.00":
        text = "<1.00" if value < 1 else ">1.00"
    elif 0 < value < 0.005:
        text = "<0.01"
    elif value < 100:
        text = f"{value:.2f}" if value < 10 else f"{value:.1f}"
    else:
        text = number(value)
    return f"{text}\N{MULTIPLICATION SIGN}"


def duration(seconds: float) -> str:
    """Write a time in the unit a person would use."""
    if not math.isfinite(seconds):
        return _not_finite(seconds)
    if seconds < 1:
        return f"{seconds * 1000:#.3g}".rstrip(".") + " ms" if seconds >= 1e-3 else "<1 ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def place(index: Sequence[int]) -> str:
    """Write a position in an array, empty for no position."""
    return f"[{', '.join(str(item) for item in index)}]" if index else ""


def count(amount: int, noun: str) -> str:
    """Write an amount with its noun, plural where it should be: `1 case`, `2,000 cases`."""
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}s"


def setting(value: Any) -> str:
    """Write one configuration or environment value on one line."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, (list, tuple, Mapping)):
        text = json.dumps(value, default=str)
    else:
        text = str(value)
    return cut(text)


def cut(text: str, longest: int = LONGEST_TEXT) -> str:
    """Return the text, or its beginning and end around a note of how much is left out."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} [{len(text) - 2 * half:,} characters left out] {text[-half:]}"


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted names and written values of a nested mapping, in its order."""
    for name, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", setting(value)


def _not_finite(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "\N{INFINITY}" if value > 0 else "-\N{INFINITY}"
