from typing import Any

import pytest
import torch
from impl_layers import KV_HEADS, WIDTH, model

from impl import AttentionError, KVCacheManager, ShapeError

SLOTS = 8
PADDED = torch.tensor([[2, 3, -1], [0, 5, 7]])


def manager(run: dict[str, Any] | None = None, **fields: Any) -> KVCacheManager:
    return KVCacheManager(model(run={"seq_len": SLOTS, **(run or {})}, **fields))


def new_kv(seq_len: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, KV_HEADS, seq_len, WIDTH)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))


def test_tokens_are_written_at_their_positions_and_nowhere_else() -> None:
    made, (new, new_v) = manager(), new_kv()
    before = torch.randn(2, KV_HEADS, SLOTS, WIDTH, dtype=torch.float64)
    made.store(0, (before, before))
    after, _ = made.update_kv_by_layer_id(0, position_ids=PADDED, kv_per_layer=(new, new_v))
    assert torch.equal(made.past_key_values[0], before)
    for b in range(2):
        for slot in range(SLOTS):
            written = [t for t in range(3) if int(PADDED[b, t]) == slot]
            expected = new[b, :, written[0]] if written else before[b, :, slot]
            assert torch.equal(after[b, :, slot], expected)


@pytest.mark.parametrize("position", [SLOTS, SLOTS + 3])
def test_a_position_past_the_end_is_an_error_on_cpu(position: int) -> None:
    at = torch.tensor([[position], [0]])
    with pytest.raises(IndexError, match="out of bounds"):
        manager().update_kv_by_layer_id(0, position_ids=at, kv_per_layer=new_kv(1))


def test_a_step_of_padding_alone_changes_nothing() -> None:
    made = manager()
    before = torch.randn(2, KV_HEADS, SLOTS, WIDTH, dtype=torch.float64)
    made.store(0, (before, before))
    at = torch.full((2, 3), -1)
    for after in made.update_kv_by_layer_id(0, position_ids=at, kv_per_layer=new_kv()):
        assert torch.equal(after, before)


def test_cache_starts_as_zeros_of_the_configured_shape() -> None:
    made = manager(num_hidden_layers=3)
    assert len(made.past_key_values) == 6
    for cache in made.past_key_values:
        assert torch.equal(cache, torch.zeros(2, KV_HEADS, SLOTS, WIDTH, dtype=torch.float64))
        assert not cache.requires_grad


def test_updates_are_functional_until_stored() -> None:
    made = manager()
    updated = made.update_kv_by_layer_id(0, position_ids=PADDED, kv_per_layer=new_kv())
    assert float(made.past_key_values[0].abs().max()) == 0
    storage = made.past_key_values[0].data_ptr()
    made.store(0, updated)
    for own, new in zip(made.get_kv_by_layer_id(0), updated, strict=True):
        assert torch.equal(own, new)
    assert made.past_key_values[0].data_ptr() == storage
    made.reset()
    assert float(made.past_key_values[0].abs().max()) == 0


def test_layers_do_not_share_slots() -> None:
    made = manager(num_hidden_layers=2)
    made.store(1, made.update_kv_by_layer_id(1, position_ids=PADDED, kv_per_layer=new_kv()))
    assert float(made.get_kv_by_layer_id(0)[0].abs().max()) == 0
    assert float(made.get_kv_by_layer_id(1)[0].abs().max()) > 0


def test_update_cache_returns_keys_and_values_of_all_layers_in_order() -> None:
    made = manager(num_hidden_layers=2)
    both = [new_kv(), tuple(-t for t in new_kv())]
    got = made.update_cache(False, None, PADDED, both)
    expected = [
        t
        for idx, kv in enumerate(both)
        for t in made.update_kv_by_layer_id(idx, position_ids=PADDED, kv_per_layer=kv)
    ]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_buffer_is_written_in_place_of_the_own_cache() -> None:
    made, kv = manager(), new_kv()
    ones = torch.ones(2, KV_HEADS, SLOTS, WIDTH, dtype=torch.float64)
    k, _ = made.update_kv_by_layer_id(
        0, position_ids=PADDED, kv_per_layer=kv, kvcache_buffer=[(ones, ones)]
    )
    plain, _ = made.update_kv_by_layer_id(0, position_ids=PADDED, kv_per_layer=kv)
    written = torch.zeros(2, 1, SLOTS, 1, dtype=torch.bool)
    written[0, 0, [2, 3]] = written[1, 0, [0, 5, 7]] = True
    assert torch.equal(k, torch.where(written, plain, 1.0))
    assert torch.equal(ones, torch.ones_like(ones))


@pytest.mark.parametrize("transposed", [False, True])
def test_reads_are_cut_to_the_bucket(transposed: bool) -> None:
    made = manager(run={"k_cache_transposed": transposed})
    made.store(0, made.update_kv_by_layer_id(0, position_ids=PADDED, kv_per_layer=new_kv()))
    k, v = made.get_kv_by_layer_id(0, 4)
    k = k.transpose(2, 3) if transposed else k
    assert k.shape == v.shape == (2, KV_HEADS, 4, WIDTH)
    assert torch.equal(k[0, :, 2], new_kv()[0][0, :, 0])
    whole_k, whole_v = made.get_cache(4, skip_slice=True)[0]
    assert whole_v.shape[2] == SLOTS
    assert whole_k.numel() == whole_v.numel()


def test_windowed_layers_keep_their_keys_as_rows() -> None:
    kinds = ["sliding_attention", "full_attention"]
    made = manager(
        run={"k_cache_transposed": True}, sliding_window=4, layer_types=kinds, num_hidden_layers=2
    )
    assert [cache.k_transposed for cache in made.caches] == [False, True]
    (alone,) = manager(run={"k_cache_transposed": True}, sliding_window=4).caches
    assert not alone.k_transposed


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"seq_ids": torch.arange(3)}, ShapeError, "seq_ids must be integers"),
        ({"seq_ids": torch.zeros(2)}, ShapeError, "seq_ids must be integers"),
        ({"scatter_index": torch.zeros(2)}, ShapeError, "scatter_index must have shape"),
        ({"medusa_metadata": {}}, AttentionError, "medusa_metadata"),
        ({"position_ids": torch.zeros(2, 3)}, ShapeError, "position_ids must be integers"),
        ({"kv_per_layer": tuple(t.transpose(1, 2) for t in new_kv())}, ShapeError, "is it BHSD"),
        ({"position_ids": PADDED[:1]}, ShapeError, "k must have shape"),
    ],
)
def test_unfit_updates_are_refused(
    given: dict[str, Any], error: type[Exception], words: str
) -> None:
    call = {"position_ids": PADDED, "kv_per_layer": new_kv(), **given}
    with pytest.raises(error, match=words):
        manager().update_kv_by_layer_id(0, **call)
