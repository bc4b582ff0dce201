"""Keys split over cores attend as keys on one core."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from impl_layers import KV_HEADS, ROUNDOFF, WIDTH, relative_error
from torch import Tensor

from impl import ConfigError, flash_decoding
from impl.flash_decoding import KeyPart, attend_parts, join_row_sums, own_tokens, row_sums
from impl.kernels.native import ScoreRule, token_generation
from impl.slot_positions import ShardSlots, slot_positions

HEADS, CACHED = 6, 11


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(
    cores: int, q_len: int = 2, poison: float = float("nan")
) -> tuple[Tensor, list[KeyPart], dict[str, Any]]:
    """Queries, the cores' parts with the step's own as last, and the same on one core."""
    q = random(2, HEADS, q_len, WIDTH, seed=0)
    k, v = (random(2, KV_HEADS, CACHED, WIDTH, seed=s) for s in (1, 2))
    k_new, v_new = (random(2, KV_HEADS, q_len, WIDTH, seed=s) for s in (3, 4))
    cached = torch.tensor([CACHED, 4])
    seen = (torch.arange(CACHED) < cached[:, None])[:, None, None]
    among = torch.ones(1, 1, q_len, q_len, dtype=torch.bool).tril()
    parts = []
    for core in range(cores):
        own_k, own_v = own_tokens(k, v, core=core, cores=cores)
        spare = torch.full((2, KV_HEADS, 3, WIDTH), poison, dtype=torch.float64)
        slots = own_k.shape[2] + 3
        held = slot_positions(ShardSlots(core, cores), cached, slots)
        parts.append(
            KeyPart(
                torch.cat((own_k, spare), dim=2),
                torch.cat((own_v, spare), dim=2),
                (held >= 0)[:, None, None],
            )
        )
    parts.append(KeyPart(k_new, v_new, among))
    together = {"k": k_new, "v": v_new, "k_prior": k, "v_prior": v}
    return q, parts, together | {"prior_mask": seen, "active_mask": among}


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sink", [None, random(HEADS, seed=9)], ids=["no sink", "sink"])
def test_any_number_of_cores_gives_the_same_rows(
    cores: int, softcap: float | None, sink: Tensor | None
) -> None:
    rule = ScoreRule(divisor=1.7, softcap=softcap)
    q, parts, together = step(cores)
    expected = token_generation(q, sink=sink, rule=rule, **together)
    assert relative_error(attend_parts(q, parts, sink, rule), expected) <= ROUNDOFF
    backwards = attend_parts(q, parts[::-1], sink, rule)
    assert relative_error(backwards, expected) <= ROUNDOFF


def test_a_row_that_sees_no_key_of_any_part_is_zero_and_has_no_sum() -> None:
    q, parts, _ = step(2)
    hidden = [part._replace(mask=torch.zeros_like(part.mask)) for part in parts]
    for sink in (None, torch.zeros(HEADS, dtype=torch.float64)):
        got = attend_parts(q, hidden, sink, ScoreRule(divisor=1.0))
        assert torch.equal(got, torch.zeros_like(got))
    joint = join_row_sums([row_sums(torch.full((1, 2, 3, 1, 4), float("-inf")))])
    assert torch.equal(joint.total, torch.zeros_like(joint.total))


def test_scores_far_apart_on_two_cores_do_not_overflow() -> None:
    q, parts, together = step(2)
    rule = ScoreRule(divisor=1e-3)  # Scores of thousands.
    expected = token_generation(q, sink=None, rule=rule, **together)
    # A score of s is off by s u on either side, which exp turns into a relative error.
    most = float(q.abs().sum(-1).max() * together["k_prior"].abs().max()) / 1e-3
    assert relative_error(attend_parts(q, parts, None, rule), expected) <= 8 * most * 2**-53


def test_a_prompt_is_dealt_out_token_by_token() -> None:
    k = torch.arange(5.0).view(1, 1, 5, 1)
    dealt = [own_tokens(k, k, core=core, cores=2)[0].flatten().tolist() for core in range(2)]
    assert dealt == [[0, 2, 4], [1, 3]]
    with pytest.raises(ConfigError, match=r"core must be in 0\.\.1, got 2"):
        own_tokens(k, k, core=2, cores=2)


def test_no_parts_are_refused() -> None:
    with pytest.raises(ConfigError, match="hold at least one"):
        attend_parts(step(1)[0], [], None, ScoreRule(divisor=1.0))


def _sum_without_shift(parts: Any, sink: Tensor | None = None) -> Any:
    joint = join_row_sums(parts, sink)
    return joint._replace(total=sum(part.total for part in parts))


def _sink_per_part(parts: Any, sink: Tensor | None = None) -> Any:
    joint = join_row_sums(parts, sink)
    return (
        joint if sink is None else joint._replace(total=joint.total + torch.exp(sink.sum()) * 1e-6)
    )


@pytest.mark.parametrize("planted", [_sum_without_shift, _sink_per_part])
def test_planted_bugs_are_found(
    planted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash_decoding, "join_row_sums", planted)
    with pytest.raises(AssertionError):
        test_any_number_of_cores_gives_the_same_rows(3, None, random(HEADS, seed=9))
