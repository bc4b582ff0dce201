"""Flash decoding: attention over keys that several cores hold, joined through their row sums.

Core `r` of a group of `g` keeps the tokens `t` with `t % g == r`, token `t` in slot `t // g`. Each
core scores its own keys and sums `exp(score - largest)` by row; the pairs (largest, sum) of all
cores are gathered and joined, each core weighs its own values by the joint softmax, and the cores'
outputs add up. With parts `p`:

    m = max_p m_p      total = sum_p exp(m_p - m) total_p      out = sum_p exp(s_p - m) / total v_p

A sink counts once, in the join. A step's own keys are one more part: each counts on the core that
is going to keep it.
`attend_on_group` does this on the ranks of a group; `attend_parts` with all parts in one place.

Source: Dao et al. (2023), Flash-Decoding; neuronx-distributed-inference, `distributed_softmax` and
`_filter_kv_for_flash_decoding`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from impl.errors import ConfigError, explain
from impl.kernels.native import ScoreRule, attention_scores
from impl.parallel.collectives import all_gather, reduce_scatter
from impl.parallel.groups import Group


class KeyPart(NamedTuple):
    """Keys and values that one core holds.

    Attributes:
        k: `(batch, num_key_value_heads, kv_len, head_dim)`, BHSD.
        v: like `k`.
        mask: `(batch or 1, 1, q_len or 1, kv_len)`, bool, True = attend.
    """

    k: Tensor
    v: Tensor
    mask: Tensor


class RowSums(NamedTuple):
    """What the softmax of a row needs to know of a part of its keys.

    Attributes:
        largest: `(batch, num_key_value_heads, group, q_len, 1)`, compute dtype: largest score, -inf
            in a row that sees no key of the part.
        total: like `largest`: sum of `exp(score - largest)`, 0 in such a row.
    """

    largest: Tensor
    total: Tensor


def own_tokens(k: Tensor, v: Tensor, *, core: int, cores: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a prompt that a core keeps.

    Args:
        k: `(batch, num_key_value_heads, seq_len, head_dim)`, BHSD, of the tokens from position 0.
        v: like `k`.
        core: this core's rank in its group.
        cores: cores of the group.

    Returns:
        Views with every `cores`-th token, from `core` on.

    Raises:
        ConfigError: `core` is not in the group.
    """
    if not 0 <= core < cores:
        raise ConfigError(explain("core", f"be in 0..{cores - 1}", core))
    return k[:, :, core::cores], v[:, :, core::cores]


def part_scores(q: Tensor, part: KeyPart, rule: ScoreRule) -> Tensor:
    """Masked scores of a part.

    Args:
        q: `(batch, num_attention_heads, q_len, head_dim)`, BHSD.
        part: the part.
        rule: scale and softcap.

    Returns:
        `(batch, num_key_value_heads, group, q_len, kv_len)`, compute dtype; -inf where masked.
    """
    scores = attention_scores(q, part.k, rule)
    return scores.masked_fill(~part.mask.unsqueeze(1), float("-inf"))


def row_sums(scores: Tensor) -> RowSums:
    """Sum a part's masked scores by row; a core's half of the exchange."""
    largest = scores.amax(dim=-1, keepdim=True)
    shift = largest.masked_fill(largest == float("-inf"), 0.0)
    return RowSums(largest, torch.exp(scores - shift).sum(dim=-1, keepdim=True))


def join_row_sums(parts: Sequence[RowSums], sink: Tensor | None = None) -> RowSums:
    """Join what is known of all parts; every core does the same.

    Args:
        parts: at least one, in any order.
        sink: `(num_attention_heads,)`, or None.

    Returns:
        Sums over all keys, and the sink.

    Raises:
        ConfigError: there is no part.
    """
    if not parts:
        raise ConfigError(explain("parts", "hold at least one", "none"))
    largest = parts[0].largest
    for part in parts[1:]:
        largest = torch.maximum(largest, part.largest)
    logits = None
    if sink is not None:
        kv_heads, group = largest.shape[1:3]
        logits = sink.to(largest.dtype).view(1, kv_heads, group, 1, 1)
        largest = torch.maximum(largest, logits)
    shift = largest.masked_fill(largest == float("-inf"), 0.0)
    total = torch.zeros_like(largest)
    for part in parts:
        total = total + part.total * torch.exp(part.largest - shift)
    if logits is not None:
        total = total + torch.exp(logits - shift)
    return RowSums(largest, total)


def part_output(scores: Tensor, part: KeyPart, joint: RowSums) -> Tensor:
    """Weigh a part's values by the joint softmax; the parts' outputs add up to the heads' output.

    Args:
        scores: from `part_scores`.
        part: the part.
        joint: from `join_row_sums`.

    Returns:
        `(batch, num_attention_heads, q_len, head_dim)`, compute dtype; weights are rounded to the
        dtype of the values, as everywhere.
    """
    shift = joint.largest.masked_fill(joint.largest == float("-inf"), 0.0)
    weights = torch.exp(scores - shift) / joint.total.masked_fill(joint.total == 0, 1.0)
    batch, kv_heads, group, q_len, kv_len = scores.shape
    unused = ~part.mask.any(dim=2).unsqueeze(-1)
    values = part.v.masked_fill(unused, 0.0)
    rows = weights.to(values.dtype).to(scores.dtype).reshape(batch, kv_heads, -1, kv_len)
    out = torch.matmul(rows, values.to(scores.dtype))
    return out.reshape(batch, kv_heads * group, q_len, values.shape[-1])


def attend_parts(
    q: Tensor, parts: Sequence[KeyPart], sink: Tensor | None, rule: ScoreRule
) -> Tensor:
    """Attend to all parts, on one core in the place of all.

    Args:
        q: `(batch, num_attention_heads, q_len, head_dim)`, BHSD.
        parts: at least one; disjoint keys.
        sink: `(num_attention_heads,)`, or None.
        rule: scale and softcap.

    Returns:
        Like `q`, in its dtype; a row that sees no key of any part is zeros.

    Raises:
        ConfigError: there is no part.
    """
    scores = [part_scores(q, part, rule) for part in parts]
    joint = join_row_sums([row_sums(part) for part in scores], sink)
    outputs = [part_output(s, p, joint) for s, p in zip(scores, parts, strict=True)]
    return torch.stack(outputs).sum(dim=0).to(q.dtype)


class RowSumExchange(nn.Module):
    """Gives every core of a group the row sums of all.

    It is a module so that a forward hook sees what each core sends: a core that sends something
    wrong spoils the outputs of its whole group.

    Args:
        group: the cores.
    """

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def forward(self, own: RowSums) -> list[RowSums]:
        """Gather row sums, by core."""
        pairs = all_gather(torch.stack(own)[None], 0, self.group)
        return [RowSums(*pair.unbind(0)) for pair in pairs.unbind(0)]


def attend_on_group(
    q: Tensor,
    cached: KeyPart,
    active: KeyPart,
    position_ids: Tensor,
    sink: Tensor | None,
    rule: ScoreRule,
    exchange: RowSumExchange,
) -> Tensor:
    """Attention of a decode step on one core of a group that keeps a KV head's tokens together.

    Every core scores the queries of the whole group on its own tokens.

    Args:
        q: `(batch, num_attention_heads, q_len, head_dim)`, BHSD, of this core's query heads.
        cached: this core's tokens, of one KV head.
        active: the step's own, the same on every core.
        position_ids: `(batch, active tokens)`, which say on which core each of those counts.
        sink: `(num_attention_heads,)`, of this core's query heads, or None.
        rule: scale and softcap.
        exchange: of the cores' row sums.

    Returns:
        Like `q`, in its dtype.
    """
    group = exchange.group
    queries = all_gather(q, 1, group)
    sinks = None if sink is None else all_gather(sink, 0, group)
    kept = (position_ids % group.size == group.rank)[:, None, None]
    parts = (cached, active._replace(mask=active.mask & kept))
    scores = [part_scores(queries, part, rule) for part in parts]
    own = join_row_sums([row_sums(part) for part in scores])
    joint = join_row_sums(exchange(own), sinks)
    first, second = (part_output(s, p, joint) for s, p in zip(scores, parts, strict=True))
    return reduce_scatter(first + second, 1, group).to(q.dtype)
