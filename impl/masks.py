"""Which key a query may see, as boolean tensors.

Everywhere: True means attend; the sliding window of `W` counts the query's own key; positions are
explicit, so lengths need not agree; a query row that sees no key comes out as zeros. A negative
position marks padding: no query sees it, and its own row sees nothing. For one sequence of five
tokens (query rows, key columns):

    causal    window 2  chunk 3
    1 . . . .   1 . . . .   1 . . . .
    1 1 . . .   1 1 . . .   1 1 . . .
    1 1 1 . .   . 1 1 . .   1 1 1 . .
    1 1 1 1 .   . . 1 1 .   . . . 1 .
    1 1 1 1 1   . . . 1 1   . . . 1 1

Positions within a row of a batch belong to one sequence; packed sequences need an explicit mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from impl.errors import ShapeError, explain


def visible(
    q_positions: Tensor,
    kv_positions: Tensor,
    *,
    sliding_window: int | None = None,
    attention_chunk_size: int | None = None,
) -> Tensor:
    """Causal visibility by position, within the window or chunk if there is one.

    Args:
        q_positions: `(batch, q_len)`, integer.
        kv_positions: `(batch or 1, kv_len)`, integer.
        sliding_window: keys a query may see, its own included.
        attention_chunk_size: positions meet only within one chunk of this size.

    Returns:
        `(batch, 1, q_len, kv_len)`, bool.
    """
    queries = q_positions[:, None, :, None]
    keys = kv_positions[:, None, None, :]
    allowed = (keys <= queries) & (keys >= 0)
    if sliding_window is not None:
        allowed = allowed & (queries - keys < sliding_window)
    if attention_chunk_size is not None:
        same = torch.div(queries, attention_chunk_size, rounding_mode="floor") == torch.div(
            keys, attention_chunk_size, rounding_mode="floor"
        )
        allowed = allowed & same
    return allowed


def context_encoding_mask(
    attention_mask: Tensor | None,
    position_ids: Tensor,
    *,
    sliding_window: int | None = None,
    attention_chunk_size: int | None = None,
    kv_position_ids: Tensor | None = None,
) -> Tensor | None:
    """Mask of a prefill step (CTE), where queries are the tokens of the keys, or some of them.

    | attention_mask | full layer | window or chunk layer |
    | --- | --- | --- |
    | None | every key (a vision encoder) | by position |
    | `(batch, kv_len)`, True = real key | real, and causal by position | real, and by position |
    | `(batch or 1, 1, q_len, kv_len)` | as given | as given, and by position |

    So the mask of another kind of layer can narrow a window or chunk and never widen it.

    Args:
        attention_mask: bool or integer.
        position_ids: `(batch, q_len)`, integer.
        sliding_window: as in `visible`.
        attention_chunk_size: as in `visible`.
        kv_position_ids: `(batch, kv_len)`, integer; None is `position_ids`.

    Returns:
        `(batch or 1, 1, q_len, kv_len)`, bool; None if every key is seen.

    Raises:
        ShapeError: the mask is floating point or of another shape.
    """
    limited = sliding_window is not None or attention_chunk_size is not None
    if attention_mask is None and not limited:
        return None
    keys = position_ids if kv_position_ids is None else kv_position_ids
    (batch, q_len), kv_len = position_ids.shape, keys.shape[1]
    by_position = visible(
        position_ids,
        keys,
        sliding_window=sliding_window,
        attention_chunk_size=attention_chunk_size,
    )
    if attention_mask is None:
        return by_position
    given = as_bool(attention_mask, "attention_mask")
    if given.shape == (batch, kv_len):
        return by_position & given[:, None, None, :]
    _require_shape(given, "attention_mask", batch, q_len, kv_len)
    return given & by_position if limited else given


def prior_mask(
    attention_mask: Tensor | None,
    position_ids: Tensor,
    held: Tensor,
    *,
    sliding_window: int | None = None,
    attention_chunk_size: int | None = None,
) -> Tensor:
    """Mask of the keys that were cached before a step: of a decode step, or a prefix's in prefill.

    A slot is seen only if it holds a token before the step's first, so a mask that also marks the
    slots of the step itself does not count them twice.

    Args:
        attention_mask: True for slots that hold a token, `(batch, slots)` or
            `(batch or 1, 1, q_len or 1, slots)`; None is every slot before the step.
        position_ids: `(batch, q_len)`, integer.
        held: `(batch or 1, slots)`, int64: position in each slot, negative for an empty one; from
            `impl.slot_positions`.
        sliding_window: as in `visible`.
        attention_chunk_size: as in `visible`.

    Returns:
        `(batch, 1, q_len, slots)`, bool.

    Raises:
        ShapeError: the mask is floating point or of another shape.
    """
    batch, q_len = position_ids.shape
    before = visible(
        position_ids,
        held,
        sliding_window=sliding_window,
        attention_chunk_size=attention_chunk_size,
    )
    if attention_mask is None:
        return before
    slots = held.shape[1]
    given = as_bool(attention_mask, "attention_mask")
    if given.shape == (batch, slots):
        given = given[:, None, None, :]
    _require_shape(given, "attention_mask", batch, q_len, slots)
    return given & before


def active_token_mask(
    active_mask: Tensor | None,
    position_ids: Tensor,
    *,
    sliding_window: int | None = None,
    attention_chunk_size: int | None = None,
    kv_position_ids: Tensor | None = None,
) -> Tensor:
    """Mask among the tokens of a step that has cached keys besides.

    Args:
        active_mask: `(batch or 1, 1, q_len, kv_len)`, bool or integer: `tril` for a draft or a
            prompt, a tree's ancestors; None is by position alone. It narrows and never widens
            what positions allow.
        position_ids: `(batch, q_len)`, integer.
        sliding_window: as in `visible`.
        attention_chunk_size: as in `visible`.
        kv_position_ids: `(batch, kv_len)`, integer, where the queries are only some of the step's
            tokens; None is `position_ids`.

    Returns:
        `(batch, 1, q_len, kv_len)`, bool.

    Raises:
        ShapeError: the mask is floating point or of another shape.
    """
    keys = position_ids if kv_position_ids is None else kv_position_ids
    (batch, q_len), kv_len = position_ids.shape, keys.shape[1]
    by_position = visible(
        position_ids,
        keys,
        sliding_window=sliding_window,
        attention_chunk_size=attention_chunk_size,
    )
    if active_mask is None:
        return by_position
    given = as_bool(active_mask, "active_mask")
    _require_shape(given, "active_mask", batch, q_len, kv_len)
    return given & by_position


def validity(mask: Tensor, batch: int, slots: int) -> Tensor:
    """Slots that hold a key to be seen by every query of a step.

    Args:
        mask: bool or integer, True = attend, `(batch, slots)` or `(batch or 1, 1, 1, slots)`.
        batch: rows of the step.
        slots: slots of the cache.

    Returns:
        `(batch or 1, slots)`, bool.

    Raises:
        ShapeError: the mask is floating point or of another shape.
    """
    given = as_bool(mask, "attention_mask")
    if given.shape == (batch, slots):
        return given
    _require_shape(given, "attention_mask", batch, 1, slots)
    return given[:, 0, 0]


def as_bool(mask: Tensor, name: str) -> Tensor:
    """Turn a 0/1 mask into bool.

    Raises:
        ShapeError: the mask is floating point.
    """
    if mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point() or mask.is_complex():
        raise ShapeError(
            explain(name, "be bool or integer, True = attend", mask.dtype, "is it additive?")
        )
    return mask != 0


def _require_shape(mask: Tensor, name: str, batch: int, q_len: int, kv_len: int) -> None:
    shape = tuple(mask.shape)
    fits = (
        mask.dim() == 4
        and shape[0] in (1, batch)
        and shape[1] == 1
        and shape[2] in (1, q_len)
        and shape[3] == kv_len
    )
    if not fits:
        raise ShapeError(
            explain(
                name,
                f"have shape {(batch, kv_len)} or {(batch, 1, q_len, kv_len)}",
                shape,
                "True = attend, keys last",
            )
        )
