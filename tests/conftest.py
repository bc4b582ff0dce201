"""What holds for every test of the project."""

from __future__ import annotations

from hypothesis import settings

# A property is not wrong because the machine was busy.
settings.register_profile("attn-conformance", deadline=None)
settings.load_profile("attn-conformance")
