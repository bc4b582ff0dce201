"""Where commands print: the terminal, or a pipe or log that has no width of its own."""

from __future__ import annotations

import os

from rich.console import Console

LOG_WIDTH = 120
"""Columns where nobody says how many there are: tables of figures by name need about 110."""


def console() -> Console:
    """Return what commands print through, wide enough for tables also where no terminal is.

    Returns:
        A console; its width is the terminal's, or `COLUMNS`, or `LOG_WIDTH`.
    """
    found = Console()
    if found.is_terminal or "COLUMNS" in os.environ:
        return found
    return Console(width=LOG_WIDTH)
