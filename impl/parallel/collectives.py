"""Collectives of a group as functions of tensors: traceable, and the identity for a rank alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed._functional_collectives as functional
from torch import Tensor

from impl.parallel.groups import Group

# torch 2.13 renamed both and warns of the older names
_gather: Any = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
_scatter: Any = (
    getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor
)


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """Sum of all ranks' tensors, on every rank.

    Args:
        x: any shape, the same on every rank.
        group: who takes part.
    """
    if group.size == 1:
        return x
    return _ready(functional.all_reduce(x.contiguous(), "sum", group.name))


def all_gather(x: Tensor, dim: int, group: Group) -> Tensor:
    """All ranks' tensors one after another along `dim`, in the mesh's order, on every rank.

    Args:
        x: any shape, the same on every rank.
        dim: axis to join along.
        group: who takes part.
    """
    if group.size == 1:
        return x
    return _in_order(_ready(_gather(x.contiguous(), dim, group.name)), dim, group.numbers)


def reduce_scatter(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's piece, along `dim`, of the sum of all ranks' tensors.

    Args:
        x: any shape, the same on every rank; its length along `dim` a multiple of the ranks.
        dim: axis to cut.
        group: who takes part.
    """
    if group.size == 1:
        return x
    places = tuple(map(group.numbers.index, range(len(group.numbers))))
    x = _in_order(x, dim, places)
    return _ready(_scatter(x.contiguous(), "sum", dim, group.name))


def _in_order(x: Tensor, dim: int, order: Sequence[int]) -> Tensor:
    """Equal pieces of `x` along `dim` in another order; as they are if it is empty."""
    if not order:
        return x
    pieces = x.chunk(len(order), dim)
    return torch.cat([pieces[piece] for piece in order], dim)


def _ready(result: Any) -> Tensor:
    """Wait, outside of a trace; inside one the wait is already part of it."""
    if isinstance(result, functional.AsyncCollectiveTensor):
        waited: Tensor = result.wait()
        return waited
    tensor: Tensor = result
    return tensor
