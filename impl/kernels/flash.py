"""Flash attention in torch: the function of `native`, without ever holding a row of scores.

Where values are rounded: as in `impl.kernels.native`, except that the weights are not rounded
before their product with the values. So every stage is at least as precise as there, and the layer
claims the same precision whichever of the two runs.

| stage | rounded | note |
| --- | --- | --- |
| scores | no | queries times `1 / divisor` in the compute dtype, then the product; softcap; mask |
| exp, row sum, sink | no | relative to the running maximum, rescaled when it grows |
| probs | no | exponentials enter the product with V in the compute dtype |
| attn | yes | one division by the row sum at the end, one rounding |

Memory: inputs, output, K and V in the compute dtype, and `SCORES_PER_TILE` scores. Time: tiles that
static positions prove empty are not computed. The gradient is streamed likewise and keeps nothing
but inputs, output and a number per row; it is not itself differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from impl.errors import ShapeError, explain
from impl.kernels.flash_function import FlashAttention, Scale
from impl.kernels.flash_plan import KV_TILE, Q_TILE, SCORES_PER_TILE, TilePlan
from impl.kernels.native import ScoreRule


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rule: ScoreRule,
    sink: Tensor | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    attention_chunk_size: int | None = None,
    chunk_origin: Tensor | None = None,
    q_offset: int = 0,
    q_stride: int = 1,
    key_valid: Tensor | None = None,
    mask: Tensor | None = None,
    k_prior: Tensor | None = None,
    v_prior: Tensor | None = None,
    prior_valid: Tensor | None = None,
    prior_positions: Tensor | None = None,
) -> Tensor:
    """Attend to cached (prior) keys, if any, and to the keys of this step.

    Positions are static and relative to the step: query `r` is at `q_offset + r * q_stride`, key
    `j` at `j`, and the `prior_len` cached keys before them at `-prior_len` to `-1`, or where
    `prior_positions` says. For two queries at stride 2 over four keys (rows: queries):

        offset 0    offset 1
        1 . . .     1 1 . .
        1 1 1 .     1 1 1 1

    Args:
        q: `(batch, num_attention_heads, q_len, head_dim)`, BHSD.
        k: `(batch, num_key_value_heads, kv_len, head_dim)`, BHSD.
        v: like `k`.
        rule: scale and softcap.
        sink: `(num_attention_heads,)`, or None.
        causal: a query sees no key after its own position; needed for a window or chunk.
        sliding_window: keys a query may see, its own included; None is unbounded.
        attention_chunk_size: positions meet only within one chunk of this size.
        chunk_origin: `(batch,)`, integer: position of the step's first token in each row, for rows
            that do not start with a chunk; None is 0.
        q_offset: position of the first query: a context-parallel rank's place in the step.
        q_stride: positions from one query to the next: the ranks of a strided layout.
        key_valid: `(batch, kv_len)`, bool, True = a token, False = padding; None is all tokens.
        mask: `(batch or 1, 1, q_len, prior_len + kv_len)`, bool, True = attend; narrows what
            positions allow.
        k_prior: cached keys, `(batch, num_key_value_heads, prior_len, head_dim)`; both or neither.
        v_prior: like `k_prior`.
        prior_valid: `(batch, prior_len)`, bool: slots that hold a token; None is all of them.
        prior_positions: `(batch, prior_len)`, integer: position of each cached key, so negative.

    Returns:
        Like `q`, in its dtype. A row that may see no key is zeros.

    Raises:
        ShapeError: a tensor that does not fit, or a window or chunk without `causal`.
    """
    _check_heads(q, k, v, sink)
    _check_limits(causal, sliding_window, attention_chunk_size, q_stride)
    batch, heads, q_len, width = q.shape
    step_len = k.shape[2]
    prior_len = 0 if k_prior is None else k_prior.shape[2]
    prior_shape = (batch, k.shape[1], prior_len, width) if prior_len else None
    for name, tensor, shape in (
        ("k_prior", k_prior, prior_shape),
        ("v_prior", v_prior, prior_shape),
        ("prior_valid", prior_valid, (batch, prior_len)),
        ("prior_positions", prior_positions, (batch, prior_len)),
        ("key_valid", key_valid, (batch, step_len)),
        ("chunk_origin", chunk_origin, (batch,)),
    ):
        _check_shape(name, tensor, shape)
    if mask is not None:
        lines = batch if mask.shape[0] == batch else 1
        _check_shape("mask", mask, (lines, 1, q_len, prior_len + step_len))
    valid = key_valid
    if prior_valid is not None or (prior_len and key_valid is not None):
        parts = (prior_valid, prior_len), (key_valid, step_len)
        valid = torch.cat([_or_all(part, batch, length, q.device) for part, length in parts], dim=1)
    if k_prior is not None and v_prior is not None:
        k, v = torch.cat([k_prior, k], dim=2), torch.cat([v_prior, v], dim=2)
    k, v = _without_unused(k, v, valid, mask)
    plan = TilePlan(
        q_len=q_len,
        kv_len=prior_len + step_len,
        prior_len=prior_len,
        q_offset=q_offset,
        q_stride=q_stride,
        causal=causal,
        sliding_window=sliding_window,
        attention_chunk_size=attention_chunk_size,
        prior_moves=prior_positions is not None and causal,
        chunk_moves=chunk_origin is not None,
        q_tile=min(Q_TILE, max(1, SCORES_PER_TILE // (batch * heads * KV_TILE))),
    )
    divisor, softcap = rule.divisor, rule.softcap
    scale = Scale(factor=1.0 / divisor, softcap=softcap)
    out: Tensor = FlashAttention.apply(  # type: ignore[no-untyped-call]
        q, k, v, sink, valid, mask, prior_positions, chunk_origin, plan, scale
    )
    return out


def _without_unused(
    k: Tensor, v: Tensor, valid: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Zero the keys and values no query sees: what they hold, NaN included, must reach no sum."""
    if mask is not None:
        seen = mask.any(dim=2)[:, 0]
        valid = seen if valid is None else valid & seen
    if valid is None:
        return k, v
    unused = ~valid[:, None, :, None]
    return k.masked_fill(unused, 0.0), v.masked_fill(unused, 0.0)


def _or_all(valid: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    if valid is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    return valid


def _check_heads(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> None:
    batch, heads, _, width = q.shape
    kv_heads = k.shape[1]
    expected = (batch, kv_heads, k.shape[2], width)
    for name, tensor in (("k", k), ("v", v)):
        if tuple(tensor.shape) != expected:
            raise ShapeError(
                explain(name, f"have shape {expected}", tuple(tensor.shape), "is it BHSD?")
            )
    if heads % kv_heads:
        raise ShapeError(
            explain(
                "num_attention_heads",
                "be a multiple of num_key_value_heads",
                f"{heads} and {kv_heads}",
            )
        )
    _check_shape("sink", sink, (heads,))


def _check_limits(
    causal: bool, sliding_window: int | None, attention_chunk_size: int | None, q_stride: int
) -> None:
    for name, value in (
        ("sliding_window", sliding_window),
        ("attention_chunk_size", attention_chunk_size),
        ("q_stride", q_stride),
    ):
        if value is not None and value < 1:
            raise ShapeError(explain(name, "be at least 1", value))
        if name != "q_stride" and value is not None and not causal:
            raise ShapeError(explain(name, "be None unless causal is True", value))


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...] | None) -> None:
    if tensor is None and shape is None:
        return
    if tensor is None:
        if name.endswith("_prior"):
            raise ShapeError(explain("k_prior and v_prior", "be given together", "one of them"))
        return
    if shape is None or tuple(tensor.shape) != shape:
        raise ShapeError(explain(name, f"have shape {shape}", tuple(tensor.shape)))
