"""Which values of a rank can be judged, which of their rows count, and in what order they come."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from conformance.errors import UsageError

Heads = Literal["none", "query", "key"]


class Stage(NamedTuple):
    """How a stage of a rank is laid out.

    Attributes:
        heads: whose heads its second axis counts, `query` or `key`; `none` for flat values.
        tokens: whether its tokens are the rank's own queries, the whole prompt, or, `returned`,
            those of the reduced output.
    """

    heads: Heads
    tokens: Literal["own", "all", "reduced"]


OBSERVABLE: dict[str, Stage] = {
    "q_proj": Stage("none", "own"),
    "k_proj": Stage("none", "own"),
    "v_proj": Stage("none", "own"),
    "q_rope": Stage("query", "own"),
    "k_rope": Stage("key", "own"),
    "k_gathered": Stage("key", "all"),
    "v_gathered": Stage("key", "all"),
    "logsumexp_sent": Stage("query", "own"),
    "attn": Stage("query", "own"),
    "o_product": Stage("none", "own"),
    "o_reduced": Stage("none", "reduced"),
}
"""Intermediates a subject may hand over, in the order in which a rank computes them.

`attn` is what the output projection is given: with flash decoding, in decode, the joined outputs.
`logsumexp_sent` is there with flash decoding alone: of the rank's own keys, `(batch, heads, tokens,
1)`, which it sends its group, with 0 where a query sees none of them.
"""

RESULTS = ("k_cache", "v_cache", "output")
"""What every subject hands over: the entries a call wrote to the rank's cache, and its output."""

ORDER = (
    *("q_proj", "k_proj", "v_proj", "q_rope", "k_rope", "k_gathered", "v_gathered"),
    *("k_cache", "v_cache", "logsumexp_sent", "attn", "o_product", "o_reduced", "output"),
)
"""Everything judged on a rank, as it is computed: a mistake is where the first of these is off."""


class Seen(NamedTuple):
    """One value of one rank.

    Attributes:
        rank: global rank.
        call: 0 for the prompt, or its calls in order, then the steps.
        what: of `ORDER`.
        prompts: calls that the prompt comes in.
    """

    rank: int
    call: int
    what: str
    prompts: int = 1

    def __str__(self) -> str:
        return f"rank {self.rank} {self.named} {self.what}"

    @property
    def named(self) -> str:
        """The call in words."""
        return call_name(self.call, self.prompts)

    @property
    def turn(self) -> tuple[int, int]:
        """When it is computed: by call, then by stage."""
        return self.call, ORDER.index(self.what)


def call_name(call: int, prompts: int = 1) -> str:
    """Return `prompt`, or `piece 1`, `piece 2` if it comes in several calls; then `step 1`."""
    if call >= prompts:
        return f"step {call - prompts + 1}"
    return f"piece {call + 1}" if prompts > 1 else "prompt"


def check_stages(stages: Iterable[str]) -> None:
    """Require names of stages that can be judged.

    Raises:
        UsageError: a name is unknown.
    """
    unknown = sorted(set(stages) - OBSERVABLE.keys())
    if unknown:
        raise UsageError(f"stages must be among {', '.join(OBSERVABLE)}, got {', '.join(unknown)}")
