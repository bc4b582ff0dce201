"""Bad use of the harness: what the command line reports in one sentence and ends with 2."""

from __future__ import annotations


class UsageError(ValueError):
    """The caller asked for something that does not exist or does not fit together."""
