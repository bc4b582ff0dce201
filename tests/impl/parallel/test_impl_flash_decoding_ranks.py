"""Flash decoding on ranks: each keeps every g-th token, and all return what one rank does."""

from typing import Any

import pytest
import torch
from impl_layers import ROUNDOFF, model, positions, relative_error, tokens
from parallel_layers import BATCH, build, checkpoint
from thread_ranks import on_ranks
from torch import Tensor

from impl import KVCacheManager
from impl.parallel import collectives

TOTAL, PROMPT = 16, 7
GROUPS = [(4, 4, 2), (8, 6, 2), (4, 4, 1), (2, 6, 1)]  # Ranks, query heads, KV heads.


def served(heads: int, kv: int, ranks: int, state: dict[str, Tensor], rank: int) -> list[Tensor]:
    """Outputs of a prompt, three single tokens, and three drafts of which one is kept."""
    cores = ranks // kv
    run = {"tp_degree": ranks, "flash_decoding_enabled": cores > 1, "seq_len": 24}
    features = {"num_cores_per_group": cores} if cores > 1 else {}
    made = build(heads, kv, run, state, **features)
    config = model(
        run={"batch_size": BATCH, **run},
        num_attention_heads=heads,
        num_key_value_heads=kv,
        num_cores_per_group=cores,
    )
    manager = KVCacheManager(config, num_kv_head=1, core=rank % cores)
    for stored in manager.past_key_values:
        stored.fill_(float("nan"))
    hidden, at = tokens(TOTAL, BATCH), positions(TOTAL, batch=BATCH).clone()
    at[1, PROMPT - 3 : PROMPT] = -1  # One row's prompt is three tokens shorter.
    at[1, PROMPT:] -= 3
    outputs = []
    spans = [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, PROMPT + 3)), (10, 13), (11, 14)]
    for start, end in spans:
        now = slice(start, end)
        call: dict[str, Any] = {"get_kv_per_layer": start > 0}
        if start == 0:
            call["attention_mask"] = at[:, now] >= 0
        elif end - start > 1:
            call["active_mask"] = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
        output = made(
            hidden[:, now],
            position_ids=at[:, now],
            kv_mgr=manager,
            update_kv_per_layer=True,
            idx=0,
            **call,
        )
        manager.store(0, output.present_key_value)
        outputs.append(output.hidden_states)
    return outputs


@pytest.mark.parametrize(("ranks", "heads", "kv"), GROUPS)
@pytest.mark.parametrize("sinks", [False, True])
def test_every_rank_returns_what_one_rank_does(
    ranks: int, heads: int, kv: int, sinks: bool
) -> None:
    state = checkpoint(heads, kv, bias=True, sinks=sinks and heads % ranks == 0)
    alone = build(heads, kv, {}, state)
    hidden, at = tokens(TOTAL, BATCH), positions(TOTAL, batch=BATCH).clone()
    at[1, PROMPT - 3 : PROMPT] = -1
    at[1, PROMPT:] -= 3
    whole = alone(hidden, at >= 0, at).hidden_states
    for outputs in on_ranks(ranks, lambda rank: served(heads, kv, ranks, state, rank)):
        start = 0
        for output, first in zip(outputs, (0, 7, 8, 9, 10, 11), strict=True):
            start = first
            expected = whole[:, start : start + output.shape[1]]
            real = at[:, start : start + output.shape[1]] >= 0
            assert relative_error(output[real], expected[real]) <= ROUNDOFF


def test_a_core_left_out_of_the_sum_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import impl.flash_decoding as flash_decoding

    def own_only(x: Tensor, dim: int, group: Any) -> Tensor:
        return (
            collectives.all_gather(x, dim, group)
            .narrow(dim, 0, x.shape[dim])
            .repeat(*(group.size if axis == dim else 1 for axis in range(x.dim())))
        )

    monkeypatch.setattr(flash_decoding, "all_gather", own_only)
    with pytest.raises(AssertionError):
        test_every_rank_returns_what_one_rank_does(4, 4, 2, False)
