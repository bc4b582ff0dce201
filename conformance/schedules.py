"""Schedules: what a served layer is asked to do, call after call, with one cache.

A schedule names a cache and a list of parts, each a call or several of one kind. Its text stands in
a case's id: `rolling-prompt33_17.decode3.draft4keep2_1`. Parts, with one number per row of the
batch, or one for all:

* `prompt33_17`: tokens appended at once; on a sequence that the cache holds already, a prefill on a
  cached prefix. `left33_17` pads the shorter rows on the left instead of the right.
* `pieces40by16`: a prompt in pieces of 16 tokens, one call each (windowed context encoding).
* `decode3`: three tokens, one call each.
* `draft4keep2_1`: a chain of four drafts in one call, of which the first two (in row 1 the first)
  are accepted. `tree0_0_1to3_1` is a tree: node 0 is the root, then each node's parent; accepted
  is the path down to node 3 (in row 1 to node 1).
* `packed12_1_5`: three sequences side by side in one row (chunked prefill).

Then `at2_x_0` names the cache row of each batch row, `x` an idle one, and `new` says that the
sequences start anew: others that held these rows have left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from conformance.errors import UsageError
from golden import AttentionConfig, ConfigError, tree_depths

Layout: TypeAlias = Literal["contiguous", "transposed", "rolling", "chunk", "paged", "sharded"]
PartKind: TypeAlias = Literal["prompt", "left", "pieces", "decode", "draft", "tree", "packed"]
Scales: TypeAlias = Literal["none", "tensor", "head", "channel"]

LAYOUTS: dict[str, str] = {
    "contiguous": "contiguous cache",
    "transposed": "transposed cache",
    "rolling": "rolling cache",
    "chunk": "chunk cache",
    "paged": "paged cache",
    "sharded": "core-sharded cache",
}
"""Layouts of a cache, with their names in a report."""

CODES: dict[str, str] = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2", "int8": "int8"}
"""What a quantised cache stores, by its token in an id."""

IDLE = -1
"""Cache row of a batch row that serves no sequence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheKind:
    """How a cache stores keys and values.

    Attributes:
        layout: one of `LAYOUTS`.
        size: slots of a block (`paged`) or number of cores (`sharded`), 0 otherwise.
        code: format of quantised storage, one of `CODES`' values; empty stores the case's dtype.
        scales: what has a static scale of its own; `none` casts directly.
    """

    layout: Layout = "contiguous"
    size: int = 0
    code: str = ""
    scales: Scales = "none"

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise UsageError(f"cache must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        if (self.size > 0) != (self.layout in ("paged", "sharded")):
            raise UsageError(
                "a paged cache has a block size and a sharded one a number of cores, no other has "
                f"a size; got {self.layout} and {self.size}"
            )
        if self.code and self.code not in CODES.values():
            raise UsageError(f"code must be one of {', '.join(CODES.values())}, got {self.code!r}")
        if self.scales not in ("none", "tensor", "head", "channel"):
            raise UsageError(f"scales must be none, tensor, head or channel, got {self.scales!r}")
        if self.scales != "none" and not self.code:
            raise UsageError(f"scales need a code to scale, got {self.scales!r} without")
        if self.code == "int8" and self.scales == "none":
            raise UsageError("an int8 cache must have scales; only float8 can be cast directly")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One call, or several of one kind in a row.

    Attributes:
        kind: what they are; see the module.
        tokens: new tokens of each batch row; of each sequence for `packed`.
        rows: cache row of each of them, `IDLE` for none.
        piece: tokens of a call, for `pieces`.
        parents: parent of each draft, -1 for the root; empty without drafts.
        accepted: per batch row the draft down to which a path is accepted; empty without drafts.
        fresh: whether the sequences start anew, at position 0.
    """

    kind: PartKind
    tokens: tuple[int, ...]
    rows: tuple[int, ...]
    piece: int = 0
    parents: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    fresh: bool = False

    def __post_init__(self) -> None:
        used = [row for row in self.rows if row != IDLE]
        if len(self.tokens) != len(self.rows) or not used or len(set(used)) != len(used):
            raise UsageError(
                "a part must have tokens for each of its rows and name each cache row once, got "
                f"{self.tokens} and {self.rows}"
            )
        if min(self.tokens) < 1 or min(self.rows) < IDLE:
            raise UsageError(
                f"a part's rows must bring one token or more, got {self.tokens} for {self.rows}"
            )
        if (self.piece > 0) != (self.kind == "pieces"):
            raise UsageError(f"piece must be positive for pieces alone, got {self.piece}")
        drafts = self.kind in ("draft", "tree")
        if drafts != bool(self.parents) or drafts != bool(self.accepted):
            raise UsageError("parents and accepted belong to drafts, and drafts to them")
        if drafts:
            self._check_drafts()
        if self.kind in ("decode", "draft", "tree") and len(set(self.tokens)) != 1:
            raise UsageError(f"every row must bring as many tokens, got {self.tokens}")
        if self.fresh and self.kind not in ("prompt", "left", "pieces"):
            raise UsageError(f"only a prompt starts sequences anew, got {self.kind}")

    def _check_drafts(self) -> None:
        try:
            tree_depths(self.parents)
        except ConfigError as error:
            raise UsageError(str(error)) from error
        nodes = len(self.parents)
        chain = tuple(range(-1, nodes - 1))
        if self.parents.count(-1) != 1 or (self.kind == "draft") != (self.parents == chain):
            raise UsageError(
                f"drafts must be a chain, or as tree another tree of one root, got {self.parents}"
            )
        if self.tokens[0] != nodes or len(self.accepted) != len(self.rows):
            raise UsageError("drafts must have a parent per token and an accepted node per row")
        if not 0 <= min(self.accepted) <= max(self.accepted) < nodes:
            raise UsageError(f"accepted must name drafts below {nodes}, got {self.accepted}")

    def path(self, row: int) -> tuple[int, ...]:
        """Return the drafts accepted in a batch row, the root first."""
        nodes = [self.accepted[row]]
        while self.parents[nodes[0]] >= 0:
            nodes.insert(0, self.parents[nodes[0]])
        return tuple(nodes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """A cache and what is done with it.

    Attributes:
        cache: how keys and values are stored.
        parts: what is asked for, in order.
    """

    cache: CacheKind
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise UsageError("a schedule must have a part, got none")

    def features(self, cached: tuple[int, ...]) -> tuple[str, ...]:
        """Return what the schedule exercises.

        Args:
            cached: tokens that each cache row holds before it begins.
        """
        found = [LAYOUTS[self.cache.layout]]
        if self.cache.code:
            found.append("int8 cache" if self.cache.code == "int8" else "float8 cache")
        seen = {row for row, tokens in enumerate(cached) if tokens}
        for part in self.parts:
            found += _part_features(part, seen)
            seen.update(part.rows)
        return tuple(dict.fromkeys(found))

    def check_layer(self, config: AttentionConfig) -> None:
        """Refuse a cache that the layer cannot have.

        Raises:
            UsageError: a rolling cache without a window, or a chunk cache without chunks.
        """
        for layout, name in (("rolling", "sliding_window"), ("chunk", "attention_chunk_size")):
            if self.cache.layout == layout and getattr(config, name) is None:
                raise UsageError(f"a {layout} cache needs a layer with {name}, got one without")


def _part_features(part: Part, seen: set[int]) -> list[str]:
    found = []
    if part.kind in ("prompt", "left", "pieces") and not part.fresh and seen & set(part.rows):
        found.append("prefix prefill")
    names = {
        "left": "left padding",
        "pieces": "windowed encoding",
        "draft": "speculation",
        "tree": "tree speculation",
        "packed": "packed prefill",
    }
    if part.kind in names:
        found.append(names[part.kind])
    if part.rows != tuple(range(len(part.rows))) or part.fresh or (seen and seen != set(part.rows)):
        found.append("continuous batching")
    return found
