"""What nki-library's `attention_cte` is called with for a prefill, and where it cannot be called.

Source: aws-neuron/nki-library, `src/nkilib_src/nkilib/core/attention/attention_cte.py` (commit
0759719), the docstring and the assertions of `attention_cte`; for the width of a window, in which
the two texts there differ by one key, the bounds that the kernel computes and the reference in
`attention_cte_torch.py` (commit 181b205): a window of W sees W keys, the query's own included.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from impl.errors import ShapeError, UnsupportedError, explain

MAX_HEAD_DIM = 128
MAX_BATCH = 512
"""Batch times query heads."""
MAX_LENGTH = 131072
"""Of queries, and of prior and new keys together."""
MAX_CP_DEGREE = 32


def attention_cte_obstacle(
    *,
    head_dim: int,
    dtype: torch.dtype,
    softcap: float | None = None,
    attention_chunk_size: int | None = None,
    padding_side: str = "right",
    explicit_mask: bool = False,
) -> str | None:
    """Say why `attention_cte` cannot compute a prefill.

    Args:
        head_dim: width of a head.
        dtype: of queries, keys and values. The kernel multiplies in bfloat16 whatever it is given,
            so that any other dtype would lose digits without a word.
        softcap: of the scores, None if there is none.
        attention_chunk_size: of the layer, None if there is none.
        padding_side: side of a row that holds its padding; causality hides only the right one.
        explicit_mask: a mask `(batch, 1, q_len, kv_len)` is given.

    Returns:
        The reason, in words; None if it can.
    """
    reasons = (
        (head_dim > MAX_HEAD_DIM, f"head_dim {head_dim} is above the {MAX_HEAD_DIM} it serves"),
        (dtype != torch.bfloat16, f"it multiplies in bfloat16, and the layer is in {dtype}"),
        (softcap is not None, "it has no softcap"),
        (attention_chunk_size is not None, "it has no attention chunks"),
        (padding_side != "right", "it has no mask for padding on the left"),
        (explicit_mask, "it takes no mask"),
    )
    return next((f"attention_cte: {why}" for holds, why in reasons if holds), None)


class AttentionCTECall(NamedTuple):
    """One call of `attention_cte`, heads folded into its batch.

    The layouts are those of `tp_q=True, tp_k=True, tp_out=False`: tokens before `head_dim` in every
    tensor and in the result.

    Attributes:
        q: `(batch * num_attention_heads, q_len, head_dim)`.
        k: `(batch * num_key_value_heads, kv_len, head_dim)`.
        v: like `k`.
        k_prior: `(batch * num_key_value_heads, prior_len, head_dim)`, or None.
        v_prior: like `k_prior`.
        prior_used_len: `(1,)`, int32: slots of `k_prior` that are in use, the first ones.
        sink: `(batch * num_attention_heads, 1)`, or None.
        cp_offset: `(1, 1)`, int32: the first query's place among the keys, or None.
        scale: a factor of the scores; 1.0 with a window, an offset or prior keys, where the kernel
            takes no other and `q` is scaled instead.
        causal_mask: a query sees no later key.
        sliding_window: keys a query may see, its own included; 0 is unbounded.
        global_cp_deg: ranks that share the queries; 0 is no context parallelism.
        cp_strided_q_slicing: the queries are every `global_cp_deg`-th token.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    k_prior: Tensor | None
    v_prior: Tensor | None
    prior_used_len: Tensor | None
    sink: Tensor | None
    cp_offset: Tensor | None
    scale: float
    causal_mask: bool
    sliding_window: int
    global_cp_deg: int
    cp_strided_q_slicing: bool


def attention_cte_calls(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    divisor: float,
    sink: Tensor | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    q_offset: int = 0,
    q_stride: int = 1,
    k_prior: Tensor | None = None,
    v_prior: Tensor | None = None,
    prior_lengths: Tensor | None = None,
) -> list[AttentionCTECall]:
    """Arguments of `attention_cte` for one prefill.

    Args:
        q: `(batch, num_attention_heads, q_len, head_dim)`, BHSD, rotated.
        k: `(batch, num_key_value_heads, kv_len, head_dim)`, BHSD, rotated.
        v: like `k`.
        divisor: of the scores.
        sink: `(num_attention_heads,)`, or None.
        causal: a query sees no later key.
        sliding_window: keys a query may see, its own included; None is unbounded.
        q_offset: place of the first query among the keys.
        q_stride: keys from one query to the next.
        k_prior: `(batch, num_key_value_heads, prior_len, head_dim)`, the keys before the step's, in
            order of position from slot 0; or None.
        v_prior: like `k_prior`.
        prior_lengths: `(batch,)`, integer: slots of `k_prior` in use.

    Returns:
        One call, or with prior keys one for each row of the batch, because a call has one
        `prior_used_len`.

    Raises:
        UnsupportedError: more heads, tokens or ranks than the kernel serves.
        ShapeError: arguments that do not go together.
    """
    batch, heads, q_len, width = q.shape
    kv_heads, kv_len = k.shape[1:3]
    if sliding_window is not None and not causal:
        raise ShapeError(explain("sliding_window", "be None unless causal", sliding_window))
    if not (k_prior is None) == (v_prior is None) == (prior_lengths is None):
        raise ShapeError(
            explain("k_prior, v_prior and prior_lengths", "be given together", "some of them")
        )
    # full attention is the same from wherever the queries come
    shared = causal and (q_offset != 0 or q_stride != 1 or q_len != kv_len)
    degree = 0
    if shared:
        degree = q_stride if q_stride != 1 else -(-kv_len // q_len)
    prior_len = 0 if k_prior is None else k_prior.shape[2]
    rows = 1 if k_prior is not None else batch
    for name, limit, got in (
        ("head_dim", MAX_HEAD_DIM, width),
        ("batch times num_attention_heads", MAX_BATCH, rows * heads),
        ("q_len", MAX_LENGTH, q_len),
        ("prior_len + kv_len", MAX_LENGTH, prior_len + kv_len),
        ("the context-parallel degree", MAX_CP_DEGREE, degree),
    ):
        if got > limit:
            raise UnsupportedError(
                explain(
                    name,
                    f"be at most {limit} in attention_cte",
                    got,
                    "attn_kernel_enabled=False keeps to the torch form",
                )
            )
    scaled = sliding_window is not None or shared or k_prior is not None
    if scaled:
        q = q / divisor
    cp_offset = None
    if shared:
        cp_offset = torch.full((1, 1), q_offset, dtype=torch.int32, device=q.device)

    def call(lines: slice) -> AttentionCTECall:
        some = q[lines].shape[0]
        prior: tuple[Tensor | None, ...] = (None, None, None)
        if k_prior is not None and v_prior is not None and prior_lengths is not None:
            prior = (
                k_prior[lines].reshape(some * kv_heads, prior_len, width),
                v_prior[lines].reshape(some * kv_heads, prior_len, width),
                prior_lengths[lines].to(torch.int32),
            )
        return AttentionCTECall(
            q=q[lines].reshape(some * heads, q_len, width),
            k=k[lines].reshape(some * kv_heads, kv_len, width),
            v=v[lines].reshape(some * kv_heads, kv_len, width),
            k_prior=prior[0],
            v_prior=prior[1],
            prior_used_len=prior[2],
            sink=None if sink is None else sink.expand(some, heads).reshape(some * heads, 1),
            cp_offset=cp_offset,
            scale=1.0 if scaled else 1.0 / divisor,
            causal_mask=causal,
            sliding_window=sliding_window or 0,
            global_cp_deg=degree,
            cp_strided_q_slicing=q_stride != 1 and shared,
        )

    if k_prior is None:
        return [call(slice(None))]
    return [call(slice(row, row + 1)) for row in range(batch)]
