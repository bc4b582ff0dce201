"""Does an implementation of attention compute what golden defines, to the precision it claims?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conformance.api import Deviation, assert_conforms, case_inputs, judge_output

__all__ = ["Deviation", "assert_conforms", "case_inputs", "judge_output"]


def __getattr__(name: str) -> Any:
    """Import the interface on first use: it needs torch, which `import conformance` must not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from conformance import api

    return getattr(api, name)
