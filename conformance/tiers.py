"""Tiers: how much of the matrix is judged."""

from __future__ import annotations

from conformance.errors import UsageError

TIERS = ("smoke", "standard", "full")
"""From a minute to an hour on two cores."""


def checked_tier(tier: str) -> str:
    """Return a tier's name.

    Raises:
        UsageError: there is no such tier.
    """
    if tier not in TIERS:
        raise UsageError(f"tier must be one of {', '.join(TIERS)}, got {tier!r}")
    return tier
