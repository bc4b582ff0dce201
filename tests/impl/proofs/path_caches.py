"""The cache of a path: golden's and impl's of one kind, holding the same tokens before the call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from forward_paths import CACHED, LINES, Path
from torch import Tensor

import golden
from golden import AttentionConfig, QuantisedCache
from impl import InferenceConfig, KVCacheManager
from impl.slot_positions import slot_positions

Values = np.ndarray[Any, Any]


def rows_of(path: Path) -> int:
    """Rows of a path's cache: its lines, or the sequences that it packs."""
    if path.packed is not None:
        return len(path.packed)
    return 2 if path.seq_ids is None else LINES


def cached_lengths(path: Path) -> tuple[int, ...]:
    """Tokens that each row of the batch, or packed sequence, has cached before the call."""
    if path.packed is not None:
        return tuple(held for _, held in path.packed)
    return CACHED if path.cached else (0, 0)


def slots_of(path: Path) -> int:
    """Slots of a sequence, and positions that the layer must reach."""
    return path.slots or (12 if path.q_len < 7 else max(CACHED) + path.q_len)


def positions_before(path: Path) -> Values:
    """Positions of the cached tokens, `(batch, longest)`, -1 where a row has fewer."""
    lengths = np.array(cached_lengths(path))[:, None]
    longest = lengths.max(initial=0)
    before = np.arange(longest)[None]
    if path.run.get("padding_side") == "left":
        return np.maximum(before - longest + lengths, -1)
    return np.where(before < lengths, before, -1)


def golden_cache(path: Path, config: AttentionConfig) -> Any:
    """Golden's empty cache of the path's kind; those that only store otherwise are contiguous."""
    made: Any
    if path.own_slots and config.sliding_window is not None:
        drafts = max(path.run.get("speculation_length", 1), 1)
        made = golden.rolling_cache(config, batch=rows_of(path), speculation_length=drafts)
    elif path.own_slots:
        made = golden.chunk_cache(config, batch=rows_of(path))
    else:
        made = golden.empty_cache(config, batch=rows_of(path), max_length=slots_of(path))
    return made if path.stored is None else QuantisedCache(made, *path.stored)


def by_position(k: Values, v: Values, held: Values, length: int) -> tuple[Values, Values]:
    """Lay slots out by the position they hold; positions that none holds are zero."""
    rows, slots = np.nonzero(held >= 0)
    found = []
    for values in (k, v):
        laid = np.zeros((*values.shape[:2], length, values.shape[3]))
        laid[rows, :, held[rows, slots]] = values[rows, :, slots]
        found.append(laid)
    return found[0], found[1]


def out_of_reach(config: AttentionConfig, lengths: Values, length: int) -> Values:
    """Which cached positions the next token of each row cannot see, so a cache may drop them.

    Args:
        config: the layer.
        lengths: `(rows,)`, tokens that each row has cached.
        length: positions of a sequence.

    Returns:
        `(rows, length)`, bool.
    """
    first = np.zeros_like(lengths)
    if config.sliding_window is not None:
        first = lengths - config.sliding_window + 1
    if config.attention_chunk_size is not None:
        first = lengths - lengths % config.attention_chunk_size
    at = np.arange(length)[None]
    hidden: Values = (at < first[:, None]) & (at < lengths[:, None])
    return hidden


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """Impl's cache of a path.

    Attributes:
        managers: the cache managers: one, or one a core.
        tables: of a paged cache: blocks of every row, `(rows, blocks)`; None of another.
        length: positions of a sequence.
    """

    managers: tuple[KVCacheManager, ...]
    tables: Tensor | None
    length: int

    @classmethod
    def of(cls, path: Path, config: InferenceConfig) -> Served:
        """Make an empty one."""
        scales = None
        if path.stored is not None and path.stored[0].scale is not None:
            scales = [tuple(torch.tensor(form.scale) for form in path.stored)]
        cores: Sequence[int | None] = range(path.cores) if path.cores > 1 else [None]
        tables, size = None, path.run.get("pa_block_size")
        if size:
            each = -(-slots_of(path) // size)
            blocks = np.random.default_rng(2).permutation(path.run["pa_num_blocks"])
            tables = torch.from_numpy(blocks[: rows_of(path) * each].reshape(rows_of(path), each))
        return cls(
            managers=tuple(KVCacheManager(config, core=c, kv_scales=scales) for c in cores),
            tables=tables,
            length=slots_of(path),
        )

    def write(self, k: Tensor, v: Tensor, positions: Values, seq_ids: Tensor | None) -> None:
        """Write tokens of the batch."""
        for manager in self.managers:
            update = manager.update_kv_by_layer_id(
                0,
                position_ids=torch.from_numpy(positions),
                kv_per_layer=(k, v),
                seq_ids=seq_ids,
                active_block_table=self.tables,
            )
            manager.store(0, update)

    def reader(self, lengths: Values) -> Callable[[Sequence[Tensor]], tuple[Values, Values]]:
        """How to read keys and values of every row by position, out of caches that a step returned.

        Args:
            lengths: `(rows,)`, tokens of each row after the step.
        """

        def read(stored: Sequence[Tensor]) -> tuple[Values, Values]:
            keys, values, held, after = [], [], [], torch.from_numpy(lengths)
            pairs = zip(stored[::2], stored[1::2], strict=True)
            for manager, pair in zip(self.managers, pairs, strict=True):
                k, v = manager.get_kv_by_layer_id(
                    0, kvcache_buffer=[pair], active_block_table=self.tables
                )
                keys.append(k.transpose(2, 3) if manager.caches[0].k_transposed else k)
                values.append(v)
                held.append(slot_positions(manager.layout(0), after, v.shape[2]))
            k, v, at = torch.cat(keys, 2), torch.cat(values, 2), torch.cat(held, 1)
            return by_position(k.numpy(), v.numpy(), at.numpy(), self.length)

        return read
