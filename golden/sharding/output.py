"""The row-parallel output projection: shares of a sum, its reduction, and one bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from golden.formats import Format, format_named
from golden.layer import output_product
from golden.lora import Lora
from golden.sharding.collectives import all_gather, all_reduce, over_groups, reduce_scatter
from golden.sharding.layer import RankStage, ShardedLayer
from golden.stages import Accumulation, Array, Observer


def output_shares(
    stage: RankStage,
    attended: Sequence[Array],
    loras: Sequence[Lora | None],
    observers: Sequence[Observer],
) -> list[Array]:
    """Multiply each rank's heads with its columns of the output projection."""
    shares = []
    for rank, heads in enumerate(attended):
        value, accumulation = output_product(
            stage.weights[rank], heads, loras[rank], observers[rank]
        )
        shares.append(observers[rank]("o_product", value, accumulation))
    return shares


def reduced_output(
    layer: ShardedLayer,
    stage: RankStage,
    shares: Sequence[Array],
    observers: Sequence[Observer],
    *,
    scatter_axis: int | None = None,
) -> list[Array]:
    """Add the shares of each row and then the bias, once (D13).

    Args:
        layer: gives the bias and the reduction dtype.
        stage: whose rows add up.
        shares: by rank, `(batch, tokens, hidden_size)`.
        observers: by rank; see `o_reduced` and `o_proj`.
        scatter_axis: axis along which each rank keeps its piece of the sum; None keeps all.
    """
    name = layer.parallelism.reduce_dtype
    dtype = None if name is None else format_named(name)

    sums: list[Array] = list(shares)
    squares: list[Callable[[], Array]] = [lambda: np.zeros(())] * len(shares)
    for row in stage.mesh.rows:
        values = [shares[rank] for rank in row]
        for place, (rank, value) in enumerate(
            zip(row, _reduced(values, scatter_axis, dtype), strict=True)
        ):
            sums[rank], squares[rank] = value, _squares(values, scatter_axis, place)
    outputs = []
    for observe, value, squared in zip(observers, sums, squares, strict=True):
        value = observe("o_reduced", value, Accumulation(stage.mesh.tp_degree, squared))
        with_bias = value if layer.o_bias is None else value + layer.o_bias
        outputs.append(observe("o_proj", with_bias))
    return outputs


def _reduced(
    values: Sequence[Array], scatter_axis: int | None, dtype: Format | None
) -> list[Array]:
    if scatter_axis is None:
        return all_reduce(values, dtype)
    return reduce_scatter(values, scatter_axis, dtype)


def _squares(values: Sequence[Array], scatter_axis: int | None, place: int) -> Callable[[], Array]:
    """Compute, when asked, the sum of the squared terms that the rank at this place received."""
    return lambda: _reduced([np.square(value) for value in values], scatter_axis, None)[place]


def dispatched_output(
    layer: ShardedLayer, stage: RankStage, shares: Sequence[Array], observers: Sequence[Observer]
) -> list[Array]:
    """Add the shares of each row, and gather the batch that data-parallel ranks were split by.

    D22: `AR_AG`, `RS_AG` and `AG_AR` differ in the order of the two and so in roundings alone.
        `RS_AG` gathers over all ranks, whose order is the mesh's only where the mesh is
        contiguous: pieces are put back in the order of the mesh.
    """
    mesh, dispatch = stage.mesh, layer.parallelism.ep_dispatch
    if len(mesh.rows) == 1:
        return reduced_output(layer, stage, shares, observers)
    if dispatch == "AG_AR":
        gathered = over_groups(mesh.columns, shares, lambda v: all_gather(v, axis=0))
        return reduced_output(layer, stage, gathered, observers)
    if dispatch == "AR_AG":
        sums = reduced_output(layer, stage, shares, observers)
        return over_groups(mesh.columns, sums, lambda v: all_gather(v, axis=0))
    pieces = reduced_output(layer, stage, shares, observers, scatter_axis=0)
    return all_gather([pieces[rank] for rank in mesh.flattened], axis=0)
