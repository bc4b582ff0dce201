"""Checks of what callers hand to `forward`, and what stands in for what they leave out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from impl.errors import ShapeError, explain
from impl.kv_cache import KeyValue, KVCacheManager


def check_hidden_states(hidden_states: Tensor, width: int) -> None:
    """Refuse hidden states of another shape.

    Raises:
        ShapeError: they are not `(batch, seq_len, width)`.
    """
    shape = tuple(hidden_states.shape)
    if len(shape) != 3 or shape[2] != width:
        raise ShapeError(explain("hidden_states", f"have shape (batch, seq_len, {width})", shape))


def check_residual(residual: Tensor | None, hidden_states: Tensor) -> None:
    """Refuse a residual that does not go with the hidden states.

    Raises:
        ShapeError: it has another shape.
    """
    if residual is not None and residual.shape != hidden_states.shape:
        raise ShapeError(
            explain(
                "residual",
                f"have the shape of hidden_states, {tuple(hidden_states.shape)}",
                tuple(residual.shape),
            )
        )


def given_positions(position_ids: Tensor | None, hidden_states: Tensor, seq_len: int) -> Tensor:
    """Return the positions of a step, checked.

    Args:
        position_ids: as in `forward`.
        hidden_states: `(batch, tokens, hidden_size)`.
        seq_len: tokens of the whole sequence, of which these may be a rank's.

    Returns:
        `(batch, seq_len)`, integer.

    Raises:
        ShapeError: they are not integers of that shape, or needed and missing.
    """
    batch = hidden_states.shape[0]
    if position_ids is None:
        raise ShapeError(explain("position_ids", "be given with cached keys", None))
    shape = tuple(position_ids.shape)
    if shape != (batch, seq_len):
        raise ShapeError(explain("position_ids", f"have shape {(batch, seq_len)}", shape))
    if position_ids.is_floating_point() or position_ids.dtype == torch.bool:
        raise ShapeError(explain("position_ids", "be integer", position_ids.dtype))
    return position_ids


def check_active_mask(active_mask: Tensor | None, *, has_past: bool) -> None:
    """Refuse an `active_mask` that nothing would read.

    Raises:
        ShapeError: there are no cached keys.
    """
    if active_mask is not None and not has_past:
        raise ShapeError(
            explain(
                "active_mask",
                "be None without cached keys",
                tuple(active_mask.shape),
                "prefill reads attention_mask",
            )
        )


def require_manager(kv_mgr: KVCacheManager | None, arguments: dict[str, Any]) -> KVCacheManager:
    """Return the cache manager of a step that reads or writes its layer's cache.

    Raises:
        ShapeError: there is none, or no `idx` to say which layer.
    """
    if kv_mgr is None or "idx" not in arguments:
        raise ShapeError(
            explain(
                "kv_mgr and idx",
                "be given with get_kv_per_layer or update_kv_per_layer",
                f"{type(kv_mgr).__name__} and {sorted(arguments)}",
            )
        )
    return kv_mgr


def read_cache(
    kv_mgr: KVCacheManager | None, arguments: dict[str, Any], k_transposed: bool, rows: int | None
) -> KeyValue:
    """Return the cached keys and values of a layer, as the layer expects its keys.

    A cache and its layer need not agree on transposed keys: a manager whose configuration knows of
    no window transposes those of a windowed layer too.

    Args:
        kv_mgr: the cache manager.
        arguments: those of `get_kv_by_layer_id`.
        k_transposed: the layer expects keys as `(batch, kv_heads, head_dim, slots)`.
        rows: rows of the step, which without sequence ids are the first lines of the cache; None
            takes what the manager returns, of which packed sequences have a row each.

    Raises:
        ShapeError: there is no manager, or no `idx` to say which layer.
    """
    manager = require_manager(kv_mgr, arguments)
    k, v = manager.get_kv_by_layer_id(**arguments)
    differ = manager.caches[arguments["idx"]].k_transposed != k_transposed
    return (k.transpose(2, 3) if differ else k)[:rows], v[:rows]
