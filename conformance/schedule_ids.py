"""Spells out a schedule's cache and parts, and reads them back (`conformance.schedules`)."""

from __future__ import annotations

import re
from typing import cast

from conformance.errors import UsageError
from conformance.schedules import (
    CODES,
    IDLE,
    LAYOUTS,
    CacheKind,
    Layout,
    Part,
    PartKind,
    Scales,
)


def parse_cache(text: str) -> CacheKind:
    """Read a cache's token: `contiguous`, `paged8`, `rolling_int8head`.

    Raises:
        UsageError: it reads otherwise.
    """
    found = _CACHE.fullmatch(text)
    if found is None:
        raise UsageError(
            f"cache {text!r} must be one of {', '.join(LAYOUTS)}, its size and its code, such as "
            "'paged8_e4m3head'"
        )
    return CacheKind(
        layout=cast(Layout, found["layout"]),
        size=int(found["size"] or 0),
        code=CODES.get(found["code"] or "", ""),
        scales=cast(Scales, found["scales"] or "none"),
    )


def render_cache(cache: CacheKind) -> str:
    """Return a cache's token."""
    text = f"{cache.layout}{cache.size or ''}"
    if cache.code:
        short = next(name for name, code in CODES.items() if code == cache.code)
        text += f"_{short}" + ("" if cache.scales == "none" else cache.scales)
    return text


_CACHE = re.compile(
    rf"(?P<layout>{'|'.join(LAYOUTS)})(?P<size>\d+)?"
    rf"(_(?P<code>{'|'.join(CODES)})(?P<scales>tensor|head|channel)?)?"
)
_NUMBERS = r"\d+(?:_\d+)*"
_PART = re.compile(
    rf"(?P<kind>prompt|left|pieces|decode|draft|tree|packed)(?P<tokens>{_NUMBERS})"
    rf"(by(?P<piece>\d+))?(keep(?P<keep>{_NUMBERS}))?(to(?P<to>{_NUMBERS}))?"
    r"(at(?P<rows>(?:\d+|x)(?:_(?:\d+|x))*))?(?P<new>new)?"
)


def parse_parts(text: str, batch: int) -> tuple[Part, ...]:
    """Read a schedule's parts.

    Args:
        text: such as `prompt33_17.decode3`.
        batch: cache rows, which parts without `at` all serve, in order.

    Raises:
        UsageError: a part reads otherwise, or breaks a rule.
    """
    return tuple(_parse_part(part, batch) for part in text.split("."))


def _parse_part(text: str, batch: int) -> Part:
    found = _PART.fullmatch(text)
    if found is None:
        raise UsageError(f"part {text!r} must read like 'prompt33_17', 'decode3' or 'draft4keep2'")
    kind = cast(PartKind, found["kind"])
    rows = tuple(range(batch))
    if found["rows"]:
        rows = tuple(IDLE if row == "x" else int(row) for row in found["rows"].split("_"))
    numbers = tuple(int(number) for number in found["tokens"].split("_"))
    parents: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    if kind == "draft":
        parents = tuple(range(-1, numbers[0] - 1))
        accepted = tuple(kept - 1 for kept in _each(found["keep"], len(rows), text))
    elif kind == "tree":
        parents, numbers = (-1, *numbers), (len(numbers) + 1,)
        accepted = _each(found["to"], len(rows), text)
    return Part(
        kind=kind,
        tokens=numbers * len(rows) if len(numbers) == 1 else numbers,
        rows=rows,
        piece=int(found["piece"] or 0),
        parents=parents,
        accepted=accepted,
        fresh=found["new"] is not None,
    )


def _each(text: str | None, rows: int, part: str) -> tuple[int, ...]:
    if text is None:
        raise UsageError(f"part {part!r} must say what is kept, as 'draft4keep2' or 'tree0_0to1'")
    numbers = tuple(int(number) for number in text.split("_"))
    return numbers * rows if len(numbers) == 1 else numbers


def render_parts(parts: tuple[Part, ...], batch: int) -> str:
    """Return the text of a schedule's parts."""
    return ".".join(_render_part(part, batch) for part in parts)


def _render_part(part: Part, batch: int) -> str:
    text: str = part.kind
    if part.kind == "tree":
        text += _join(part.parents[1:]) + "to" + _join(_short(part.accepted))
    elif part.kind == "draft":
        kept = tuple(node + 1 for node in part.accepted)
        text += f"{part.tokens[0]}keep{_join(_short(kept))}"
    else:
        text += _join(_short(part.tokens))
    if part.piece:
        text += f"by{part.piece}"
    if part.rows != tuple(range(batch)):
        text += "at" + "_".join("x" if row == IDLE else str(row) for row in part.rows)
    return text + ("new" if part.fresh else "")


def _short(numbers: tuple[int, ...]) -> tuple[int, ...]:
    return numbers[:1] if len(set(numbers)) == 1 else numbers


def _join(numbers: tuple[int, ...]) -> str:
    return "_".join(map(str, numbers))
