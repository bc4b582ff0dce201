"""What an acceptance rule is, and what it may look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from golden import FORMATS, Array


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """What a rule may look at; all arrays `(rows, head_dim)`, float64, padding left out.

    Attributes:
        output: what the kernel under test returned.
        golden: the exact answer.
        baseline: what PyTorch computes operator by operator in the tensors' dtype.
        dtype: of the kernel's tensors.
        softcapped: whether the layer has a soft cap.
    """

    output: Array
    golden: Array
    baseline: Array
    dtype: str
    softcapped: bool

    @cached_property
    def reference(self) -> Array:
        """The exact answer stored in the tensors' dtype."""
        return FORMATS[self.dtype].nearest(self.golden)


@dataclass(frozen=True, slots=True)
class Rule:
    """An acceptance rule.

    Attributes:
        name: as tables show it.
        accepts: whether a trial passes.
    """

    name: str
    accepts: Callable[[Trial], bool]
