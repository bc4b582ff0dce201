"""Where each kind of cache puts its tokens, by the published numbers, and what it refuses."""

from typing import Any

import pytest
import torch
from impl_layers import KV_HEADS, WIDTH, model

from impl import ConfigError, KVCacheManager, ShapeError, UnsupportedError
from impl.kv_cache import kernel_cache_slots, layer_kinds, slot_mapping
from impl.kv_cache.paged import block_tiles
from impl.slot_positions import ChunkSlots, ContiguousSlots, RollingSlots

PAGES = {"is_block_kv_layout": True, "pa_num_blocks": 6, "pa_block_size": 4}


def manager(
    run: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    **options: Any,
) -> KVCacheManager:
    fields = {"seq_len": 16, "batch_size": 1, **(run or {})}
    return KVCacheManager(model(run=fields, **(config or {})), **options)


def numbered(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys that are their position plus 1 in every element, and values ten times that."""
    rows = (positions + 1.0).double()[:, None, :, None].expand(-1, KV_HEADS, -1, WIDTH)
    return rows, 10 * rows


def written(made: KVCacheManager, positions: list[list[int]], **call: Any) -> torch.Tensor:
    """What the stored values hold after a step, as positions; -1 for a slot never written."""
    at = torch.tensor(positions)
    _, v = made.update_kv_by_layer_id(0, position_ids=at, kv_per_layer=numbered(at), **call)
    (unique,) = {tuple(v.shape[-1:])}
    assert unique == (WIDTH,)
    return (v[..., 0] / 10 - 1).to(torch.int64)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (1, [0, -1, -1]),
        (2, [0, 1, -1]),
        (3, [0, 1, 2]),
        (4, [3, 1, 2]),
        (5, [3, 4, 2]),
        (10, [9, 7, 8]),
    ],
)
def test_a_window_of_four_after_a_prompt(prompt: int, expected: list[int]) -> None:
    made = manager(config={"sliding_window": 4})
    assert written(made, [list(range(prompt))])[0, 0].tolist() == expected
    padded = [*range(prompt), -1, -1]
    assert written(made, [padded])[0, 0].tolist() == expected


def test_a_window_of_four_with_three_drafts_has_five_slots() -> None:
    made = manager(run={"speculation_length": 3}, config={"sliding_window": 4})
    assert written(made, [list(range(6))])[0, 0].tolist() == [5, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("last", "expected"),
    [(0, [0, -1, -1, -1]), (3, [0, 1, 2, 3]), (4, [4, -1, -1, -1]), (6, [4, 5, 6, -1])],
)
def test_a_chunk_of_four_after_a_prompt(last: int, expected: list[int]) -> None:
    made = manager(config={"attention_chunk_size": 4})
    assert written(made, [list(range(last + 1))])[0, 0].tolist() == expected


def test_token_t_of_flash_decoding_is_on_core_t_mod_g_at_slot_t_div_g() -> None:
    config, run = {"num_cores_per_group": 3}, {"flash_decoding_enabled": True, "seq_len": 8}
    cores = [manager(run, config, core=core) for core in range(3)]
    held = [written(core, [list(range(7))])[0, 0].tolist() for core in cores]
    assert held == [[0, 3, 6], [1, 4, -1], [2, 5, -1]]
    group = manager(run, config)
    assert written(group, [list(range(7))])[0, 0].tolist() == [0, 3, 6, 1, 4, -1, 2, 5, -1]
    with pytest.raises(IndexError, match="out of bounds"):
        written(group, [[9]])


def test_left_padding_appends_and_idle_rows_stay() -> None:
    made = manager(run={"padding_side": "left", "seq_len": 4, "batch_size": 2})
    at = torch.tensor([[-1, 0, 1], [0, 1, 2]])
    made.write_kv_by_layer_id(0, position_ids=at, kv_per_layer=numbered(at))
    after = written(made, [[2], [-1]])
    # The slot left of the first token holds padding, which no mask shows.
    assert after[0, 0].tolist() == [-1, 0, 1, 2]
    assert after[1, 0].tolist() == [-1, 0, 1, 2]
    k, _ = made.get_kv_by_layer_id(0, 2)
    assert torch.equal(k[:, 0, :, 0], torch.tensor([[1.0, 2.0], [2.0, 3.0]]).double())


def test_the_slot_mapping_is_the_block_times_its_size_plus_the_offset() -> None:
    table = torch.tensor([[5, 0, 3], [2, -1, -1]])
    at = torch.tensor([[0, 3, 4, 7, 8, -1], [1, 2, 3, 4, -1, -1]])
    assert slot_mapping(table, at, 4).tolist() == [[20, 23, 0, 3, 12, -1], [9, 10, 11, -1, -1, -1]]
    with pytest.raises(RuntimeError, match="out of bounds"):
        slot_mapping(table, torch.tensor([[12], [0]]), 4)


@pytest.mark.parametrize("layout", ["is_prefix_caching", "is_chunked_prefill"])
def test_a_paged_cache_writes_through_table_or_mapping_and_padding_nowhere(layout: str) -> None:
    made = manager(run={**PAGES, layout: True})
    table, at = torch.tensor([[5, 0, 3, -1]]), [[0, 1, 2, 3, 4, -1]]
    by_table = written(made, at, active_block_table=table)
    mapping = slot_mapping(table, torch.tensor(at), 4)
    assert torch.equal(by_table, written(made, at, scatter_index=mapping))
    blocks = by_table if layout == "is_chunked_prefill" else by_table.flatten(1, -2).transpose(1, 2)
    held = blocks[:, 0].tolist()
    assert held[5] == [0, 1, 2, 3]
    assert held[0] == [4, -1, -1, -1]
    assert all(slots == [-1] * 4 for i, slots in enumerate(held) if i not in (0, 5))


def test_paged_storage_has_the_published_shapes() -> None:
    def shape(**run: Any) -> tuple[int, ...]:
        return tuple(manager(run={**PAGES, **run}).past_key_values[0].shape)

    assert shape(is_chunked_prefill=True) == (6, KV_HEADS, 4, WIDTH)
    assert shape(is_prefix_caching=True, seq_len=128 * 4) == (7, 4, KV_HEADS, WIDTH)
    tiled = shape(is_prefix_caching=True, seq_len=16 * 64, pa_block_size=16)
    assert tiled == (7, 2, 8, KV_HEADS, WIDTH)


@pytest.mark.parametrize(
    ("block", "blocks", "tiles"), [(32, 128, 1), (32, 64, 2), (32, 5, 32), (16, 4, 1), (16, 200, 1)]
)
def test_blocks_are_tiled_to_128_rows_and_never_emptied(
    block: int, blocks: int, tiles: int
) -> None:
    assert block_tiles(block, blocks) == tiles
    assert block // tiles > 0


def test_transposed_tiled_and_bucketed_storage() -> None:
    (k, v) = manager(run={"k_cache_transposed": True}).past_key_values
    assert k.shape == (1, KV_HEADS, WIDTH, 16)
    assert v.shape == (1, KV_HEADS, 16, WIDTH)
    (k, v) = manager(run={"kv_cache_tiling": True, "seq_len": 512}).past_key_values
    assert k.shape == v.shape == (1, KV_HEADS, 128, 4, WIDTH)
    run = {"attn_block_tkg_nki_kernel_cascaded_attention": True}
    (k, _) = manager(run=run, config={"sliding_window": 4}).past_key_values
    assert k.shape[2] == 128
    assert [kernel_cache_slots(n) for n in (11, 127, 128, 130)] == [128, 128, 256, 256]


def test_tiling_is_storage_only() -> None:
    tiled = manager(run={"kv_cache_tiling": True, "seq_len": 256})
    flat = manager(run={"seq_len": 256})
    at = torch.arange(200)[None]
    for made in (tiled, flat):
        made.store(0, made.update_kv_by_layer_id(0, position_ids=at, kv_per_layer=numbered(at)))
    for a, b in zip(tiled.get_kv_by_layer_id(0, 130), flat.get_kv_by_layer_id(0, 130), strict=True):
        assert torch.equal(a, b)


def test_each_kind_of_layer_has_its_own_cache() -> None:
    kinds = ["sliding_attention", "full_attention", "chunked_attention", "full_attention"]
    made = manager(
        run={"k_cache_transposed": True},
        config={
            "layer_types": kinds,
            "num_hidden_layers": 4,
            "sliding_window": 4,
            "attention_chunk_size": 8,
        },
    )
    layouts = [made.layout(idx) for idx in range(4)]
    assert layouts == [RollingSlots(3), ContiguousSlots(), ChunkSlots(8), ContiguousSlots()]
    shapes = [tuple(made.past_key_values[2 * idx].shape[2:]) for idx in range(4)]
    assert shapes == [(3, WIDTH), (WIDTH, 16), (WIDTH, 8), (WIDTH, 16)]
    at = torch.arange(10)[None]
    updated = made.update_cache(True, None, at, [numbered(at)] * 4)
    assert [tuple(stored.shape) for stored in updated] == [
        tuple(stored.shape) for stored in made.past_key_values
    ]


@pytest.mark.parametrize("ids", [[2, -1], [2, 7], [2, 3]])
def test_an_id_without_a_line_writes_nothing_and_is_idle(ids: list[int]) -> None:
    made = manager(run={"batch_size": 3, "is_continuous_batching": True})
    seq_ids = torch.tensor(ids)
    after = written(made, [[0, 1], [0, 1]], seq_ids=seq_ids)
    assert after[2, 0, :3].tolist() == [0, 1, -1]
    assert (after[:2] == -1).all()
    seated = made.seated(torch.tensor([[4], [9]]), seq_ids)
    assert seated.tolist() == [[4], [-1]]


def test_a_batch_smaller_than_the_cache_leaves_other_lines_alone() -> None:
    made = manager(run={"batch_size": 1, "max_batch_size": 3})
    after = written(made, [[0, 1]])
    assert after[0, 0, :2].tolist() == [0, 1]
    assert (after[1:] == -1).all()


def test_data_parallel_ranks_own_ranges_of_ids() -> None:
    run = {
        "attention_dp_degree": 2,
        "tp_degree": 4,
        "is_continuous_batching": True,
        "batch_size": 4,
    }
    ids, at = torch.tensor([3, 0, 2, 1]), [[0], [1], [2], [3]]
    held = [
        written(manager(run, dp_rank=rank, num_kv_head=KV_HEADS), at, seq_ids=ids)[:, 0]
        for rank in range(2)
    ]
    assert held[0][:, :4].tolist() == [[-1, 1, -1, -1], [-1, -1, -1, 3]]
    assert held[1][:, :4].tolist() == [[-1, -1, 2, -1], [0, -1, -1, -1]]


def test_slots_given_by_the_caller_replace_those_of_positions() -> None:
    made = manager()
    after = written(made, [[7, 8, 8, -1]], scatter_index=torch.tensor([[3, -1, 1, 5]]))
    assert after[0, 0, :8].tolist() == [-1, 8, -1, 7, -1, -1, -1, -1]


LEFT = {"padding_side": "left"}
REFUSED: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
    (
        {"speculation_length": 4},
        {"attention_chunk_size": 4},
        UnsupportedError,
        "speculation_length must be at most 1 with attention chunks, got 4",
    ),
    ({**LEFT, "speculation_length": 2}, {}, UnsupportedError, "speculation_length must be at most"),
    ({**LEFT, **PAGES}, {}, UnsupportedError, 'padding_side must be "right"'),
    (
        {**LEFT, "flash_decoding_enabled": True},
        {},
        UnsupportedError,
        'padding_side must be "right"',
    ),
    ({**PAGES, "flash_decoding_enabled": True}, {}, UnsupportedError, "flash_decoding_enabled"),
    (
        {**PAGES, "is_prefix_caching": True, "is_chunked_prefill": True},
        {},
        UnsupportedError,
        "is_prefix_caching must be False when is_chunked_prefill",
    ),
    ({**PAGES, "kv_cache_tiling": True}, {}, UnsupportedError, "kv_cache_tiling must be False"),
    (
        {"k_cache_transposed": True, "kv_cache_tiling": True},
        {},
        UnsupportedError,
        "kv_cache_tiling must be False",
    ),
    ({"kv_cache_tiling": True}, {}, UnsupportedError, "max_length must be a multiple of 128"),
    ({"is_block_kv_layout": True}, {}, ConfigError, "pa_num_blocks and pa_block_size"),
    ({"tp_degree": 2}, {}, ConfigError, "num_kv_head must be given when tp_degree is 2"),
    ({}, {"layer_types": ["sliding_attention"]}, ConfigError, "sliding_window must be given"),
    ({}, {"layer_types": ["chunked_attention"]}, ConfigError, "attention_chunk_size must be"),
    ({}, {"layer_types": ["linear_attention"]}, ConfigError, "layer_types must be among"),
    ({}, {"sliding_window": 4, "attention_chunk_size": 4}, ConfigError, "layer_types must be"),
]


@pytest.mark.parametrize(
    ("run", "config", "error", "words"), REFUSED, ids=[refused[3] for refused in REFUSED]
)
def test_caches_that_cannot_be_are_refused(
    run: dict[str, Any], config: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        manager(run, config)


@pytest.mark.parametrize(
    ("run", "call", "error", "words"),
    [
        (PAGES, {}, ShapeError, "active_block_table must be integers"),
        ({}, {"active_block_table": torch.zeros(1, 2).long()}, ShapeError, "without blocks"),
        (
            {"padding_side": "left"},
            {"scatter_index": torch.zeros(1, 2).long()},
            UnsupportedError,
            "its tokens are appended",
        ),
        ({}, {"positions": [[0, 1]] * 2}, ShapeError, "seq_ids must be given for a batch above 1"),
    ],
)
def test_unfit_addresses_are_refused(
    run: dict[str, Any], call: dict[str, Any], error: type[Exception], words: str
) -> None:
    positions = call.pop("positions", [[0, 1]])
    with pytest.raises(error, match=words):
        written(manager(run), positions, **call)


def test_a_table_is_refused_when_reading_what_has_no_blocks() -> None:
    with pytest.raises(ShapeError, match="without blocks"):
        manager().get_kv_by_layer_id(0, active_block_table=torch.zeros(1, 2).long())
    with pytest.raises(ShapeError, match="active_block_table must be integers"):
        manager(PAGES).get_kv_by_layer_id(0)
    with pytest.raises(ConfigError, match=r"dp_rank must be in 0\.\.0"):
        manager(dp_rank=1)


def test_layers_without_types_are_alike() -> None:
    assert layer_kinds(model(num_hidden_layers=2)) == ("full_attention",) * 2
    assert layer_kinds(model(sliding_window=4)) == ("sliding_attention",)
    assert layer_kinds(model(attention_chunk_size=4)) == ("chunked_attention",)
