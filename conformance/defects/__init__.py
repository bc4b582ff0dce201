"""Known bugs as rewrites of a correct kernel, each with the public report it comes from.

They are what an acceptance rule should reject; `CONTROLS` are rewrites it must accept.
"""

from __future__ import annotations

from conformance.defects.controls import CONTROLS
from conformance.defects.kernel import Kernel
from conformance.defects.masks import MASK_DEFECTS
from conformance.defects.memory import MEMORY_DEFECTS
from conformance.defects.problem import Problem, problem_of
from conformance.defects.record import Defect
from conformance.defects.rounding import ROUNDING_DEFECTS
from conformance.defects.softmax import SOFTMAX_DEFECTS

__all__ = ["CONTROLS", "DEFECTS", "Defect", "Kernel", "Problem", "problem_of"]

DEFECTS: tuple[Defect, ...] = (
    *MASK_DEFECTS,
    *SOFTMAX_DEFECTS,
    *MEMORY_DEFECTS,
    *ROUNDING_DEFECTS,
)
"""Every known bug."""
