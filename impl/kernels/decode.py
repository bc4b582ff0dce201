"""One entry to every decode kernel: cached (prior) and new (active) keys under one softmax."""

from __future__ import annotations

from torch import Tensor

from impl.errors import ConfigError, explain
from impl.kernels import headwise, native
from impl.kernels.flash import flash_attention
from impl.kernels.native import ScoreRule
from impl.strategy import Implementation


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prior: Tensor,
    v_prior: Tensor,
    prior_mask: Tensor,
    active_mask: Tensor | None,
    sink: Tensor | None,
    rule: ScoreRule,
    *,
    implementation: Implementation,
    k_prior_transposed: bool = False,
) -> Tensor:
    """Attention of a decode step.

    The streamed form reads the cache where it is, a tile at a time, and the headwise form a piece
    of one head at a time, without a gradient; the native form makes a copy of all values, and of
    all keys where they are narrower than float32.

    Args:
        q: `(batch, num_attention_heads, q_len, head_dim)`, BHSD, rotated.
        k: keys of this step, `(batch, num_key_value_heads, q_len, head_dim)`, BHSD, rotated.
        v: like `k`.
        k_prior: cached keys, `(batch, num_key_value_heads, cache_len, head_dim)`, or with its last
            two axes exchanged if `k_prior_transposed`.
        v_prior: `(batch, num_key_value_heads, cache_len, head_dim)`.
        prior_mask: `(batch or 1, 1, q_len or 1, cache_len)`, bool, True = attend.
        active_mask: `(batch or 1, 1, q_len, q_len)`, bool; None is all of it.
        sink: `(num_attention_heads,)`, or None.
        rule: scale and softcap.
        implementation: who computes it, from `impl.decode_strategy.resolve_decode_kernel`.
        k_prior_transposed: cached keys are stored as columns.

    Returns:
        Like `q`, in its dtype.

    Raises:
        ConfigError: the implementation has no decode form.
        ShapeError: a tensor that does not fit.
    """
    if implementation in (Implementation.NATIVE, Implementation.HEADWISE):
        at_once = implementation is Implementation.NATIVE
        attend = native.token_generation if at_once else headwise.token_generation
        return attend(
            q,
            k,
            v,
            k_prior,
            v_prior,
            prior_mask,
            active_mask,
            sink,
            rule,
            k_prior_transposed=k_prior_transposed,
        )
    if implementation is not Implementation.FLASH:
        raise ConfigError(
            explain(
                "implementation", "be native, headwise or flash in decode", implementation.value
            )
        )
    return flash_attention(
        q,
        k,
        v,
        rule=rule,
        sink=sink,
        causal=False,
        mask=active_mask,
        k_prior=k_prior,
        v_prior=v_prior,
        prior_mask=prior_mask,
        k_prior_transposed=k_prior_transposed,
    )
