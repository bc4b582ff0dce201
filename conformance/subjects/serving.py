"""What a served layer is called with: a cache to keep, and step after step to take with it.

A subject that serves builds its cache, puts the prior keys and values into it, takes the steps in
order and answers with each step's output and with what its cache holds at the end:

```python
@subject(scope="layer", profile="native", serves=True)
def my_layer(call):
    if isinstance(call, LayerCall):
        return my_prompt_or_decode(call)
    cache = MyCache(call.cache, call.cache_rows, call.max_length)
    if call.k_prior is not None:
        cache.fill(call.k_prior, call.v_prior, call.prior_lengths)
    outputs = [my_step(call, step, cache) for step in call.steps]
    k, v = cache.by_position(call.max_length)
    return ServeOutput(outputs=outputs, k_cache=k, v_cache=v)
```

What it does not serve it refuses with `Unsupported("the cache has no blocks")`, and the case is
reported as not claimed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from conformance.schedule_calls import CallKind
from conformance.schedules import CacheKind
from conformance.subjects.base import Adapters, InputNorm
from golden import AttentionConfig


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ServeStep:
    """One call of a served layer; floating tensors are in the case's dtype.

    A token sees what its sequence holds in the cache at positions before the row's first, and the
    step's own tokens, each as the layer's mask says: causal, window, chunk. A sink counts once.

    Attributes:
        kind: `prompt`, tokens at once (a prefill; on a cached prefix where the sequence holds
            tokens already); `piece`, one window of a prompt; `decode`, one token; `drafts`,
            tokens to verify; `packed`, sequences side by side in one row.
        hidden_states: `(batch, q_len, hidden_size)`; `(1, q_len, hidden_size)` for `packed`.
        position_ids: `(batch, q_len)`, int64, -1 for padding, on the right or the left.
        seq_ids: `(batch,)`, int64, the cache row of each batch row, -1 for an idle one; for
            `packed` `(sequences,)`. None is all cache rows, in order.
        fresh: whether the sequences start anew: what their cache rows held belongs to others that
            have left.
        active_mask: `(q_len, q_len)`, bool, True = attend, which of the drafts see which; siblings
            of a tree share a position. None but for `drafts`.
        kept: `(batch, q_len)`, bool, tokens that later steps must find in the cache: all but
            padding and rejected drafts. A subject may write rejected drafts where no later step
            sees them; it may not use this before the step's output is made.
        query_lens: for `packed`, new tokens of each sequence; None otherwise.
        key_lens: for `packed`, tokens of each sequence, cached ones included; None otherwise.
        piece: number of a `piece`, from 0; -1 otherwise.
        piece_size: tokens of a piece (the last may be shorter); 0 otherwise.
        adapter_ids: `(batch,)`, int64, adapter of each batch row, -1 for none; None without
            adapters.
        residual: shaped like `hidden_states`, to be added to them before the input's norm; None
            without.
        rotary_position_ids: `(axes, batch, q_len)`, int64, positions for M-RoPE; None for RoPE at
            `position_ids`.
    """

    kind: CallKind
    hidden_states: torch.Tensor
    position_ids: torch.Tensor
    seq_ids: torch.Tensor | None
    fresh: bool
    active_mask: torch.Tensor | None
    kept: torch.Tensor
    query_lens: tuple[int, ...] | None = None
    key_lens: tuple[int, ...] | None = None
    piece: int = -1
    piece_size: int = 0
    adapter_ids: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    rotary_position_ids: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredAs:
    """How a quantised cache stores keys, or values.

    With scales, `code = round(clamp(x / scale))`, and reading gives `code * scale`; without, a
    value is cast. The step's own tokens attend to each other's keys and values as they are; only
    what earlier steps left is read back from codes.

    Attributes:
        dtype: `torch.float8_e4m3fn`, `torch.float8_e5m2` or `torch.int8`.
        scale: `()`, `(num_key_value_heads,)` or `(num_key_value_heads, head_dim)`, float32, powers
            of two; None casts.
    """

    dtype: torch.dtype
    scale: torch.Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ServeCall:
    """Arguments of a served layer; floating tensors are in the case's dtype.

    Attributes:
        config: the layer.
        weights: tensors by the field names of `golden.AttentionWeights`, matrices `(out, in)`.
        cache: layout, size and format of the cache to keep.
        cache_rows: sequences it must hold.
        max_length: positions that a sequence may reach, rejected drafts included.
        speculation_length: tokens of the largest step of drafts; 1 without any.
        steps: what to do, in order.
        k_prior: `(cache_rows, num_key_value_heads, longest, head_dim)`, BHSD, keys at positions
            0 .. of tokens that came before; to be put into the cache as a prompt would have. None
            for an empty cache. Beyond a row's length they belong to nobody.
        v_prior: like `k_prior`.
        prior_lengths: `(cache_rows,)`, int64, tokens that each row holds before the first step.
        block_tables: `(cache_rows, blocks)`, int64, blocks of each row; None unless paged.
        num_blocks: blocks of the pool; 0 unless paged.
        keys_as: how keys are stored; None as they are.
        values_as: how values are stored; None as they are.
        adapters: low-rank adapters; their `ids` are those of the cache rows, each step has its
            own. None without.
        input_norm: how the layer norms its input; None where it comes normed.
    """

    config: AttentionConfig
    weights: Mapping[str, torch.Tensor]
    cache: CacheKind
    cache_rows: int
    max_length: int
    speculation_length: int
    steps: tuple[ServeStep, ...]
    k_prior: torch.Tensor | None
    v_prior: torch.Tensor | None
    prior_lengths: torch.Tensor
    block_tables: torch.Tensor | None = None
    num_blocks: int = 0
    keys_as: StoredAs | None = None
    values_as: StoredAs | None = None
    adapters: Adapters | None = None
    input_norm: InputNorm | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ServeOutput:
    """What a served layer returns.

    Attributes:
        outputs: of each step, `(batch, q_len, hidden_size)`; padding may hold anything.
        k_cache: `(cache_rows, num_key_value_heads, max_length, head_dim)`, keys by position, as
            reading the cache gives them; positions that it does not hold may be anything.
        v_cache: like `k_cache`.
    """

    outputs: Sequence[torch.Tensor]
    k_cache: torch.Tensor
    v_cache: torch.Tensor
