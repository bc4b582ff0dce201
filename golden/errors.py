"""Errors that golden raises when a caller breaks one of its rules."""

from __future__ import annotations


class GoldenError(ValueError):
    """A rule of the golden model was broken by its caller."""


class ConfigError(GoldenError):
    """A configuration field has a value that no attention layer can have."""


class ShapeError(GoldenError):
    """An array has the wrong shape or dtype for its role."""
