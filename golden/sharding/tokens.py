"""Which tokens of a prompt each rank is given, computes queries of, and returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.config import AttentionConfig
from golden.errors import ShapeError
from golden.sharding.mesh import Groups
from golden.sharding.parallelism import Parallelism

Tokens = NDArray[np.int64]
"""Indices along a prompt."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenPlan:
    """The tokens of a prefill, by rank, and the collectives that move them.

    D16: a context-parallel rank computes a run of queries, or every `cp_degree`-th query, or of
        each chunk its share; keys and values are gathered into the order of the prompt.
    D17: sequence-parallel ranks are given and return a piece each, in the order of the mesh (D3).
    D18: between chunked layers that stand next to each other, pieces stay as the chunks were cut
        (`interleave`): the first gathers from the order of the prompt, the last returns to it and
        adds the residual itself, since its input is in the other order.

    Attributes:
        given: tokens of the hidden states the rank is given.
        queries: tokens whose queries it computes.
        returned: tokens of its output rows.
        gathered_given: groups that gather hidden states before the projections; none if empty.
        gathers_heads: whether heads' outputs are gathered before the output projection.
        scatters: whether the output's sum leaves each rank of a row its piece.
        gathers_output: whether outputs are gathered after the output projection.
        adds_residual: whether the layer adds its input to its output.
    """

    given: tuple[Tokens, ...]
    queries: tuple[Tokens, ...]
    returned: tuple[Tokens, ...]
    gathered_given: Groups
    gathers_heads: bool
    scatters: bool
    gathers_output: bool
    adds_residual: bool


def token_plan(config: AttentionConfig, parallelism: Parallelism, q_len: int) -> TokenPlan:
    """Plan a prefill of `q_len` tokens that `check_prefill` has passed."""
    mesh, cp = parallelism.prefill_mesh, parallelism.cp_degree
    ranks, scattered = range(mesh.world_size), parallelism.sequence_parallel
    chunked = config.attention_chunk_size is not None and cp > 1
    order = np.arange(q_len)
    if parallelism.strided:
        order = order[strided_order(q_len, cp)]
    own = _chunk_shares(config, q_len, cp) if chunked else np.split(order, cp)
    queries = tuple(own[mesh.row_of(rank)] for rank in ranks)
    everything = (order,) * mesh.world_size
    in_order = everything
    in_share = queries
    if scattered:
        pieces = np.split(order, mesh.world_size)
        in_order = tuple(pieces[place] for place in mesh.inverted)
        in_share = tuple(
            np.split(queries[rank], mesh.tp_degree)[mesh.column_of(rank)] for rank in ranks
        )
    place = parallelism.interleave
    from_order, to_order = place in ("none", "after_global"), place in ("none", "before_global")
    gathered: Groups = ()
    if scattered:
        gathered = (tuple(ranks),) if chunked and from_order else mesh.rows
    return TokenPlan(
        given=in_order if from_order else in_share,
        queries=queries,
        returned=in_order if to_order else in_share,
        gathered_given=gathered,
        gathers_heads=chunked and place == "none",
        scatters=scattered and (not chunked or not to_order),
        gathers_output=cp > 1
        and (place == "before_global" or (place == "none" and not chunked and not scattered)),
        adds_residual=place == "before_global",
    )


def _chunk_shares(config: AttentionConfig, q_len: int, cp_degree: int) -> list[Tokens]:
    """Cut every chunk, the last may be shorter, and return each row's shares in order."""
    assert config.attention_chunk_size is not None
    edges = range(0, q_len, config.attention_chunk_size)
    chunks = [np.arange(start, min(start + edges.step, q_len)) for start in edges]
    shares = [np.split(chunk, cp_degree) for chunk in chunks]
    return [np.concatenate([share[row] for share in shares]) for row in range(cp_degree)]


def strided_order(length: int, stride: int) -> Tokens:
    """Return the tokens `0, stride, 2 stride, ...`, then `1, stride + 1, ...`.

    Raises:
        ShapeError: the length is not a multiple of the stride.

    Source: neuronx-distributed-inference, `stride_tensor`.
    """
    _check_divides(length, stride)
    order: Tokens = np.arange(length).reshape(length // stride, stride).T.reshape(-1)
    return order


def unstrided_order(length: int, stride: int) -> Tokens:
    """Return the inverse: where each token lies in `strided_order`.

    Raises:
        ShapeError: the length is not a multiple of the stride.

    Source: neuronx-distributed-inference, `order_strided_tensor`.
    """
    _check_divides(length, stride)
    order: Tokens = np.arange(length).reshape(stride, length // stride).T.reshape(-1)
    return order


def reordered_pieces(value: Any, order: Sequence[int], axis: int) -> NDArray[np.generic]:
    """Cut an axis into as many pieces as `order` has entries and return them in that order.

    With the inverted mesh for an order, piece `r` is what rank `r` gets of a sequence-parallel
    input.

    Raises:
        ShapeError: the axis does not divide into pieces.

    Source: neuronx-distributed-inference, `chunk_and_reorder_tensor`.
    """
    array = np.asarray(value)
    _check_divides(array.shape[axis], len(order))
    pieces = np.split(array, len(order), axis=axis)
    return np.concatenate([pieces[i] for i in order], axis=axis)


def _check_divides(length: int, parts: int) -> None:
    if parts < 1 or length % parts != 0:
        raise ShapeError(f"the length must be a multiple of {parts}, got {length}")


def places_of(wanted: Tokens, among: Tokens) -> Tokens:
    """Return where each wanted token stands among others."""
    places = np.full(int(among.max(initial=-1)) + 1, -1, dtype=np.int64)
    places[among] = np.arange(among.size)
    return places[wanted]
