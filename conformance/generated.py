"""Puts measured tables into pages that people write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

_FIRST, _LAST = "<!-- measured -->", "<!-- end of measured -->"


def write_measured(page: Path, text: str) -> None:
    """Replace what stands between the marks of a page, or append marks and text to it."""
    block = f"{_FIRST}\n\n{text.strip()}\n\n{_LAST}"
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    before, mark, rest = old.partition(_FIRST)
    if not mark:
        before = f"{old.rstrip()}\n\n" if old else ""
    after = rest.partition(_LAST)[2] or "\n"
    page.write_text(f"{before}{block}{after}", encoding="utf-8")


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose columns, but for the first, are right-aligned."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
