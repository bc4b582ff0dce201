"""Rules that the numbers of a configuration keep, and the sentence that says which was broken."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from golden.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError` with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_count(name: str, value: Any, hint: str = "") -> None:
    """Require a whole number above 0; a float or a bool is none.

    Raises:
        ConfigError: it is something else.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    require(whole, f"{name} must be a whole number, got {value}")
    require(value > 0, f"{name} must be positive, got {value}{hint}")


def require_positive(name: str, value: Any, hint: str = "") -> None:
    """Require a finite number above 0.

    Raises:
        ConfigError: it is something else.
    """
    real = isinstance(value, Real) and not isinstance(value, bool)
    require(real, f"{name} must be a number, got {value}")
    require(value > 0, f"{name} must be positive, got {value}{hint}")
    require(math.isfinite(value), f"{name} must be finite, got {value}{hint}")
