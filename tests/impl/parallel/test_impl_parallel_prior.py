"""Prefill over what ranks have cached, and packed rows, give what one rank does."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from impl_layers import ROUNDOFF, positions, relative_error, tokens
from parallel_layers import build, checkpoint
from thread_ranks import on_ranks
from torch import Tensor

from impl import KVCacheManager, NeuronAttentionBase, ShapeError
from impl.kv_cache import slot_mapping
from impl.parallel import strided
from impl.parallel.prior import prior_plan
from impl.parallel.rank_maps import rank_maps

TOTAL, PIECE, BATCH = 60, 20, 4
WINDOWS = {"windowed_context_encoding_size": PIECE, "seq_len": TOTAL}
MESHES: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "tensor": ((6, 2), {"tp_degree": 4}),
    "context, shared weights": ((8, 2), {"tp_degree": 4, "cp_degree": 2, "attention_dp_degree": 2}),
    "context, heads apart": ((8, 4), {"tp_degree": 4, "cp_degree": 2}),
    "context, rows and heads apart": (
        (8, 4),
        {"tp_degree": 8, "cp_degree": 4, "attention_dp_degree": 2},
    ),
    "data": ((8, 2), {"tp_degree": 4, "attention_dp_degree": 2}),
    "sequence": ((8, 2), {"tp_degree": 4, "cp_degree": 2, "sequence_parallel_enabled": True}),
    "strided": (
        (6, 2),
        {
            "tp_degree": 4,
            "cp_degree": 2,
            "strided_context_parallel_kernel_enabled": True,
            "logical_nc_config": 2,
        },
    ),
    "cores": ((4, 1), {"tp_degree": 2, "flash_decoding_enabled": True}),
}
FEATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"sliding_window": 5},
    "chunk": {"attention_chunk_size": 12},
}


def given(made: NeuronAttentionBase, x: Tensor) -> Tensor:
    """What a rank is handed of whole hidden states, and hands back."""
    run, stage = made.neuron_config, made.parallel.prefill.stage
    if run.strided_context_parallel_kernel_enabled:
        return strided(x, 1, run.cp_degree)
    if not run.sequence_parallel_enabled:
        return x
    piece = x.shape[1] // run.tp_degree
    return x.narrow(1, (stage.split.rank * stage.tp.size + stage.tp.rank) * piece, piece)


def emptied(made: NeuronAttentionBase, cores: int = 1) -> KVCacheManager:
    """A rank's cache, full of NaN."""
    manager = made.parallel.make_cache(replace(made.config, num_cores_per_group=cores))
    for stored in manager.past_key_values:
        stored.fill_(float("nan"))
    return manager


def prompt() -> tuple[Tensor, Tensor]:
    hidden, at = tokens(TOTAL, BATCH), positions(TOTAL, batch=BATCH).clone()
    at[1, PIECE + 3 :] = -1  # ends within the second piece
    return hidden, at


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("mesh", MESHES)
def test_pieces_of_a_prompt_are_the_whole(mesh: str, feature: str) -> None:
    (heads, kv), run = MESHES[mesh]
    if feature != "full" and mesh in ("strided", "cores"):
        pytest.skip("refused")
    if feature == "chunk" and "attention_dp_degree" in run:
        pytest.skip("refused")
    state = checkpoint(heads, kv, bias=True, sinks=feature != "chunk" and heads % 4 == 0)
    cores = 2 if mesh == "cores" else 1
    features = {**FEATURES[feature], "num_cores_per_group": cores}
    hidden, at = prompt()
    alone = build(heads, kv, {"seq_len": TOTAL}, state, **FEATURES[feature])
    whole = alone(hidden, at >= 0, at).hidden_states

    def serve(_: int) -> list[tuple[Tensor, Tensor]]:
        made = build(heads, kv, {**WINDOWS, **run}, state, **features)
        manager, found = emptied(made, cores), []
        for idx, start in enumerate(range(0, TOTAL, PIECE)):
            now = slice(start, start + PIECE)
            places = at[:, now]
            if mesh == "strided":
                places = strided(places, 1, made.cp_degree)
            output = made(
                given(made, hidden[:, now]),
                position_ids=places,
                kv_mgr=manager,
                get_kv_per_layer=idx > 0,
                update_kv_per_layer=True,
                idx=0,
                windowed_context_encoding_window_idx=idx,
            )
            manager.store(0, output.present_key_value)
            real = given(made, at[:, now] >= 0)
            found.append((output.hidden_states[real], given(made, whole[:, now])[real]))
        return found

    for pieces in on_ranks(run["tp_degree"], serve):
        for got, expected in pieces:
            if expected.numel():
                assert relative_error(got, expected) <= ROUNDOFF


def test_a_window_is_as_long_as_all_ranks_tokens_together() -> None:
    (heads, kv), run = MESHES["sequence"]
    state = checkpoint(heads, kv)
    hidden = tokens(PIECE + 4, BATCH)

    def serve(_: int) -> None:
        made = build(heads, kv, {**WINDOWS, **run}, state)
        call = {"windowed_context_encoding_window_idx": 0}
        assert given(made, hidden).shape[1] == (PIECE + 4) // 4
        with pytest.raises(ShapeError, match=f"at most .* = {PIECE} tokens .*, got {PIECE + 4}"):
            made(given(made, hidden), **call)
        made(given(made, hidden[:, :PIECE]), **call)

    on_ranks(run["tp_degree"], serve)


WRITTEN = ("context, heads apart", "sequence", "strided")


@pytest.mark.parametrize("mesh", WRITTEN)
def test_each_token_of_a_prompt_is_written_where_scatter_index_says(mesh: str) -> None:
    (heads, kv), run = MESHES[mesh]
    state = checkpoint(heads, kv)
    hidden, at = (x[:, :PIECE] for x in prompt())
    at = at.clone()
    at[2, 7:] = -1
    generator = torch.Generator().manual_seed(1)
    slots = torch.stack([torch.randperm(TOTAL, generator=generator)[:PIECE] for _ in range(BATCH)])

    def serve(_: int) -> None:
        made = build(heads, kv, {"seq_len": TOTAL, **run}, state)

        def put(x: Tensor) -> Tensor:  # as the caller has every argument of a prefill
            return strided(x, 1, made.cp_degree) if mesh == "strided" else x

        given_step = (given(made, hidden), put(at >= 0), put(at))
        k, v = made(*given_step).present_key_value
        manager = emptied(made)
        output = made(
            *given_step,
            kv_mgr=manager,
            update_kv_per_layer=True,
            idx=0,
            scatter_index=put(slots),
        )
        for cached, new in zip(output.present_key_value, (k, v), strict=True):
            expected = torch.full_like(cached, float("nan"))
            for row, token in (at >= 0).nonzero().tolist():
                expected[row, :, slots[row, token]] = new[row, :, token]
            torch.testing.assert_close(cached, expected, rtol=0, atol=0, equal_nan=True)

    on_ranks(run["tp_degree"], serve)


IDS = [[5], [2, 7], [6, 1, 3]]


@pytest.mark.parametrize("ids", IDS, ids=str)
@pytest.mark.parametrize("mesh", ["data", "context, rows and heads apart"])
def test_a_sequence_is_read_from_the_rank_that_keeps_it(mesh: str, ids: list[int]) -> None:
    """Continuous batching: prefill of some sequences, in pieces; then all decode."""
    (heads, kv), run = MESHES[mesh]
    state, size = checkpoint(heads, kv), len(ids)
    hidden, at = tokens(TOTAL, size), positions(TOTAL, batch=size)
    whole = build(heads, kv, {"seq_len": TOTAL}, state)(hidden, at >= 0, at).hidden_states
    run = {**WINDOWS, **run, "batch_size": 8}

    def serve(_: int) -> Tensor:
        made = build(heads, kv, run, state)
        manager, found = emptied(made), []
        for idx, start in enumerate((0, PIECE)):
            now = slice(start, start + PIECE)
            output = made(
                hidden[:, now],
                position_ids=at[:, now],
                kv_mgr=manager,
                get_kv_per_layer=idx > 0,
                update_kv_per_layer=True,
                idx=0,
                seq_ids=torch.tensor(ids),
                windowed_context_encoding_window_idx=idx,
            )
            manager.store(0, output.present_key_value)
            found.append(output.hidden_states)
        return torch.cat(found, dim=1)

    for got in on_ranks(run["tp_degree"], serve):
        assert relative_error(got, whole[:, : 2 * PIECE]) <= ROUNDOFF


def test_a_prefix_handed_over_is_this_ranks_rows_in_order() -> None:
    (heads, kv), run = MESHES["context, rows and heads apart"]
    run = {"is_prefix_caching": True, "seq_len": 256, **run}
    state, prefix, rest = checkpoint(heads, kv, sinks=True), 5, 128
    hidden, at = tokens(prefix + rest, BATCH), positions(prefix + rest, batch=BATCH)
    alone = build(heads, kv, {"seq_len": 256}, state)(hidden, at >= 0, at)
    masked = torch.ones(BATCH, prefix, dtype=torch.bool)

    def serve(_: int) -> Tensor:
        made = build(heads, kv, run, state)
        rows = made.parallel.decode.rows
        mine = list(made.parallel.decode_heads.key_value)
        past = tuple(rows(x)[:, mine, :prefix] for x in alone.present_key_value)
        call: dict[str, Any] = {"position_ids": at[:, prefix:], "past_key_value": past}
        everything = tuple(x[:, :, :prefix] for x in alone.present_key_value)
        with pytest.raises(ShapeError, match=r"past_key_value\[0\] must have shape \(2, 1, 5, 8\)"):
            made(hidden[:, prefix:], **{**call, "past_key_value": everything})
        output: Tensor = made(hidden[:, prefix:], masked, **call).hidden_states
        return output

    for got in on_ranks(8, serve):
        assert relative_error(got, alone.hidden_states[:, prefix:]) <= ROUNDOFF


PAGES = {
    "is_chunked_prefill": True,
    "is_block_kv_layout": True,
    "pa_num_blocks": 24,
    "pa_block_size": 4,
    "seq_len": TOTAL,
}
TABLES = torch.randperm(24, generator=torch.Generator().manual_seed(0)).view(4, 6)
STEPS = ([5, 0, 7, 2], [1, 7, 3, 1], [1, 1, 1, 1], [3, 0, 0, 6])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "cores"])
def test_packed_rows_give_each_sequence_what_it_gets_alone(mesh: str, window: int | None) -> None:
    (heads, kv), run = MESHES[mesh]
    if window is not None and mesh == "strided":
        pytest.skip("refused")
    state = checkpoint(heads, kv, bias=True, sinks=heads % 4 == 0)
    hidden, at = tokens(TOTAL, BATCH), positions(TOTAL, batch=BATCH)
    alone = build(heads, kv, {"seq_len": TOTAL}, state, sliding_window=window)
    whole = alone(hidden, at >= 0, at).hidden_states

    def serve(_: int) -> list[tuple[Tensor, Tensor]]:
        made = build(heads, kv, {**PAGES, **run}, state, sliding_window=window)
        manager, found, done = emptied(made), [], [0] * BATCH
        for new in STEPS:
            spans = [slice(c, c + n) for n, c in zip(new, done, strict=True)]
            row = torch.cat([hidden[s, span] for s, span in enumerate(spans)])[None]
            expected = torch.cat([whole[s, span] for s, span in enumerate(spans)])[None]
            pad = (0, 0, 0, 16 - row.shape[1])
            output = made(
                given(made, torch.nn.functional.pad(row, pad)),
                kv_mgr=manager,
                get_kv_per_layer=True,
                update_kv_per_layer=True,
                idx=0,
                active_block_table=TABLES,
                num_queries=torch.tensor(new),
                computed_context_lens=torch.tensor(done),
            )
            manager.store(0, output.present_key_value)
            real = given(made, torch.arange(16)[None] < row.shape[1])
            want = given(made, torch.nn.functional.pad(expected, pad))
            found.append((output.hidden_states[real], want[real]))
            done = [span.stop for span in spans]
        return found

    for rows in on_ranks(run["tp_degree"], serve):
        for got, want in rows:
            if want.numel():
                assert relative_error(got, want) <= ROUNDOFF


@pytest.mark.parametrize("mesh", WRITTEN)
def test_slots_of_a_packed_row_are_the_ones_its_tables_give(mesh: str) -> None:
    (heads, kv), run = MESHES[mesh]
    state, new = checkpoint(heads, kv), torch.tensor([5, 1, 7, 2])
    seen = [2, 0, 3, 9]
    places = torch.cat([torch.arange(c, c + n) for n, c in zip(new.tolist(), seen, strict=True)])
    tables = TABLES.repeat_interleave(new, 0)
    slots = slot_mapping(tables, places[:, None], PAGES["pa_block_size"]).T
    slots = torch.nn.functional.pad(slots, (0, 16 - slots.shape[1]), value=-1)

    def serve(_: int) -> None:
        made = build(heads, kv, {**PAGES, **run}, state)

        def written(**more: Tensor) -> tuple[Tensor, Tensor]:
            manager = made.parallel.make_cache(made.config)
            found: tuple[Tensor, Tensor] = made(
                given(made, tokens(16, 1)),
                kv_mgr=manager,
                get_kv_per_layer=True,
                update_kv_per_layer=True,
                idx=0,
                active_block_table=TABLES,
                num_queries=new,
                computed_context_lens=torch.tensor(seen),
                **more,
            ).present_key_value
            return found

        put = strided(slots, 1, made.cp_degree) if mesh == "strided" else slots
        for by_slot, by_table in zip(written(scatter_index=put), written(), strict=True):
            assert torch.equal(by_slot, by_table)

    on_ranks(run["tp_degree"], serve)


def test_data_parallel_ranks_decode_from_blocks_of_their_own_rows() -> None:
    (heads, kv), run = MESHES["data"]
    state, pages = checkpoint(heads, kv), {**PAGES, "is_chunked_prefill": False}
    hidden, at = tokens(10, BATCH), positions(10, batch=BATCH)
    whole = build(heads, kv, {"seq_len": TOTAL}, state)(hidden, at >= 0, at).hidden_states

    def serve(_: int) -> Tensor:
        made = build(heads, kv, {**pages, **run}, state)
        manager = emptied(made)
        for now in (slice(0, 9), slice(9, 10)):
            output = made(
                hidden[:, now],
                position_ids=at[:, now],
                attention_mask=None if now.start else at[:, now] >= 0,
                kv_mgr=manager,
                get_kv_per_layer=now.start > 0,
                update_kv_per_layer=True,
                idx=0,
                active_block_table=TABLES,
            )
            manager.store(0, output.present_key_value)
        last: Tensor = output.hidden_states
        return last

    for got in on_ranks(4, serve):
        assert relative_error(got, whole[:, 9:]) <= ROUNDOFF


def test_packed_rows_are_written_to_blocks_only() -> None:
    made = build(6, 2, {"is_chunked_prefill": True}, checkpoint(6, 2))
    call = {"num_queries": torch.tensor([3]), "computed_context_lens": torch.tensor([0])}
    call |= {"kv_mgr": made.parallel.make_cache(made.config), "idx": 0}
    with pytest.raises(ShapeError, match="active_block_table must be given"):
        made(tokens(3, 1), update_kv_per_layer=True, **call)


@pytest.mark.parametrize(
    ("degrees", "kv", "exchange"),
    [
        ((4, 1, 1), 2, "none"),
        ((8, 4, 1), 2, "none"),
        ((4, 2, 1), 4, "prefill"),
        ((8, 4, 2), 4, "prefill"),
        ((4, 2, 2), 2, "prefill"),
        ((4, 1, 2), 2, "decode"),
        ((64, 8, 8), 8, "prefill"),
    ],
    ids=str,
)
def test_the_fewest_ranks_that_suffice_exchange_their_caches(
    degrees: tuple[int, int, int], kv: int, exchange: str
) -> None:
    world, cp, dp = degrees
    maps = rank_maps(world, 8 * kv, kv, cp_degree=cp, dp_degree=dp)
    groups = {
        "none": [(rank,) for rank in range(world)],
        "prefill": maps.prefill.mesh.columns,
        "decode": maps.decode.mesh.columns,
    }[exchange]
    for rank in range(world):
        plan = prior_plan(maps, rank)
        assert plan.exchange == exchange
        group = next(group for group in groups if rank in group)
        for row, sources in enumerate(plan.sources):
            for head, source in zip(maps.prefill.key_value(rank), sources, strict=True):
                assert source is not None
                holder = group[source.member]
                assert maps.decode.mesh.coordinates(holder)[0] == row
                assert maps.decode.key_value(holder)[source.slot] == head
