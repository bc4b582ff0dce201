"""Walks a schedule: the calls that its parts mean, with the position of every token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from conformance.errors import UsageError
from conformance.schedules import IDLE, Part, Schedule
from golden import Packing, tree_depths, tree_mask

CallKind: TypeAlias = Literal["prompt", "piece", "decode", "drafts", "packed"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PlannedCall:
    """One call of a schedule.

    Attributes:
        kind: what it is.
        part: the part it belongs to, from 0.
        first: its first token's place among the part's.
        rows: `(batch,)`, int64, the cache row of each batch row, -1 for an idle one; of each
            sequence for `packed`.
        in_order: whether those are all cache rows in order, so that ids need not be given.
        positions: `(batch, q_len)`, int64, -1 for padding; `(1, q_len)` for `packed`.
        kept: `(batch, q_len)`, bool, tokens that the cache must hold afterwards: all but padding
            and rejected drafts.
        seen: `(q_len, q_len)`, bool, which draft may see which; None without drafts.
        packing: how sequences stand side by side; None but for `packed`.
        piece: number of a piece, from 0; -1 but for `piece`.
        fresh: whether its sequences start anew.
    """

    kind: CallKind
    part: int
    first: int
    rows: NDArray[np.int64]
    in_order: bool
    positions: NDArray[np.int64]
    kept: NDArray[np.bool_]
    seen: NDArray[np.bool_] | None = None
    packing: Packing | None = None
    piece: int = -1
    fresh: bool = False

    @property
    def q_len(self) -> int:
        """Tokens of a batch row, padding included."""
        return int(self.positions.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class Walk:
    """A schedule walked through.

    Attributes:
        calls: every call, in order.
        lengths: tokens that each cache row holds afterwards.
        max_length: positions a cache needs, rejected drafts included.
    """

    calls: tuple[PlannedCall, ...]
    lengths: tuple[int, ...]
    max_length: int


def walk(schedule: Schedule, cached: tuple[int, ...]) -> Walk:
    """Walk a schedule.

    Args:
        schedule: what is asked for.
        cached: tokens that each cache row holds before.

    Raises:
        UsageError: a part names a cache row that there is not.
    """
    held, calls = list(cached), []
    longest = max(cached)
    for number, part in enumerate(schedule.parts):
        if max(part.rows) >= len(cached):
            raise UsageError(
                f"parts must name cache rows below b{len(cached)}, got {max(part.rows)}"
            )
        if part.fresh:
            for row in set(part.rows) - {IDLE}:
                held[row] = 0
        for call in _calls(number, part, held):
            calls.append(call)
            longest = max(longest, int(call.positions.max()) + 1)
    return Walk(tuple(calls), tuple(held), longest)


def _calls(number: int, part: Part, held: list[int]) -> Iterator[PlannedCall]:
    """Yield a part's calls and count what they leave in the cache."""
    rows = np.array(part.rows, dtype=np.int64)
    in_order = part.rows == tuple(range(len(held)))
    before = np.array([0 if row == IDLE else held[row] for row in part.rows], dtype=np.int64)
    tokens = np.array(part.tokens, dtype=np.int64)
    steps = np.arange(tokens.max())
    seated = rows[:, None] != IDLE
    if part.parents:
        depths = np.array(tree_depths(part.parents), dtype=np.int64)
        kept = np.zeros((rows.size, depths.size), dtype=np.bool_)
        for row in range(rows.size):
            kept[row, list(part.path(row))] = True
        yield PlannedCall(
            kind="drafts",
            part=number,
            first=0,
            rows=rows,
            in_order=in_order,
            positions=np.where(seated, before[:, None] + depths, -1),
            kept=kept & seated,
            seen=tree_mask(part.parents),
        )
        taken = kept.sum(axis=1)
    elif part.kind == "packed":
        if (rows == IDLE).any():
            raise UsageError(f"every packed sequence must have a cache row, got {part.rows}")
        packing = Packing(part.tokens, tuple(int(n) for n in before + tokens))
        positions = packing.q_positions
        yield PlannedCall(
            kind="packed",
            part=number,
            first=0,
            rows=rows,
            in_order=in_order,
            positions=positions,
            kept=np.ones(positions.shape, dtype=np.bool_),
            packing=packing,
        )
        taken = tokens
    else:
        lead = tokens.max() - tokens if part.kind == "left" else np.zeros_like(tokens)
        place = steps - lead[:, None]
        real = seated & (place >= 0) & (place < tokens[:, None])
        positions = np.where(real, before[:, None] + place, -1)
        longest = int(tokens.max())
        size = {"pieces": part.piece, "decode": 1}.get(part.kind, longest)
        for count, first in enumerate(range(0, longest, size)):
            now = slice(first, first + size)
            yield PlannedCall(
                kind={"pieces": "piece", "decode": "decode"}.get(part.kind, "prompt"),  # type: ignore[arg-type]  # its values are kinds
                part=number,
                first=first,
                rows=rows,
                in_order=in_order,
                positions=positions[:, now],
                kept=real[:, now],
                piece=count if part.kind == "pieces" else -1,
                fresh=part.fresh and first == 0,
            )
        taken = tokens
    for row, count in zip(part.rows, taken.tolist(), strict=True):
        if row != IDLE:
            held[row] += count


def part_names(schedule: Schedule) -> tuple[str, ...]:
    """Return the name of each part's output: `1.prompt`, `2.decode`."""
    return tuple(f"{number}.{part.kind}" for number, part in enumerate(schedule.parts, start=1))
