"""Sequences packed into one row, as chunked prefill serves them: block-diagonal attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from golden.arrays import Positions
from golden.caches.held import Cache, Held, seated
from golden.config import AttentionConfig
from golden.errors import ConfigError, ShapeError
from golden.heads import layer_heads, project_qkv
from golden.layer import attend_and_project
from golden.masks import layer_mask
from golden.rope_config import DynamicNTKScaling, LongRopeScaling
from golden.segments import SameSegment
from golden.serving import ForwardResult
from golden.stages import Array, Observer, unobserved
from golden.weights import AttentionWeights

C = TypeVar("C", bound=Cache)


@dataclass(frozen=True, slots=True)
class Packing:
    """How sequences stand in one packed row.

    P1: sequence `s` brings `query_lens[s]` new tokens, of `key_lens[s]` in all; the new ones are
        its last, so they stand at positions `key_lens[s] - query_lens[s]` onwards.
    P2: tokens of different sequences never meet.
    P3: a sequence may bring one token (decode) beside another's many (prefill), or none.

    Attributes:
        query_lens: new tokens of each sequence.
        key_lens: tokens of each sequence, cached ones included.

    Raises:
        ConfigError: a sequence has more new tokens than tokens, or a negative number.
    """

    query_lens: tuple[int, ...]
    key_lens: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.query_lens) != len(self.key_lens) or any(
            not 0 <= new <= every
            for new, every in zip(self.query_lens, self.key_lens, strict=False)
        ):
            raise ConfigError(
                "query_lens must lie between 0 and the key_lens beside them, got "
                f"{list(self.query_lens)} and {list(self.key_lens)}"
            )

    @property
    def q_positions(self) -> Positions:
        """Positions of the packed queries, `(1, sum(query_lens))`."""
        parts = [np.arange(n - q, n) for q, n in zip(self.query_lens, self.key_lens, strict=True)]
        return np.concatenate([np.zeros(0, dtype=np.int64), *parts])[None]

    @property
    def q_segments(self) -> Positions:
        """Sequence of each packed query, `(1, sum(query_lens))`."""
        return np.repeat(np.arange(len(self.query_lens)), self.query_lens)[None]

    @property
    def kv_positions(self) -> Positions:
        """Positions of packed keys, all of a sequence's side by side, `(1, sum(key_lens))`."""
        parts = [np.arange(n) for n in self.key_lens]
        return np.concatenate([np.zeros(0, dtype=np.int64), *parts])[None]

    @property
    def kv_segments(self) -> Positions:
        """Sequence of each packed key, `(1, sum(key_lens))`."""
        return np.repeat(np.arange(len(self.key_lens)), self.key_lens)[None]

    @property
    def rows(self) -> Positions:
        """Positions by sequence, `(sequences, max(query_lens))`; -1 pads the shorter ones."""
        table = np.full((len(self.query_lens), max(self.query_lens, default=0)), -1)
        for row, (new, every) in enumerate(zip(self.query_lens, self.key_lens, strict=True)):
            table[row, :new] = np.arange(every - new, every)
        return table

    def in_row(self, seated: Positions, q_len: int) -> tuple[Positions, Positions]:
        """Return position and sequence of each token of a row, `(1, q_len)`; -1 for padding.

        Args:
            seated: `rows`, with those of sequences that have no place in a cache set to -1.
            q_len: tokens of the row, padding behind the last sequence included.
        """
        pads = ((0, 0), (0, q_len - self.q_positions.shape[1]))
        positions = np.pad(seated[self.rows >= 0][None], pads, constant_values=-1)
        return positions, np.pad(self.q_segments, pads, constant_values=-1)

    def by_sequence(self, row: Array) -> Array:
        """Turn a row's `(1, heads, q_len, head_dim)` into `(sequences, heads, rows, head_dim)`."""
        columns = np.cumsum([0, *self.query_lens])[:-1, None] + np.arange(self.rows.shape[1])
        columns = np.where(self.rows >= 0, columns, 0)
        cut: Array = row[0][:, columns].swapaxes(0, 1)
        return cut


def packed_forward(
    config: AttentionConfig,
    weights: AttentionWeights,
    hidden_states: Any,
    *,
    query_lens: Sequence[int],
    key_lens: Sequence[int],
    cache: C,
    seq_ids: Any = None,
    observe: Observer = unobserved,
) -> ForwardResult[C]:
    """Run packed sequences through a layer: chunked prefill.

    Sinks, windows and chunks keep their meaning; the public module refuses sinks here, which is
    a limit of its kernel, not of the mathematics.

    Args:
        config: the layer.
        weights: its arrays.
        hidden_states: `(1, sum(query_lens) or more, hidden_size)`; tokens beyond are padding.
        query_lens: new tokens of each sequence.
        key_lens: tokens of each sequence, cached ones included.
        cache: what earlier tokens left; sequence `s` in row `s`, or in `seq_ids[s]`.
        seq_ids: `(sequences,)`, int; an id outside the cache makes the sequence padding. None takes
            rows in order.
        observe: sees and may change each stage.

    Returns:
        Output `(1, q_len, hidden_size)` and the cache with the new tokens.

    Raises:
        ShapeError: an array does not fit the layer.
        ConfigError: lengths do not fit each other, the cache has no slot for a token, or RoPE is
            scaled by the length of the row.

    Source: Agrawal et al. (2023), SARATHI, arXiv 2308.16369; neuronx-distributed-inference's
    chunked prefill (`query_lens`, `key_lens`).
    """
    packing = Packing(tuple(query_lens), tuple(key_lens))
    projected = project_qkv(config, weights, hidden_states)
    check_row(config, packing, projected.q.shape[:2])
    rows = seated(cache, packing.rows, seq_ids)
    positions, segments = packing.in_row(rows, projected.q.shape[1])
    q, k, v = layer_heads(config, weights, projected, positions, observe)
    prior, prior_segments = side_by_side(cache.prior(packing.rows, seq_ids=seq_ids))
    keys = prior.and_active(k, v, positions)
    output = attend_and_project(
        config,
        weights,
        q,
        keys.k,
        keys.v,
        positions,
        keys.positions,
        layer_mask(config)
        & SameSegment(segments, np.concatenate([prior_segments, segments], axis=1)),
        observe,
    )
    written = cache.write(
        packing.by_sequence(k), packing.by_sequence(v), packing.rows, seq_ids=seq_ids
    )
    return ForwardResult(output, written)


def check_row(config: AttentionConfig, packing: Packing, shape: tuple[int, ...]) -> None:
    """Require that a row can hold packed sequences.

    Args:
        config: the layer.
        packing: the sequences.
        shape: `(batch, q_len)` of the row.

    Raises:
        ShapeError: there are several rows, or too few tokens.
        ConfigError: RoPE is scaled by the length of the row.
    """
    scaling = None if config.rope is None else config.rope.scaling
    if isinstance(scaling, (DynamicNTKScaling, LongRopeScaling)) and not scaling.seq_len:
        raise ConfigError(
            "packed sequences share a row, whose length would scale their RoPE together; set the "
            "scaling's seq_len"
        )
    if shape[0] != 1 or shape[1] < sum(packing.query_lens):
        raise ShapeError(
            f"hidden_states must be one row of at least {sum(packing.query_lens)} tokens, got "
            f"{shape}"
        )


def side_by_side(prior: Held) -> tuple[Held, Positions]:
    """Lay what each sequence has cached along one row, and say whose each slot is.

    Returns:
        Keys and values `(1, heads, sequences * slots, head_dim)` with their positions, and the
        sequence of each slot, `(1, sequences * slots)`.
    """
    sequences, slots = prior.positions.shape
    flat = Held(_flat(prior.k), _flat(prior.v), prior.positions.reshape(1, -1))
    return flat, np.repeat(np.arange(sequences), slots)[None]


def _flat(x: Array) -> Array:
    packed: Array = x.swapaxes(0, 1).reshape(1, x.shape[1], x.shape[0] * x.shape[2], x.shape[3])
    return packed
