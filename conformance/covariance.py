"""How the errors of a row's elements vary together, and errors freed from what they share.

One rounded weight moves a whole output row along its key's value, so where few keys hold most of
the weight, a row's errors are mostly a few numbers. Per row, to first order in the roundings::

    Sigma = diag(d) + sum_m u_m u_m^T

with `u_m` what the `KEYS` keys of most error do, times their standard deviation, and `d` the
variances of all else. `Sigma**-1 e` weighs an error by what no shared rounding explains: a sum of
squares `e^T Sigma**-1 e` has mean `head_dim` whatever the keys' shares, and an element is measured
against what the others of its row predict for it.

Source: Rao (1973), Linear Statistical Inference, section 4a, for weighing by the inverse; Woodbury
(1950) for it in the rank of the columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from golden import Array

KEYS = 8
"""Keys of a row whose roundings are followed one by one."""


@dataclass(frozen=True, slots=True, eq=False)
class RowCovariance:
    """Covariances of all rows of an output.

    Attributes:
        diagonal: `d`, `(rows..., head_dim)`, positive.
        columns: `u`, `(rows..., columns, head_dim)`.
        inner: `(1 + u D**-1 u^T)**-1`, `(rows..., columns, columns)`.
        precision: diagonal of `Sigma**-1`, `(rows..., head_dim)`.
    """

    diagonal: Array
    columns: Array
    inner: Array
    precision: Array

    def part(self, part: tuple[slice, ...]) -> RowCovariance:
        """Return the covariances of a slice of the rows."""
        if not part:
            return self
        return RowCovariance(
            self.diagonal[part], self.columns[part], self.inner[part], self.precision[part]
        )

    def weighed(self, error: Array) -> Array:
        """Return `Sigma**-1 e` for errors of shape `(..., rows..., head_dim)`."""
        scaled = error / self.diagonal
        shared = np.matmul(self.columns, scaled[..., None])
        removed = np.matmul((self.inner @ shared).swapaxes(-1, -2), self.columns)[..., 0, :]
        weighed: Array = scaled - removed / self.diagonal
        return weighed

    def standardised(self, error: Array) -> tuple[Array, Array]:
        """Return each element's error given its row's others, and each row's mean square.

        Returns:
            `(Sigma**-1 e)_d / sqrt((Sigma**-1)_dd)`, of variance 1, shaped like `error`, and
            `e^T Sigma**-1 e / head_dim`, of mean 1, without the last axis.
        """
        weighed = self.weighed(error)
        mean_square: Array = (weighed * error).mean(axis=-1)
        return weighed / np.sqrt(self.precision), mean_square


def row_covariance(diagonal: Array, columns: Array) -> RowCovariance:
    """Prepare the covariance `diag(d) + sum_m u_m u_m^T` of every row.

    Args:
        diagonal: `(rows..., head_dim)`, positive.
        columns: `(rows..., columns, head_dim)`.
    """
    scaled = columns / diagonal[..., None, :]
    gram = scaled @ columns.swapaxes(-1, -2)
    inner = np.linalg.inv(gram + np.eye(gram.shape[-1]))
    precision = 1.0 / diagonal - (scaled * (inner @ scaled)).sum(axis=-2)
    # what is left of an element that its row's others predict: roundoff keeps it above zero
    least = 2.0**-40 / diagonal
    return RowCovariance(diagonal, columns, inner, np.maximum(precision, least))
