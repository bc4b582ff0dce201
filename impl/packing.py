"""Sequences packed into one row: chunked prefill, where prompts and decode share a step.

A row holds the new tokens of several sequences one after the other, each sequence with its own
cached tokens. Tokens of different sequences never meet; a sequence may bring many tokens, one, or
none; tokens after the last sequence's are padding.

    num_queries 2 1, computed_context_lens 1 2, slots 3: queries by cached keys, and by the row's
    1 . . | . . .   1 . .
    1 . . | . . .   1 1 .
    . . . | 1 1 .   . . 1

Source: Agrawal et al. (2023), SARATHI, arXiv 2308.16369; neuronx-distributed-inference, whose
kernel takes the same facts as a schedule of tiles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from impl.errors import ShapeError, UnsupportedError, explain
from impl.kv_cache import slot_mapping
from impl.neuron_config import NeuronConfig
from impl.rope_frequencies import RotaryFrequencies


class PackedSequences(NamedTuple):
    """How sequences stand in one row.

    Attributes:
        num_queries: `(sequences,)`, integer: new tokens of each sequence.
        computed_context_lens: `(sequences,)`, integer: tokens of each that are cached.
    """

    num_queries: Tensor
    computed_context_lens: Tensor

    def segments(self, q_len: int) -> Tensor:
        """Sequence of each token of the row.

        Args:
            q_len: tokens of the row, padding included.

        Returns:
            `(q_len,)`, int64; the number of sequences marks padding.
        """
        ends = torch.cumsum(self.num_queries.to(torch.int64), dim=0)
        tokens = torch.arange(q_len, device=ends.device)
        return (tokens[:, None] >= ends).sum(dim=1)

    def positions(self, q_len: int) -> Tensor:
        """Position of each token in its sequence, `(1, q_len)`, int64; -1 for padding."""
        new = self.num_queries.to(torch.int64)
        offsets = self.computed_context_lens.to(torch.int64) - (torch.cumsum(new, dim=0) - new)
        segments, sequences = self.segments(q_len), new.shape[0]
        shift = offsets.index_select(0, segments.clamp(max=sequences - 1))
        tokens = torch.arange(q_len, device=new.device)
        return (tokens + shift).masked_fill(segments >= sequences, -1)[None]

    def given_positions(self, position_ids: Tensor | None, q_len: int) -> Tensor:
        """Positions that the caller gives, those of padding cleared, or those of the packing.

        Args:
            position_ids: `(1, q_len)`, integer, or None.
            q_len: tokens of the row.
        """
        if position_ids is None:
            return self.positions(q_len)
        return position_ids.masked_fill(self.segments(q_len) >= self.num_queries.shape[0], -1)

    def of_tokens(self, x: Tensor, q_len: int) -> Tensor:
        """What is said of each sequence, of each token of the row; of padding, any.

        Args:
            x: `(sequences, ...)`.
            q_len: tokens of the row.

        Returns:
            `(q_len, ...)`.
        """
        return x.index_select(0, self.segments(q_len).clamp(max=x.shape[0] - 1))

    def own_slots(self, segments: Tensor, slots: int) -> Tensor:
        """Which cached slots belong to a token's sequence.

        Args:
            segments: `(tokens,)`, of `segments`: of the row's tokens, or of some.
            slots: slots of each sequence.

        Returns:
            `(1, 1, tokens, sequences * slots)`, bool; sequences side by side.
        """
        sequences = self.num_queries.shape[0]
        owners = torch.arange(sequences, device=self.num_queries.device).repeat_interleave(slots)
        return (segments[:, None] == owners)[None, None]


def together(segments: Tensor, of_keys: Tensor) -> Tensor:
    """Which tokens of a row belong to one sequence.

    Args:
        segments: `(tokens,)`, sequence of each query.
        of_keys: `(q_len,)`, of each token of the row.

    Returns:
        `(1, 1, tokens, q_len)`, bool.
    """
    return (segments[:, None] == of_keys)[None, None]


PACKING_KEYWORDS = ("num_queries", "computed_context_lens")


def packed_sequences(
    keywords: dict[str, Any], batch: int, run: NeuronConfig
) -> PackedSequences | None:
    """Take the packing out of the keywords of `forward`.

    Args:
        keywords: may hold `num_queries` and `computed_context_lens`, which are removed.
        batch: rows of the step.
        run: how the layer is run.

    Returns:
        The packing, or None if the step has none.

    Raises:
        ShapeError: one of the two alone, not integers of one shape, or more than one row.
        UnsupportedError: the layer is run without chunked prefill.
    """
    names = PACKING_KEYWORDS
    given = [keywords.pop(name, None) for name in names]
    if given[0] is None and given[1] is None:
        return None
    if given[0] is None or given[1] is None:
        raise ShapeError(explain(" and ".join(names), "be given together", "one of them"))
    if not run.is_chunked_prefill:
        raise UnsupportedError(
            explain("num_queries", "be None unless is_chunked_prefill is True", "a packed row")
        )
    packing = PackedSequences(*given)
    for name, value in zip(names, packing, strict=True):
        integer = not value.is_floating_point() and value.dtype != torch.bool
        if value.dim() != 1 or value.shape != given[0].shape or not value.shape[0] or not integer:
            raise ShapeError(
                explain(name, "be integers (sequences,)", f"{value.dtype} {tuple(value.shape)}")
            )
    if batch != 1:
        raise ShapeError(
            explain("hidden_states", "be one row of packed sequences", f"{batch} rows")
        )
    return packing


def side_by_side(cached: Tensor) -> Tensor:
    """Lay the cached keys or values of several sequences along one row.

    Args:
        cached: `(sequences, num_key_value_heads, slots, head_dim)`.

    Returns:
        `(1, num_key_value_heads, sequences * slots, head_dim)`.
    """
    return cached.transpose(0, 1).flatten(1, 2)[None]


def check_rotary(*embeddings: object) -> None:
    """Refuse rotary embeddings whose angles depend on the length of a row.

    Raises:
        UnsupportedError: sequences of one row would scale each other's.
    """
    for embedding in embeddings:
        frequencies = getattr(embedding, "frequencies", None)
        if isinstance(frequencies, RotaryFrequencies) and frequencies.by_length:
            raise UnsupportedError(
                explain(
                    "rope_type",
                    "be neither dynamic nor longrope for packed sequences",
                    "one of them",
                    "sequences of one row would scale each other's",
                )
            )


def update_arguments(
    arguments: dict[str, Any],
    packing: PackedSequences,
    position_ids: Tensor,
    run: NeuronConfig,
    kept: Tensor | None = None,
) -> dict[str, Any]:
    """Arguments that write a packed row into the cache it was read from.

    Reading takes a block table and an id of every sequence; writing takes the slot of every token.

    Args:
        arguments: those of the cache manager.
        packing: how sequences stand in the row.
        position_ids: `(1, q_len)`, integer, in natural order, negative for padding.
        run: how the layer is run.
        kept: `(sequences,)`, bool: which sequences this rank caches; None is all.

    Returns:
        The same with `scatter_index` `(1, q_len)` in place of `active_block_table` and `seq_ids`.

    Raises:
        ShapeError: neither blocks nor slots are given.
    """
    table, slots = arguments.get("active_block_table"), arguments.get("scatter_index")
    if slots is None:
        if table is None or run.pa_block_size is None:
            raise ShapeError(
                explain(
                    "active_block_table",
                    "be given, for a cache of blocks, to write packed sequences",
                    None if table is None else "a cache without blocks",
                )
            )
        sequences = packing.num_queries.shape[0]
        if table.shape[0] != sequences:
            raise ShapeError(
                explain(
                    "active_block_table",
                    f"have a row for each of {sequences} packed sequences",
                    tuple(table.shape),
                )
            )
        tables = packing.of_tokens(table, position_ids.shape[1])
        slots = slot_mapping(tables, position_ids.T, run.pa_block_size).T
    if kept is not None:
        slots = slots.masked_fill(~packing.of_tokens(kept, position_ids.shape[1])[None], -1)
    return {**arguments, "active_block_table": None, "seq_ids": None, "scatter_index": slots}
