"""The vector-Jacobian product of `attend()`, written out densely next to its formula."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from golden.arrays import as_float64, as_positions
from golden.attention import attend, grouped_matmul, visible_keys
from golden.gradients.grouped import gathered, masked_product, masked_sum
from golden.gradients.softmax import (
    delta_of,
    delta_of_output,
    level_of,
    sink_gradient,
    sink_share,
    weights_again,
)
from golden.masks import Mask
from golden.stages import Accumulation, Array, Capture, Observer, unobserved


class AttendGradients(NamedTuple):
    """Result of `attend_vjp`, float64.

    Attributes:
        q: `(batch, num_attention_heads, q_len, head_dim)`, BHSD.
        k: `(batch, num_key_value_heads, kv_len, head_dim)`, BHSD.
        v: `(batch, num_key_value_heads, kv_len, value_dim)`, BHSD.
        sinks: `(num_attention_heads,)`, None without sinks.
    """

    q: Array
    k: Array
    v: Array
    sinks: Array | None


def attend_vjp(
    q: Any,
    k: Any,
    v: Any,
    d_output: Any,
    *,
    q_positions: Any,
    kv_positions: Any,
    mask: Mask,
    softmax_scale: float | None = None,
    sinks: Any = None,
    softcap: float | None = None,
    d_logsumexp: Any = None,
    observe: Observer = unobserved,
) -> AttendGradients:
    """Carry cotangents of attention's output back to queries, keys, values and sinks.

    With `P` the weights, `p_i = exp(sink - L_i)` the share of the sink, `t = tanh(x / softcap)`
    and `L` the log-sum-exp, `dL_i/dx_ij = P_ij` and `dP_ij/dx_ik = P_ij (delta_jk - P_ik)`, hence::

        dP_ij   = sum_c dO_ic V_jc
        D_i     = sum_j P_ij dP_ij                         = sum_c dO_ic O_ic
        dX_ij   = P_ij (dP_ij - D_i + dL_i)                softmax
        dS_ij   = dX_ij (1 - t_ij) (1 + t_ij)              soft cap, else dS = dX
        dq_i    = softmax_scale * sum_j dS_ij k_j
        dk_j    = softmax_scale * sum_i dS_ij q_i          over the queries of the group (G1)
        dv_j    = sum_i P_ij dO_i                          likewise
        dsink   = sum_i p_i (dL_i - D_i)                   over batch rows and queries; dP is 0

    G1: a key/value head gathers the gradients of all query heads that read it.
    G2: a row that sees no key has the constant output of zeros, so its `d_output` reaches nothing,
        and its query's gradient is zero.
    G3: what a masked key or value holds, or a query that sees nothing, changes no bit of any
        gradient, not even NaN or infinity; a masked key's own gradient gets nothing from the row.
    G4: a gradient that reads a visible value which is not finite is NaN or infinite, never zero.
    G5: `dP` and `D` are taken relative to the `dP` of the row's largest weight (0 if that is the
        sink's share): weights and share sum to 1, so `dP - D` is the same for any such level, and
        where one weight is nearly 1 its `dP - D` is a sum of small terms, not a difference of
        large ones.

    Args:
        q: `(batch, num_attention_heads, q_len, head_dim)`, BHSD.
        k: `(batch, num_key_value_heads, kv_len, head_dim)`, BHSD.
        v: `(batch, num_key_value_heads, kv_len, value_dim)`, BHSD.
        d_output: `(batch, num_attention_heads, q_len, value_dim)`, cotangent of the output.
        q_positions: as `attend` takes it.
        kv_positions: as `attend` takes it.
        mask: which keys a query may see; True = attend.
        softmax_scale: factor on the dot products; None is `head_dim ** -0.5`.
        sinks: `(num_attention_heads,)`, None for none.
        softcap: `c` in `c * tanh(x / c)`, None for none.
        d_logsumexp: `(batch, num_attention_heads, q_len)`, cotangent of the log-sum-exp; None is
            zeros.
        observe: sees and may change each stage, of `golden.STAGES` and of
            `golden.GRADIENT_STAGES`; of the forward pass, the exponentials and their sum, the
            cap's tanh and what leads to them are read again.

    Returns:
        Gradients in float64.

    Raises:
        ShapeError: an array has the wrong shape or dtype.
        ConfigError: as `attend`.

    Source: Dao et al. (2022), arXiv 2205.14135, appendix B.2 and algorithm 4; the sink is one
    more score with a value of zero.
    """
    seen = Capture(only=frozenset({"exp", "denominator", "softcap_tanh"}), through=observe)
    output, logsumexp = attend(
        q,
        k,
        v,
        q_positions=q_positions,
        kv_positions=kv_positions,
        mask=mask,
        softmax_scale=softmax_scale,
        sinks=sinks,
        softcap=softcap,
        observe=seen,
    )
    q, k, v = (np.asarray(array).astype(np.float64, copy=False) for array in (q, k, v))
    d_output = as_float64("d_output", d_output, output.shape, "BHSD")
    if d_logsumexp is None:
        d_logsumexp = np.zeros(logsumexp.shape)
    d_logsumexp = as_float64(
        "d_logsumexp", d_logsumexp, logsumexp.shape, "(batch, num_attention_heads, q_len)"
    )
    exps, total = seen.values["exp"], seen.values["denominator"]
    weights = weights_again(exps, total, logsumexp, observe)
    visible = np.broadcast_to(
        visible_keys(
            mask,
            as_positions("q_positions", q_positions, (q.shape[0], q.shape[2])),
            as_positions("kv_positions", kv_positions, (k.shape[0], k.shape[2])),
        ),
        weights.shape,
    )
    d_output = np.where(visible.any(axis=-1, keepdims=True), d_output, 0.0)  # G2
    share = sink_share(sinks, logsumexp)
    with np.errstate(invalid="ignore", over="ignore"):  # G3: masked keys may hold anything
        products = Accumulation(
            v.shape[-1],
            lambda: grouped_matmul(np.square(d_output), np.square(v).swapaxes(-1, -2)),
        )
        d_weights = np.where(visible, grouped_matmul(d_output, v.swapaxes(-1, -2)), 0.0)
        d_weights = observe("d_weights", d_weights, products)
        level = level_of(weights, share, d_weights)
        d_weights = d_weights - level[..., None]
        delta = delta_of(weights, share, d_weights, level, observe)
        delta = delta + delta_of_output(weights, v, d_output, visible, products, observe)
        d_row = d_logsumexp - delta  # dL - D
        d_scores = weights * observe("d_shifted_scores", d_weights + d_row[..., None])
        if softcap is not None:
            tanh = seen.values["softcap_tanh"]
            d_tanh = observe("d_softcap_tanh", softcap * observe("d_softcap", d_scores))
            d_ratio = observe("d_softcap_ratio", d_tanh * (1.0 - tanh) * (1.0 + tanh))
            d_scores = d_ratio / softcap
        d_scores = observe("d_scores", d_scores)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    d_products = observe("d_qk", scale * np.where(visible, d_scores, 0.0))
    again = observe("weights_again", weights)
    heads = k.shape[1]
    d_v = gathered("d_v", again, d_output, visible, heads, observe)
    d_q = observe("d_q", masked_product(d_products, k, visible), masked_sum(d_products, k, visible))
    return AttendGradients(
        q=d_q,
        k=gathered("d_k", d_products, q, visible, heads, observe),
        v=d_v,
        sinks=None if sinks is None else sink_gradient(share, d_row - level, observe),
    )
