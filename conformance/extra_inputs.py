"""Draws what a call brings to a layer: adapters, the norm of its input, positions of M-RoPE."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from conformance.cases import Case
from conformance.draws import Source, projection_scales
from golden import Array, Lora, RopeConfig, make_lora, weight_shapes


def draw_input_norm(source: Source, case: Case) -> Array | None:
    """Draw the weight of the input's norm, about 1; None without one."""
    if not case.extras.input_norm:
        return None
    return source.exact(1.0 + source.normal(case.config.input_size, scale=0.25))


def draw_lora(source: Source, case: Case, rows: NDArray[np.int64]) -> Lora | None:
    """Draw adapters whose terms are as large as the products they are added to.

    Args:
        source: of the draw.
        case: gives their number and rank.
        rows: `(batch,)`, sequence of each row: sequence `s` uses adapter `s`, every
            `adapters + 1`-th none.
    """
    extras, config = case.extras, case.config
    if not extras.adapters:
        return None
    shapes = weight_shapes(config)
    scales = projection_scales(source.regime, config)
    down, up = {}, {}
    for target in "qkvo":
        out, width = shapes[f"{target}_proj"]
        # a rank-wide sum of the two has the spread of one product with the projection
        down[target] = source.normal(extras.adapters, extras.rank, width, scale=width**-0.5)
        reach = scales[f"{target}_proj"] * math.sqrt(width / extras.rank)
        up[target] = source.normal(extras.adapters, out, extras.rank, scale=reach)
    factors = 2.0 ** -np.arange(extras.adapters, dtype=np.float64)
    return make_lora(
        config,
        adapter_ids=adapter_ids(extras.adapters, rows),
        down=down,
        up=up,
        scaling=dict.fromkeys("qkvo", factors),
    )


def adapter_ids(adapters: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the adapter of each sequence, -1 for none and for idle rows."""
    cycle = rows % (adapters + 1)
    return np.where((rows >= 0) & (cycle < adapters), cycle, -1)


_TEXT, _HEIGHT, _WIDTH = 5, 3, 4
"""What M-RoPE's positions follow, over and over: some words, then a picture of that size."""


def rotary_positions(rope: RopeConfig, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the positions of tokens on each axis of M-RoPE.

    Words stand at one position on all axes, one after the other. A picture's tokens share their
    time; row and column count from it. Words after it go on behind its largest position.

    Args:
        rope: gives the number of axes: time, height, width.
        positions: `(batch, q_len)`, int64, -1 for padding.

    Returns:
        `(axes, batch, q_len)`, int64; 0 for padding.
    """
    tokens = _TEXT + _HEIGHT * _WIDTH
    reach = _TEXT + max(_HEIGHT, _WIDTH)
    block, place = np.maximum(positions, 0) // tokens, np.maximum(positions, 0) % tokens
    pixel = place - _TEXT
    picture = pixel >= 0
    base = block * reach + np.where(picture, _TEXT, place)
    offsets = [np.zeros_like(pixel), pixel // _WIDTH, pixel % _WIDTH]
    axes = [
        base + np.where(picture, offsets[axis % 3], 0) for axis in range(len(rope.mrope_section))
    ]
    return np.where(positions >= 0, np.stack(axes), 0)
