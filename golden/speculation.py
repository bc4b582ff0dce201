"""Speculative decoding: trees of draft tokens, and writing the path that was accepted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from golden.arrays import Positions, as_positions
from golden.caches.held import Cache
from golden.config import AttentionConfig
from golden.errors import ConfigError, ShapeError
from golden.lora import Lora
from golden.serving import Step, attend_with_cache
from golden.stages import Observer, unobserved
from golden.tiles import BoolArray
from golden.weights import AttentionWeights

C = TypeVar("C", bound=Cache)


def tree_depths(parents: Sequence[int]) -> list[int]:
    """Return each node's distance from its root.

    Args:
        parents: index of each node's parent, smaller than its own; -1 for a root.

    Raises:
        ConfigError: a parent does not come before its child.
    """
    depths: list[int] = []
    for node, parent in enumerate(parents):
        if not -1 <= parent < node:
            raise ConfigError(
                f"parents must come before their children or be -1, got {parent} for node {node}"
            )
        depths.append(0 if parent == -1 else depths[parent] + 1)
    return depths


def tree_mask(parents: Sequence[int]) -> BoolArray:
    """Return which draft a draft may see: itself and its ancestors.

    T1: a chain (`-1, 0, 1, ...`) gives the lower triangle, plain speculation.
    T2: siblings stand at the same position and do not see each other.

    The tree with parents -1, 0, 0, 1::

        1 0 0 0
        1 1 0 0
        1 0 1 0
        1 1 0 1

    Args:
        parents: as in `tree_depths`.

    Returns:
        `(nodes, nodes)`, bool, True = attend.

    Raises:
        ConfigError: a parent does not come before its child.

    Source: Miao et al. (2024), SpecInfer, arXiv 2305.09781, section 4.2, tree attention.
    """
    tree_depths(parents)
    seen = np.eye(len(parents), dtype=np.bool_)
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node] |= seen[parent]
    return seen


def verify_tree(
    config: AttentionConfig,
    weights: AttentionWeights,
    hidden_states: Any,
    *,
    root_positions: Any,
    parents: Sequence[int],
    cache: Cache,
    seq_ids: Any = None,
    lora: Lora | None = None,
    observe: Observer = unobserved,
) -> Step:
    """Run a tree of drafts through a layer without writing any of them.

    T3: a node stands at its root's position plus its depth: that position sets its RoPE, its
        window or chunk, and its temperature. So each node's output is that of its own path.

    Args:
        config: the layer.
        weights: its arrays.
        hidden_states: `(batch, nodes, hidden_size)`.
        root_positions: `(batch,)`, int; -1 marks an idle row.
        parents: the tree, the same for each row.
        cache: what earlier tokens left.
        seq_ids: `(batch,)`, int, cache rows; None takes rows in order.
        lora: adapters on the projections, None for none.
        observe: sees and may change each stage.

    Raises:
        ShapeError: an array does not fit the layer.
        ConfigError: a parent does not come before its child.
    """
    depths = np.array(tree_depths(parents), dtype=np.int64)
    roots = np.asarray(root_positions)
    if roots.ndim != 1 or roots.dtype.kind not in "iu":
        raise ShapeError(
            f"root_positions must be integers (batch,), got {roots.dtype} {roots.shape}"
        )
    return attend_with_cache(
        config,
        weights,
        hidden_states,
        position_ids=np.where(roots[:, None] >= 0, roots[:, None] + depths, -1),
        cache=cache,
        seq_ids=seq_ids,
        active_mask=tree_mask(parents),
        lora=lora,
        observe=observe,
    )


def accept_drafts(cache: C, step: Step, paths: Any, *, seq_ids: Any = None) -> C:
    """Write the drafts that were accepted, and no others.

    Args:
        cache: the cache that the drafts were verified with.
        step: the result of `verify_tree`.
        paths: `(batch, accepted)`, int, node indices from the root down; -1 pads.
        seq_ids: as for `verify_tree`.

    Returns:
        The cache with the accepted tokens.

    Raises:
        ShapeError: `paths` is not integers of that shape.
        ConfigError: a node does not exist, or two nodes of a path share a position.
    """
    batch, nodes = step.positions.shape
    path: Positions = as_positions("paths", paths, (batch, np.shape(paths)[-1]))
    if path.size and int(path.max()) >= nodes:
        raise ConfigError(f"paths must name nodes below {nodes}, got {int(path.max())}")
    chosen = np.maximum(path, 0)
    positions = np.where(path >= 0, np.take_along_axis(step.positions, chosen, axis=1), -1)
    for row in positions:
        kept = row[row >= 0]
        if (np.diff(kept) != 1).any():
            raise ConfigError(f"a path must descend one position at a time, got {kept.tolist()}")
    along = chosen[:, None, :, None]
    k = np.take_along_axis(step.k, along, axis=2)
    v = np.take_along_axis(step.v, along, axis=2)
    return cache.write(k, v, positions, seq_ids=seq_ids)
