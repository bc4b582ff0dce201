"""Known mistakes of parallel attention, planted: each is seen, on the ranks that it reaches.

Source of the mistakes: reports of TGI (#1036), vLLM (#28840, #47079), MinivLLM (#80),
Megatron-DeepSpeed (#227), ring-flash-attention (#67), TransformerEngine (#1930) and others; and
three read in the code of neuronx-distributed-inference, whose functions the tests name.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

import golden.sharding.context_attention
import golden.sharding.encoding
import golden.sharding.flash_decoding
import golden.sharding.output
import golden.sharding.prefill
import golden.sharding.prior
import golden.sharding.rank_heads
from golden import Accumulation, Array, Attended, Observer, attend, merge_attended
from golden.sharding import (
    Mesh,
    RankObserver,
    RankStage,
    ShardedLayer,
    rank_weights,
    shard,
    stage_mesh,
    unobserved_ranks,
)
from tests.golden.sharding.drawn import Choice, Drawn, Problem, drawn, plain, problem, serve


@dataclass(frozen=True)
class Served:
    """A case to plant a mistake in."""

    case: Drawn
    exact: Problem
    layer: ShardedLayer

    def wrong_ranks(
        self,
        layer: ShardedLayer | None = None,
        *,
        decode_layer: ShardedLayer | None = None,
        observe: RankObserver = unobserved_ranks,
    ) -> set[int]:
        """Return the ranks that return something else than the whole layer does."""
        ranks = serve(
            self.case, layer or self.layer, self.exact, decode_layer=decode_layer, observe=observe
        )
        return {rank for rank, got, want, bound in ranks if not (np.abs(got - want) <= bound).all()}


def served(heads: tuple[int, int], degrees: tuple[int, int, int], **changes: Any) -> Served:
    """Return a case; without a mistake no rank is wrong."""
    choice: Choice = plain(heads, degrees, **({"size": 2} | changes))
    case = drawn(choice, 7)
    exact = problem(case)
    good = Served(case, exact, shard(case.config, exact.weights, case.parallelism))
    assert good.wrong_ranks() == set()
    return good


def rewrite(stage: str, change: Callable[[int, Array], Array]) -> RankObserver:
    """Return observers that change one stage by rank."""

    def of_rank(rank: int) -> Observer:
        def observe(name: str, value: Array, how: Accumulation | None = None, /) -> Array:
            return change(rank, value) if name == stage else value

        return observe

    return of_rank


def with_weights(stage: RankStage, cut: Callable[[int], Any]) -> RankStage:
    return replace(stage, weights=tuple(cut(rank) for rank in range(stage.mesh.world_size)))


@pytest.mark.parametrize("degrees", [(2, 1, 1), (4, 2, 1), (4, 1, 2)])
def test_the_output_bias_added_on_every_rank(degrees: tuple[int, int, int]) -> None:
    good = served((4, 1), degrees)
    bias = good.exact.weights.o_bias
    extra = rewrite("o_product", lambda rank, value: value + (bias if rank % 2 else 0.0))
    assert good.wrong_ranks(observe=extra) == set(range(degrees[0]))


def test_key_value_heads_tiled_instead_of_repeated() -> None:
    good = served((4, 2), (4, 1, 1))
    stage, case = good.layer.decode, good.case
    assert stage.layout.kv_heads == (0, 0, 1, 1)
    tiled = replace(stage.layout, kv_heads=(0, 1, 0, 1))
    bad = with_weights(stage, lambda r: rank_weights(case.config, good.exact.weights, tiled, r))
    assert good.wrong_ranks(replace(good.layer, prefill=bad, decode=bad)) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("heads", "degrees"), [((4, 4), (8, 4, 1)), ((8, 4), (8, 4, 2)), ((4, 4), (4, 2, 1))]
)
def test_the_rank_order_of_the_decode_mesh_left_out(
    heads: tuple[int, int], degrees: tuple[int, int, int]
) -> None:
    good = served(heads, degrees)
    stage, whole = good.layer.decode, good.exact.weights
    bad = with_weights(
        stage,
        lambda r: rank_weights(good.case.config, whole, stage.layout, r % stage.mesh.tp_degree),
    )
    assert good.wrong_ranks(decode_layer=replace(good.layer, decode=bad)) == set(range(degrees[0]))


def test_two_ranks_of_an_eight_by_eight_row_swapped() -> None:
    good = served((8, 8), (64, 8, 8))
    ordering = list(good.layer.decode.ordering)
    ordering[12], ordering[13] = ordering[13], ordering[12]  # as if the row were 0 1 2 3 13 12 ...
    stage = replace(good.layer.decode, ordering=tuple(ordering))
    bad = with_weights(
        stage,
        lambda r: rank_weights(good.case.config, good.exact.weights, stage.layout, stage.part(r)),
    )
    # both hold other heads than their caches: the row's sum is wrong, and every rank gathers it
    assert good.wrong_ranks(decode_layer=replace(good.layer, decode=bad)) == set(range(64))


@pytest.mark.parametrize("step", [1, -1])
def test_the_mask_of_a_context_parallel_rank_off_by_one(
    step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = served((4, 2), (4, 2, 1), sequence_parallel=True)

    def shifted(*qkv: Any, q_positions: Any, **options: Any) -> Attended:
        late = q_positions.min() > 0  # the second row's queries, which start in mid-prompt
        return attend(*qkv, q_positions=q_positions + step * int(late), **options)

    monkeypatch.setattr(golden.sharding.context_attention, "attend", shifted)
    assert good.wrong_ranks() == {2, 3}


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(
    "module", [golden.sharding.context_attention, golden.sharding.flash_decoding]
)
def test_base_two_logsumexps_joined_as_natural(
    module: Any, sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = module is golden.sharding.context_attention
    options = {"kv_exchange": "ring"} if ring else {"cores": 2}
    good = served((4, 1), (4, 2, 1) if ring else (4, 1, 1), sinks=sinks, **options)

    def merged(parts: Sequence[Attended]) -> Attended:
        return merge_attended(
            [part._replace(logsumexp=part.logsumexp / math.log(2.0)) for part in parts]
        )

    monkeypatch.setattr(module, "merge_attended", merged)
    assert good.wrong_ranks() == {0, 1, 2, 3}


def test_keys_written_for_the_wrong_head() -> None:
    good = served((4, 4), (4, 2, 1))
    assert good.layer.written == ((0,), (0,), (1,), (1,))
    bad = replace(good.layer, written=((0,), (0,), (0,), (1,)))  # rank 2 has heads 0 and 1
    assert good.wrong_ranks(bad) == {0, 1, 2, 3}  # decode's sum is wrong on every rank


@pytest.mark.parametrize("degrees", [(4, 1, 1), (4, 2, 1), (4, 2, 2)])
def test_a_ranks_sinks_are_those_of_another(degrees: tuple[int, int, int]) -> None:
    good = served((8, 1), degrees, sinks=True, sequence_parallel=True)
    stage = good.layer.prefill
    sinks = [weights.sinks for weights in stage.weights]
    donor = next(rank for rank in range(4) if not np.array_equal(sinks[rank], sinks[0]))
    other = replace(stage.weights[0], sinks=sinks[donor])
    bad = replace(stage, weights=(other, *stage.weights[1:]))
    # its share is wrong, so the sum of its row is; the pieces of other rows are not
    assert good.wrong_ranks(replace(good.layer, prefill=bad)) == set(stage.mesh.rows[0])


def test_batch_rows_swapped_between_data_parallel_ranks() -> None:
    good = served((4, 2), (8, 4, 2))
    mesh = good.layer.decode.mesh
    swapped = replace(good.layer.decode, mesh=Mesh(mesh.rows[::-1]))
    bad = replace(good.layer, decode=swapped)
    assert good.wrong_ranks(decode_layer=bad) == set(range(8))


@pytest.mark.parametrize("wiring", ["trn2", "pds"])
def test_pieces_of_rs_ag_gathered_in_the_order_of_the_ranks(
    wiring: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Source: neuronx-distributed-inference, `attention_block_tokengen_nki_kernel`.

    It scatters the sum over a row and then gathers over all ranks, in the order of their numbers;
    that is the order of the batch only where rows are runs of ranks.
    """
    choice = plain((8, 8), (64, 8, 8), ep_dispatch="RS_AG")
    case = drawn(choice, 7)
    case = replace(case, parallelism=replace(case.parallelism, eight_by_eight=wiring))
    exact = problem(case)
    good = Served(case, exact, shard(case.config, exact.weights, case.parallelism))
    flat = good.layer.decode.mesh.flattened
    assert good.wrong_ranks() == set()

    def by_rank(values: Sequence[Array], axis: int) -> list[Array]:
        return [np.concatenate([values[flat.index(r)] for r in range(64)], axis=axis)] * 64

    monkeypatch.setattr(golden.sharding.output, "all_gather", by_rank)
    assert good.wrong_ranks() == set(range(64))


def test_pieces_of_the_input_dealt_out_for_another_wiring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Source: neuronx-distributed-inference, `get_flattened_inverted_tp_cp_group_mesh`.

    The order in which `chunk_and_reorder_tensor` deals a sequence-parallel input out is asked for
    without `switch_cc`, so on a switch the ranks gather the pieces in another order.
    """
    case = drawn(plain((8, 8), (64, 8, 8), sequence_parallel=True), 7)
    case = replace(case, parallelism=replace(case.parallelism, eight_by_eight="switch"))
    exact = problem(case)
    good = Served(case, exact, shard(case.config, exact.weights, case.parallelism))
    assert good.wrong_ranks() == set()
    dealt = stage_mesh(64, 8, eight_by_eight="trn2").inverted
    assert dealt != good.layer.prefill.mesh.inverted
    gathered = golden.sharding.encoding._gathered

    def of_trn2(plan: Any, given: Sequence[Array]) -> Any:
        return gathered(plan, [given[piece] for piece in dealt])

    monkeypatch.setattr(golden.sharding.encoding, "_gathered", of_trn2)
    assert good.wrong_ranks() == set(range(64))  # decode reads the keys of moved tokens
    # nor is it undone where the output is put together in the same order: positions were not moved.
    # The first four pieces stay where they are, and their tokens see no later ones
    prefill = list(itertools.islice(serve(case, good.layer, exact), 64))
    wanted = [prefill[piece][2:] for piece in dealt]
    wrong = [
        rank
        for (rank, got, _, _), (want, bound) in zip(prefill, wanted, strict=True)
        if not (np.abs(got - want) <= bound).all()
    ]
    assert set(wrong) == set(range(4, 64))


@pytest.mark.parametrize(("heads", "wrong"), [(8, set()), (16, set(range(64)))])
def test_cached_heads_picked_as_if_prefill_held_them_in_the_order_of_the_ranks(
    heads: int, wrong: set[int]
) -> None:
    """Source: neuronx-distributed-inference, `get_kv_head_indices_context_parallel_full_tp_decode`.

    It orders decode's heads by what each rank has in prefill, but then looks them up as if rank `r`
    had part `r % 8`, which on an 8x8 mesh it has not, and takes the first where it finds none. With
    8 KV heads a rank has but one to take.
    """
    good = served((heads, heads), (64, 8, 1))
    prefill, decode = good.layer.prefill, good.layer.decode

    def picked(rank: int) -> tuple[int, ...]:
        held = prefill.layout.kv_part(rank % 8)
        wanted = decode.layout.kv_part(decode.part(rank))
        return tuple(held.index(head) if head in held else 0 for head in wanted)

    bad = replace(good.layer, written=tuple(map(picked, range(64))))
    assert good.wrong_ranks(bad) == wrong


def test_the_partial_sums_never_reduced() -> None:
    good = served((4, 2), (2, 1, 1))
    zeros = rewrite("o_product", lambda rank, value: value if rank == 0 else 0.0 * value)
    assert good.wrong_ranks(observe=zeros) == {0, 1}


def test_a_ring_that_counts_the_sink_on_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    good = served((4, 1), (4, 4, 1), sinks=True, kv_exchange="ring")
    plain_attend = golden.sharding.context_attention._attend

    def counted(*given: Any) -> Any:
        *rest, _, see = given
        return plain_attend(*rest, True, see)

    monkeypatch.setattr(golden.sharding.context_attention, "_attend", counted)
    assert good.wrong_ranks() == {0, 1, 2, 3}


def test_a_flat_norm_over_the_ranks_own_part(monkeypatch: pytest.MonkeyPatch) -> None:
    good = served((4, 2), (2, 1, 1), norm="flat-weightless")
    real = golden.sharding.rank_heads.rotated_heads

    def alone(*given: Any) -> Any:
        return real(*given[:-1], None)

    monkeypatch.setattr(golden.sharding.rank_heads, "rotated_heads", alone)
    assert good.wrong_ranks() == {0, 1}


def test_cached_positions_that_count_from_the_ranks_own_first_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second context-parallel rank takes the prefix to end where its own tokens begin."""
    good = served((4, 1), (4, 2, 1), mask="window3", prompt="pieces", sequence_parallel=True)
    right = golden.sharding.prefill.gathered_prior

    def moved(*given: Any) -> Any:
        found = right(*given)
        if found is None:
            return None
        shift = good.case.q_len // 4
        return [
            held._replace(positions=np.where(held.positions >= 0, held.positions + shift, -1))
            if rank >= 2
            else held
            for rank, held in enumerate(found)
        ]

    monkeypatch.setattr(golden.sharding.prefill, "gathered_prior", moved)
    assert good.wrong_ranks() == {2}  # rank 3's tokens lie beyond the window


def test_segments_cut_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every context-parallel rank counts sequences from the row's first token."""
    good = served((4, 1), (4, 2, 1), prompt="packed", sequence_parallel=True)
    right = golden.sharding.context_attention._together

    def cut(segments: Any, queries: Any, keys: Any, **how: Any) -> Any:
        return right(segments, queries - queries[0], keys, **how)

    monkeypatch.setattr(golden.sharding.context_attention, "_together", cut)
    assert good.wrong_ranks() == {2, 3}


@pytest.mark.parametrize("degrees", [(4, 2, 1), (4, 2, 2), (8, 4, 2)])
def test_a_prefix_read_from_the_ranks_own_cache_alone(
    degrees: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads of other ranks, and rows of other data-parallel ranks, are taken to be one's own."""
    good = served((8, 4), degrees, prompt="pieces")

    def own(layer: ShardedLayer, rank: int, row: int, head: int) -> tuple[int, int]:
        cached = layer.decode.layout.kv_part(layer.decode.part(rank))
        return rank, cached.index(head) if head in cached else 0

    monkeypatch.setattr(golden.sharding.prior, "_holder", own)
    assert good.wrong_ranks() == set(range(degrees[0]))
