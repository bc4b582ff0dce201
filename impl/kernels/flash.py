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

Memory: inputs, output, and `SCORES_PER_TILE` scores with the keys and values they need. Time: tiles
that static positions prove empty are not computed. The gradient is streamed likewise and keeps
nothing but inputs, output and a number per row; it is not itself differentiable.
"""

from __future__ import annotations

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
    mask: Tensor | None = None,
    k_prior: Tensor | None = None,
    v_prior: Tensor | None = None,
    prior_mask: Tensor | None = None,
    prior_positions: Tensor | None = None,
    k_prior_transposed: bool = False,
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
        mask: `(batch or 1, 1, q_len or 1, kv_len)`, bool, True = attend: narrows what positions
            allow, to hide padding, say.
        k_prior: cached keys, `(batch, num_key_value_heads, prior_len, head_dim)`, or with its last
            two axes exchanged if `k_prior_transposed`; both or neither.
        v_prior: `(batch, num_key_value_heads, prior_len, head_dim)`.
        prior_mask: `(batch or 1, 1, q_len or 1, prior_len)`, bool: as `mask`, of the cached keys.
        prior_positions: `(batch, prior_len)`, integer: position of each cached key, so negative.
        k_prior_transposed: cached keys are stored as columns.

    Returns:
        Like `q`, in its dtype. A row that may see no key is zeros.

    Raises:
        ShapeError: a tensor that does not fit, or a window or chunk without `causal`.
    """
    _check_heads(q, k, v, sink)
    _check_limits(causal, sliding_window, attention_chunk_size, q_stride)
    batch, heads, q_len, width = q.shape
    kv_len = k.shape[2]
    prior_len = 0 if v_prior is None else v_prior.shape[2]
    _check_prior(k_prior, v_prior, (batch, k.shape[1], prior_len, width), k_prior_transposed)
    _check_shape("prior_positions", prior_positions, (batch, prior_len))
    _check_shape("chunk_origin", chunk_origin, (batch,))
    _check_mask("mask", mask, (batch, 1, q_len, kv_len))
    _check_mask("prior_mask", prior_mask, (batch, 1, q_len, prior_len))
    plan = TilePlan(
        q_len=q_len,
        kv_len=kv_len,
        prior_len=prior_len,
        q_offset=q_offset,
        q_stride=q_stride,
        causal=causal,
        sliding_window=sliding_window,
        attention_chunk_size=attention_chunk_size,
        prior_moves=prior_positions is not None,
        chunk_moves=chunk_origin is not None,
        q_tile=min(Q_TILE, max(1, SCORES_PER_TILE // (batch * heads * KV_TILE))),
    )
    out: Tensor = FlashAttention.apply(  # type: ignore[no-untyped-call]
        q,
        k,
        v,
        k_prior,
        v_prior,
        sink,
        mask,
        prior_mask,
        prior_positions,
        chunk_origin,
        plan,
        Scale(factor=1.0 / rule.divisor, softcap=rule.softcap),
        k_prior_transposed,
    )
    return out


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


def _check_prior(
    k_prior: Tensor | None,
    v_prior: Tensor | None,
    shape: tuple[int, int, int, int],
    k_prior_transposed: bool,
) -> None:
    if (k_prior is None) != (v_prior is None):
        raise ShapeError(explain("k_prior and v_prior", "be given together", "one of them"))
    batch, kv_heads, prior_len, width = shape
    _check_shape("v_prior", v_prior, shape)
    if k_prior_transposed:
        shape = (batch, kv_heads, width, prior_len)
    _check_shape("k_prior", k_prior, shape)


def _check_mask(name: str, mask: Tensor | None, shape: tuple[int, int, int, int]) -> None:
    if mask is None:
        return
    given = tuple(mask.shape)
    wide = tuple(1 if i in (0, 2) and size == 1 else shape[i] for i, size in enumerate(given))
    if given != wide or len(given) != 4:
        raise ShapeError(explain(name, f"have shape {shape}, batch and queries may be 1", given))


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ShapeError(explain(name, f"have shape {shape}", tuple(tensor.shape)))
