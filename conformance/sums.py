"""The rounding error of a sum, from how many terms it has, how large they are and their order.

Adding a term rounds the partial sum `s` to the accumulation format: an error uniform within half
an ulp of `s`, of variance `ulp(s)**2 / 12`. With `u` the unit roundoff, `ulp(s)` is `2 u` times the
power of two below `|s|`; over a binade, evenly in the logarithm, that is `4 c u**2 s**2` with
`c = 3 / (8 log 2) = 0.541`, hence a variance of `c u**2 s**2 / 3`. It remains to know the partial
sums. `n` terms of mean `m` and variance `w`, of which any order is as likely as any other, give the
sum of the first `k` the mean `k m` and, since the last of them is known, the variance of a bridge::

    E s_k**2 = (k m)**2 + w k (n - k) / (n - 1)

Summed over the steps inside each of `n / b` blocks, and over the sums of blocks, this is, up to
lower powers, `m**2 (n b**2 / 3 + n**3 / (3 b)) + w (n b / 2 - b**2 / 3 + n**2 / (6 b))`.

Factors rounded before they are multiplied (`operands`) add the rounding errors of both to every
term, two of variance `c u**2 t**2 / 3`.

One sum takes one path. The error is normal given the path, and its variance follows the path's
`sum s_k**2`, which varies: a bridge's by four fifths of its squared mean. So errors are a mixture
of normal ones with heavier tails, kurtosis up to 5.4. `path_energy` draws it from the bridge's
first sine, which has nine tenths of that variance; of `n / b` blocks the mean varies less.

Sums of one product add their terms in one order, so what depends on the order does not average out
between them. A term of share `f` of the squares counts in every partial sum after it: at the place
`0 <= t <= 1` of the order, `2 (1 - t)` times as often as on average. `common_order` draws a place
for every term, alike for all sums: `sum 2 f (1 - t)`, of mean 1 and variance `sum f**2 / 3`.

That is for terms of like size. An addition errs by no more than its smaller part, so a sum of one
large term and many small ones errs by no more than the small ones are, which may be lost in it.

Source: Higham and Mary (2019), SIAM J. Sci. Comput. 41(5) A2815, for rounding errors as a random
walk; Cochran (1977), Sampling Techniques, section 2.5, for sums of draws without replacement.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from conformance.precision import PrecisionProfile
from golden import FORMATS, Accumulation, Array

BINADE = 3.0 / (8.0 * math.log(2.0))
"""Mean of `(2**floor(log2 s) / s)**2` over a binade, evenly in the logarithm of `s`."""
_STEPS = 16
"""Tokens of a sequence that may be generated one after the other."""


class Walk(NamedTuple):
    """What is known of sums before a path of partial sums is drawn.

    Attributes:
        straight: mean sum of squares of partial sums on the straight line to the sum.
        bent: of the bridge about it.
        products: of the products, where they are rounded before they are added.
        blocks: how many blocks share the sum.
        accumulation: what it was found from, each part of it computed once.
    """

    straight: Array
    bent: Array
    products: Array
    blocks: Array
    accumulation: Accumulation

    def narrow(self) -> Walk:
        """Return it in float32."""
        straight, bent, products, blocks = (narrow(np.asarray(part)) for part in self[:4])
        return Walk(straight, bent, products, blocks, self.accumulation)


def narrow(x: Array) -> Array:
    """Return variances, or what they are made of, in float32: a scale needs 2 digits, not 16."""
    values: Any = x.astype(np.float32)
    held: Array = values
    return held


def accumulation_scale(
    profile: PrecisionProfile, stage: str, value: Array, accumulation: Accumulation
) -> Array:
    """Return the standard deviation of the rounding error of a sum, elementwise.

    Products are counted as rounded before they are added, which a fused operation spares. A single
    term is not rounded by its sum. Nor is a sum that the format holds exactly: of terms without
    structure one in `2**29` is one, while sums of small integers all are, at every step.

    Args:
        profile: gives the accumulation format and how sums are cut up.
        stage: of `golden.STAGES`; it and the number of rows say how the profile cuts the sum up.
        value: the sums, whose size gives the mean of the terms.
        accumulation: number of terms, and the sum of their squares.
    """
    scale: Array = np.sqrt(accumulation_variance(profile, stage, value, accumulation))
    return scale


def accumulation_variance(
    profile: PrecisionProfile, stage: str, value: Array, accumulation: Accumulation
) -> Array:
    """Return the square of `accumulation_scale`, which takes the same."""
    accumulation = _once(accumulation)
    n = np.maximum(accumulation.count(), 1.0)
    squares = accumulation.squares()
    block = np.minimum(block_length(profile, stage, value.shape, n), n)
    drift, bridge = partial_sums(n, block)
    products = 0.0 if stage == "denominator" else 1.0
    # m**2 drift + (squares / n - m**2) bridge + squares
    held = squares.dtype  # float32 where that is what the caller counts in
    energy = np.square(value.astype(held)) * ((drift - bridge) / np.square(n)).astype(held)
    energy += squares * (bridge / n + products).astype(held)
    return _variance(profile, stage, value, accumulation, energy)


def accumulation_error(
    profile: PrecisionProfile,
    stage: str,
    value: Array,
    accumulation: Accumulation,
    rng: np.random.Generator,
    walk: Walk | None = None,
) -> Array:
    """Draw the rounding error of a sum, elementwise: of the scale's size, on a path of its own.

    Args:
        profile: as `accumulation_scale` takes it, like the next three.
        stage: see there.
        value: see there.
        accumulation: see there.
        rng: source of the randomness.
        walk: what `walk_of` returns, if it is known.
    """
    walk = walk_of(profile, stage, value, accumulation) if walk is None else walk
    energy = path_energy(walk.straight, walk.bent, walk.blocks, rng)
    energy *= common_order(walk.accumulation, rng)
    energy += walk.products
    error: Array = rng.standard_normal(value.shape)
    error *= np.sqrt(_variance(profile, stage, value, walk.accumulation, energy))
    return error


def walk_of(
    profile: PrecisionProfile, stage: str, value: Array, accumulation: Accumulation
) -> Walk:
    """Return what is known of the partial sums of a sum; takes what `accumulation_scale` does."""
    accumulation = _once(accumulation)
    n = np.maximum(accumulation.count(), 1.0)
    squares = accumulation.squares()
    block = np.minimum(block_length(profile, stage, value.shape, n), n)
    drift, bridge = partial_sums(n, block)
    mean_square = np.square(value / n)
    spread = np.maximum(squares / n - mean_square, 0.0)
    products = np.zeros(()) if stage == "denominator" else squares
    return Walk(mean_square * drift, spread * bridge, products, n / block, accumulation)


def _once(sums: Accumulation) -> Accumulation:
    """Return an accumulation each part of which is computed once at most."""
    return replace(
        sums,
        squares=functools.cache(sums.squares),
        visible=None if sums.visible is None else functools.cache(sums.visible),
        rest=None if sums.rest is None else functools.cache(sums.rest),
        shares=None if sums.shares is None else functools.cache(sums.shares),
    )


def _variance(
    profile: PrecisionProfile,
    stage: str,
    value: Array,
    accumulation: Accumulation,
    energy: Array,
) -> Array:
    """Return the error's variance where rounded partial sums have this sum of squares."""
    form = FORMATS[profile.accumulation]
    energy *= BINADE * form.unit_roundoff**2 / 3
    several = np.maximum(accumulation.count(), 1.0) > 1
    variance: Array = np.where(several & ~form.holds(value), energy, 0.0)
    if accumulation.rest is not None:
        variance = np.minimum(variance, np.square(np.maximum(accumulation.rest(), 0.0)))
    if profile.operands and stage != "denominator":  # both factors of every product
        unit = FORMATS[profile.operands].unit_roundoff
        variance = variance + 2 * BINADE * unit**2 * accumulation.squares() / 3
    return variance


def path_energy(
    straight: Array, bent: Array, blocks: Array | float, rng: np.random.Generator
) -> Array:
    """Draw a path's sum of squares, elementwise.

    A path is the straight line to the sum and a bridge, whose first sine has the amplitude
    `z sqrt(2 w n) / pi` with `z` standard normal. With `a**2` the line's sum of squares and
    `b**2` the bridge's, the path's is
    `a**2 + 12 a b z / pi**2 + b**2 (1 + 6 (z**2 - 1) / pi**2)`; the constant of the middle term is
    the product of `sqrt(3)`, `sqrt(6)` and `2 sqrt(2)`, over `pi**2`.

    Args:
        straight: `a**2`.
        bent: `b**2`.
        blocks: how many blocks share the sum, each on its own path.
        rng: source of the randomness.
    """
    z = rng.standard_normal(straight.shape, dtype=straight.dtype)
    change: Array = np.sqrt(straight * bent)
    change *= 2.0
    change *= z
    np.square(z, out=z)
    z -= 1.0
    z *= bent
    change += z
    change *= 6.0 / (math.pi**2 * np.sqrt(blocks))
    change += straight
    change += bent
    return np.maximum(change, 0.0, out=change)


def common_order(sums: Accumulation, rng: np.random.Generator) -> float:
    """Draw what one order of the terms, common to all sums of a product, does to their energy.

    Args:
        sums: how the product was summed.
        rng: source of the randomness; a child of it is drawn from, so its own stream goes on alike.

    Returns:
        Factor of mean 1 on the sums of squares of all paths; 1 where the shares are unknown.
    """
    if sums.shares is None:
        return 1.0
    shares = sums.shares()
    places = rng.spawn(1)[0].random(len(shares))
    return float(2.0 * (shares @ (1.0 - places)))


def block_length(
    profile: PrecisionProfile, stage: str, shape: tuple[int, ...], n: Array | float
) -> Array | float:
    """Return how many terms the profile adds one after the other.

    A product of few rows with a matrix takes another path than one of many: weights times values
    run along all keys in sequence, other products along their whole length in interleaved sums,
    the lanes of a vector unit, which are blocks of `n / lanes` terms.
    """
    if stage == "attn":
        few = shape[-2] < profile.few_rows
        return n if few else float(profile.block_length)
    if stage.endswith(("_product", "_proj")):
        # several tokens may be generated one after the other: a product then has a row a sequence
        rows = shape[0] if shape[1] <= _STEPS else math.prod(shape[:-1])
        if rows < profile.few_rows:
            return np.maximum(float(profile.block_length), np.asarray(n) / profile.lanes)
    return float(profile.block_length)


def partial_sums(n: Array | float, b: Array | float) -> tuple[Array, Array]:
    """Return the factors of `m**2` and `w` in the sum of squares of all rounded partial sums.

    The first term of a block, and the first block, are copied and not rounded. `k**2` sums to
    `b (b + 1) (2 b + 1) / 6` over a block; over the `n / b` blocks likewise, in units of `b`.

    Args:
        n: terms, at least 1.
        b: terms of a block, 1 to `n`.
    """
    n, b = np.asarray(n, dtype=np.float64), np.asarray(b, dtype=np.float64)
    blocks = n / b
    inside, linear = b * (b + 1) * (2 * b + 1) / 6, b * (b + 1) / 2
    across, steps = blocks * (blocks + 1) * (2 * blocks + 1) / 6, blocks * (blocks + 1) / 2
    drift = blocks * (inside - 1) + b**2 * (across - 1)
    others = np.maximum(n - 1, 1.0)
    bridge = blocks * (n * linear - inside - (n - 1)) / others
    bridge = bridge + (b * (n * steps - b * across) - b * (n - b)) / others
    return drift, np.maximum(bridge, 0.0)
