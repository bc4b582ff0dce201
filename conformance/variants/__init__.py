"""Correct attention kernels that round at different places and sum in different orders.

None of them may ever be rejected under the profile it claims. They are what false alarms are
counted on: `conformance.calibration` and the rules benchmark run all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.attention import SDPBackend

from conformance.cases import DTYPES, Case
from conformance.subjects.base import CoreCall, Subject
from conformance.variants import dense, pytorch, sequential, streamed

HALF = ("bfloat16", "float16")
"""Formats so coarse that how float32 sums are cut up does not show beside them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A correct kernel.

    Attributes:
        subject: the kernel with the profile it claims.
        matches: dtypes in which it rounds and sums just as its profile says, so that its error
            should have the predicted size; in others its error is smaller.
        slow: compiles anew for every shape, so it is run on few of them.
    """

    subject: Subject
    matches: tuple[str, ...]
    slow: bool = False


def _always(case: Case) -> str | None:
    return None


def _variant(
    name: str,
    kernel: Callable[[CoreCall], Tensor],
    profile: str,
    *,
    matches: tuple[str, ...] = (),
    unsupported: Callable[[Case], str | None] = _always,
    slow: bool = False,
) -> Variant:
    subject = Subject(name=name, function=kernel, profile=profile, unsupported=unsupported)
    return Variant(subject=subject, matches=matches, slow=slow)


VARIANTS: dict[str, Variant] = {
    variant.subject.name: variant
    for variant in (
        _variant("eager", dense.eager, "eager", matches=HALF),
        _variant("flash, tile 32", streamed.flash(32), "flash", matches=HALF),
        _variant("flash, tile 64", streamed.flash(64), "flash", matches=HALF),
        _variant("flash, tile 128", streamed.flash(128), "flash", matches=HALF),
        _variant("flash, tile 512", streamed.flash(512), "flash", matches=HALF),
        _variant("flash, in sequence", sequential.sequential, "in-sequence", matches=DTYPES),
        _variant("flash, keys reversed", streamed.flash_reversed, "flash", matches=HALF),
        _variant("split in 2, merged", streamed.split_keys(2), "flash", matches=HALF),
        _variant("split in 5, merged", streamed.split_keys(5), "flash", matches=HALF),
        _variant("float32 inside", dense.float32_inside, "flash"),
        _variant("float64 inside", dense.float64_inside, "eager"),
        _variant(
            "SDPA, math",
            pytorch.sdpa(SDPBackend.MATH),
            "sdpa",
            unsupported=pytorch.no_sink_or_cap,
        ),
        _variant(
            "SDPA, flash",
            pytorch.sdpa(SDPBackend.FLASH_ATTENTION),
            "sdpa",
            unsupported=pytorch.no_sink_or_cap,
        ),
        _variant("flex attention", pytorch.flex, "eager", unsupported=pytorch.no_sink),
        _variant("eager, compiled", pytorch.compiled_eager, "eager", slow=True),
    )
}
"""Correct kernels by name, for cases of scope `core`."""
