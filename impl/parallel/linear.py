"""Linear layers whose weights are split over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from impl.parallel.collectives import all_gather, all_reduce
from impl.parallel.groups import ALONE, Group


class ColumnParallelLinear(nn.Linear):
    """A linear layer that holds a slice of the output features.

    Args:
        in_features: width of the input.
        out_features: width of this rank's slice.
        bias: whether there is a bias, sliced alike.
        dtype: dtype of weight and bias.
        group: ranks that hold the other slices.
        gather_output: return the slices of all ranks, in their order.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        group: Group = ALONE,
        gather_output: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=dtype)
        self.group = group
        self.gather_output = gather_output

    def forward(self, input: Tensor) -> Tensor:
        """Project `(..., in_features)`, in the layer's dtype."""
        output = super().forward(input)
        return all_gather(output, output.dim() - 1, self.group) if self.gather_output else output


class RowParallelLinear(nn.Linear):
    """A linear layer that holds a slice of the input features.

    Each rank's product is rounded to the layer's dtype, the products are added in `reduce_dtype`,
    the bias once to their sum, and the result is rounded to the layer's dtype. A rank alone rounds
    product and bias once.

    Args:
        in_features: width of this rank's slice.
        out_features: width of the output.
        bias: whether there is a bias, the same on every rank.
        dtype: dtype of weight and bias.
        group: ranks that hold the other slices.
        reduce_dtype: dtype of the sum over ranks; None is `dtype`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        group: Group = ALONE,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=dtype)
        self.group = group
        self.reduce_dtype = reduce_dtype or dtype

    def forward(self, input: Tensor, reduce: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Project `(..., in_features)` and add the ranks' products.

        Args:
            input: this rank's slice, in the layer's dtype.
            reduce: adds the ranks' products, perhaps to leave each rank a part of the sum; None
                gives every rank all of it.

        Returns:
            `(..., out_features)`, or a part of it, in the layer's dtype.
        """
        if self.group.size == 1:
            return super().forward(input)
        return self.add_up(functional.linear(input, self.weight), reduce)

    def add_up(self, product: Tensor, reduce: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Add the products of several ranks, and the bias once.

        Args:
            product: this rank's, `(..., out_features)`, in the layer's dtype, without bias.
            reduce: as in `forward`.

        Returns:
            As in `forward`.
        """
        wide = product.to(self.reduce_dtype)
        total = all_reduce(wide, self.group) if reduce is None else reduce(wide)
        if self.bias is not None:
            total = total + self.bias.to(total.dtype)
        return total.to(product.dtype)
