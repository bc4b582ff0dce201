"""Numbers inside ids, where `-` separates tokens: `1em06` is 1e-06."""

from __future__ import annotations

from conformance.errors import UsageError


def number(value: float) -> str:
    """Write a number without a `-`."""
    text = str(value) if isinstance(value, int) else repr(value).removesuffix(".0")
    return text.replace("e-", "em").replace("e+", "e").replace("-", "m")


def parsed(text: str) -> float:
    """Read a number that `number` wrote.

    Raises:
        ValueError: it is none.
    """
    return float(text.replace("em", "e-").replace("m", "-"))


def whole(name: str, text: str) -> int:
    """Read a whole number.

    Args:
        name: of the token, for the message.
        text: its number.

    Raises:
        UsageError: it is none.
    """
    if not text.isdigit():
        raise UsageError(f"token {name!r} must be followed by a whole number, got {text!r}")
    return int(text)


def joined(*parts: float | int | str) -> str:
    """Write words and numbers with `_` between them."""
    return "_".join(part if isinstance(part, str) else number(part) for part in parts)
