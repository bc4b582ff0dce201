"""Defects of the public snapshot of NxD Inference's module, and that this one has none of them.

Each test names what goes wrong there. Section numbers of the snapshot's analysis are kept as D1 to
D12, in its order; the two after them are index errors that it reports among its error conditions.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from impl_layers import (
    HEADS,
    KV_HEADS,
    ROUNDOFF,
    WIDTH,
    layer,
    model,
    positions,
    relative_error,
    tokens,
)
from torch import Tensor

import impl
from impl import KVCacheManager, L2Norm, NeuronAttentionBase, RotaryEmbedding
from impl.masks import prior_mask
from impl.parallel.sharding_strategy import (
    GQA,
    determine_sharding_strategy,
    get_shardable_head_counts,
)
from impl.slot_positions import RollingSlots, first_positions, slot_positions
from impl.strategy import Implementation

POLAR = {"use_polar_compatible_rope": True}
DOUBLE = torch.float64


def rope() -> dict[str, Any]:
    return {"rotary_emb": RotaryEmbedding(WIDTH)}


def prefix_step(made: NeuronAttentionBase, prefix: int, seq_len: int, **call: Any) -> Tensor:
    """Prefill the tokens after a prefix that is cached; the layer caches prefixes."""
    hidden, at = tokens(seq_len), positions(seq_len)
    k, v = made(hidden, at >= 0, at).present_key_value
    k, v = k[:, :, :prefix], v[:, :, :prefix]
    if made.k_cache_transposed:
        k = k.transpose(2, 3)
    output = made(hidden[:, prefix:], position_ids=at[:, prefix:], past_key_value=(k, v), **call)
    return output.hidden_states  # type: ignore[no-any-return]


def whole(made: NeuronAttentionBase, prefix: int, seq_len: int) -> Tensor:
    at = positions(seq_len)
    return made(tokens(seq_len), at >= 0, at).hidden_states[:, prefix:]  # type: ignore[no-any-return]


def test_d1_polar_rope_is_not_lost_in_a_windowed_layer() -> None:
    windowed = layer(rope_theta=1e4, sliding_window=20)
    full, nope = layer(rope_theta=1e4), layer(sliding_window=20)
    at = positions(9)
    got = windowed(tokens(9), at >= 0, at, **POLAR).hidden_states
    assert torch.equal(got, full(tokens(9), at >= 0, at, **POLAR).hidden_states)
    assert relative_error(got, nope(tokens(9), at >= 0, at).hidden_states) > 0.01


@pytest.mark.parametrize(
    ("ranks", "heads", "kv_heads", "padded"),
    [(4, 6, 3, (8, 8)), (6, 12, 4, (12, 12)), (32, 40, 10, (64, 64)), (16, 40, 10, (48, 48))],
)
def test_d2_conversion_to_mha_counts_the_replicated_heads(
    ranks: int, heads: int, kv_heads: int, padded: tuple[int, int]
) -> None:
    strategy = determine_sharding_strategy(ranks, kv_heads)
    assert strategy is GQA.CONVERT_TO_MHA
    assert get_shardable_head_counts(ranks, heads, kv_heads, strategy) == padded


def test_d3_sinks_count_in_prefill_over_a_prefix() -> None:
    made = layer(run={"is_prefix_caching": True, "seq_len": 256}, learned_sinks_size=1, **rope())
    before = prefix_step(made, 6, 6 + 128)
    assert relative_error(before, whole(made, 6, 6 + 128)) <= ROUNDOFF
    made.learned_sinks.sink.add_(2.0)
    after = prefix_step(made, 6, 6 + 128)
    assert relative_error(after, before) > 0.01
    assert relative_error(after, whole(made, 6, 6 + 128)) <= ROUNDOFF


def test_d3_validity_of_the_prefix_counts_in_prefill() -> None:
    made = layer(run={"is_prefix_caching": True, "seq_len": 256}, **rope())
    valid = torch.ones(2, 6, dtype=torch.int64)
    everything = prefix_step(made, 6, 6 + 128, attention_mask=valid)
    valid[0, :3] = 0
    some = prefix_step(made, 6, 6 + 128, attention_mask=valid)
    assert relative_error(some[0], everything[0]) > 0.01
    assert torch.equal(some[1], everything[1])


def test_d3_the_window_counts_in_prefill_over_a_prefix() -> None:
    made = layer(run={"is_prefix_caching": True, "seq_len": 256}, sliding_window=3, **rope())
    got = prefix_step(made, 6, 6 + 128)
    assert relative_error(got, whole(made, 6, 6 + 128)) <= ROUNDOFF
    full = layer(run={"is_prefix_caching": True, "seq_len": 256}, **rope())
    assert relative_error(got, prefix_step(full, 6, 6 + 128)) > 0.01


def test_d3_a_transposed_prefix_has_as_many_keys_as_values() -> None:
    run = {"is_prefix_caching": True, "seq_len": 256, "k_cache_transposed": True}
    made = layer(run=run, **rope())
    assert relative_error(prefix_step(made, 5, 5 + 128), whole(made, 5, 5 + 128)) <= ROUNDOFF


@pytest.mark.parametrize("window", [None, 7, 200])
def test_d4_the_flash_kernel_keeps_the_layout_of_a_prefix_prefill(window: int | None) -> None:
    run = {"is_prefix_caching": True, "seq_len": 1024}
    features = {"sliding_window": window, "learned_sinks_size": 1, **rope()}
    kernel = layer(run={**run, "attn_kernel_enabled": True}, **features)
    choice = kernel.kernel_choice(512, has_attention_mask=False, prior=True)
    assert choice.implementation is Implementation.FLASH
    native = layer(run={**run, "attn_kernel_enabled": False}, **features)
    expected = prefix_step(native, 9, 9 + 512)
    assert relative_error(prefix_step(kernel, 9, 9 + 512), expected) <= ROUNDOFF


def test_d5_transposed_keys_and_windows_agree_on_the_layout() -> None:
    run = {"k_cache_transposed": True}
    config = model(
        run=run,
        num_hidden_layers=2,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
    )
    manager = KVCacheManager(config)
    hidden, at = tokens(9), positions(9)
    for idx, window in enumerate((5, None)):
        made = layer(config=config, sliding_window=window, **rope())
        expected = made(hidden, at >= 0, at).hidden_states
        call = {"kv_mgr": manager, "update_kv_per_layer": True, "idx": idx}
        prompt = made(hidden[:, :8], at[:, :8] >= 0, at[:, :8], **call)
        manager.store(idx, prompt.present_key_value)
        got = made(hidden[:, 8:], position_ids=at[:, 8:], get_kv_per_layer=True, **call)
        assert relative_error(got.hidden_states, expected[:, 8:]) <= ROUNDOFF


@pytest.mark.parametrize("eps", [1e-6, 1e-2, 1.0])
def test_d6_the_l2_norm_uses_the_epsilon_it_is_given(eps: float) -> None:
    x = torch.full((1, 4), 1e-3, dtype=DOUBLE)
    expected = 1e-3 / (1e-6 + eps) ** 0.5
    assert float((L2Norm(eps)(x) / expected - 1).abs().max()) < 4 * 2**-53


@pytest.mark.parametrize(("name", "value"), [("factor", 16.0), ("high_freq_factor", 2.0)])
def test_d7_polar_rope_reads_the_scaling_of_the_configuration(name: str, value: float) -> None:
    parameters = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    at = positions(9)
    outputs = [
        layer(config=model(rope_parameters=p), rope_theta=1e4, use_scaled_rope=True)(
            tokens(9), at >= 0, at, **POLAR
        ).hidden_states
        for p in (parameters, {**parameters, name: value})
    ]
    assert not torch.equal(*outputs)


def test_d7_the_temperature_of_layers_without_rope_is_there() -> None:
    tuned = layer(attn_temperature_tuning=True, floor_scale=4, attn_scale=0.5)
    at = positions(9)
    got, plain = (m(tokens(9), at >= 0, at).hidden_states for m in (tuned, layer()))
    assert torch.equal(got[:, :3], plain[:, :3])
    assert relative_error(got[:, 4:], plain[:, 4:]) > 0.01


def test_d8_a_step_does_not_write_into_what_it_is_given() -> None:
    made = layer(learned_sinks_size=1, **rope())
    k, v = (torch.randn(2, KV_HEADS, 8, WIDTH, dtype=DOUBLE) for _ in range(2))
    call = {
        "hidden_states": tokens(3),
        "attention_mask": torch.ones(2, 1, 1, 8, dtype=torch.bool).expand(2, 1, 3, 8),
        "position_ids": positions(3, 4),
        "active_mask": torch.ones(1, 1, 3, 3, dtype=torch.bool).tril(),
        "rotary_position_ids": positions(3, 9),
        "residual": tokens(3, seed=2),
    }
    given = {**call, "k": k, "v": v}
    before = {name: (tensor.clone(), tensor._version) for name, tensor in given.items()}
    made(past_key_value=(k, v), **call)
    for name, (copy, version) in before.items():
        assert torch.equal(given[name], copy)
        assert given[name]._version == version


@pytest.mark.parametrize("features", [{}, {"learned_sinks_size": 1}, {"sliding_window": 3}])
def test_d9_a_row_that_sees_nothing_is_zero_and_not_the_mean(features: dict[str, Any]) -> None:
    made = layer(**features, **rope())
    at = torch.tensor([[-1, -1, 0, 1], [0, 1, 2, -1]])
    prompt = made(tokens(4), at >= 0, at).hidden_states
    assert torch.equal(prompt[at < 0], torch.zeros_like(prompt[at < 0]))
    cache = tuple(torch.randn(2, KV_HEADS, 8, WIDTH, dtype=DOUBLE) for _ in range(2))
    idle = made(tokens(1), position_ids=torch.tensor([[-1], [4]]), past_key_value=cache)
    assert torch.equal(idle.hidden_states[0], torch.zeros_like(idle.hidden_states[0]))
    assert float(idle.hidden_states[1].abs().min()) > 0


def test_d10_every_module_can_be_imported_first() -> None:
    root = Path(impl.__file__).parent
    modules = sorted(
        ".".join(("impl", *path.relative_to(root).with_suffix("").parts))
        for path in root.glob("*.py")
        if path.stem != "__init__"
    )
    # One process: every module is imported where none of the others has been.
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    for loaded in [m for m in sys.modules if m.split('.')[0] == 'impl']:\n"
        "        del sys.modules[loaded]\n"
        "    package = type(sys)('impl')\n"
        f"    package.__path__ = [{str(root)!r}]\n"
        "    sys.modules['impl'] = package\n"
        "    importlib.import_module(name)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_d11_masks_and_the_rolling_cache_count_slots_alike() -> None:
    window = 4
    layout = RollingSlots.of(window)
    for position in range(12):
        at = torch.tensor([[position]])
        held = slot_positions(layout, first_positions(at), window)
        seen = held[0][prior_mask(None, at, held, sliding_window=window)[0, 0, 0]].tolist()
        assert sorted(seen) == list(range(max(position - window + 1, 0), position))
        for p in seen:
            assert int(held[0, p % (window - 1)]) == p


@pytest.mark.parametrize(
    ("features", "call"),
    [
        ({"learned_sinks_size": 1, **rope()}, {}),
        ({"rope_theta": 1e4}, POLAR),
        ({"attention_chunk_size": 6, "rope_theta": 1e4}, POLAR),
        ({"sliding_window": 4, "learned_sinks_size": 1, "rope_theta": 1e4}, POLAR),
    ],
)
def test_d12_windows_of_a_prompt_work_with_sinks_polar_rope_and_chunks(
    features: dict[str, Any], call: dict[str, Any]
) -> None:
    made = layer(run={"windowed_context_encoding_size": 4}, **features)
    hidden, at = tokens(12), positions(12)
    expected = made(hidden, at >= 0, at, **call)
    past = None
    for idx in range(3):
        window = slice(4 * idx, 4 * idx + 4)
        got = made(
            hidden[:, window],
            position_ids=at[:, window],
            past_key_value=past,
            windowed_context_encoding_window_idx=idx,
            **call,
        )
        assert relative_error(got.hidden_states, expected.hidden_states[:, window]) <= ROUNDOFF
        new = got.present_key_value
        past = (
            new if past is None else tuple(torch.cat(p, dim=2) for p in zip(past, new, strict=True))
        )


@pytest.mark.parametrize("polar", [False, True])
def test_positions_beyond_any_table_are_rotated(polar: bool) -> None:
    made = layer(run={"seq_len": 4}, rope_theta=1e4, **rope())
    at = positions(3, 1_000_000)
    got = made(tokens(3), at >= 0, at, use_polar_compatible_rope=polar).hidden_states
    near = made(tokens(3), use_polar_compatible_rope=polar, attention_mask=at >= 0).hidden_states
    # Scores depend on distance alone; an angle of 1e6 rad is exact to 1e6 u.
    assert relative_error(got, near) <= 1e6 * 2**-53 * HEADS * WIDTH


@pytest.mark.parametrize("prompt", [1, 2, 6])
def test_a_prompt_shorter_than_the_window_fills_a_rolling_cache(prompt: int) -> None:
    config = model(sliding_window=8)
    made, manager = layer(config=config, sliding_window=8, **rope()), KVCacheManager(config)
    hidden, at = tokens(prompt + 1), positions(prompt + 1)
    call = {"kv_mgr": manager, "update_kv_per_layer": True, "idx": 0}
    first = made(hidden[:, :prompt], position_ids=at[:, :prompt], **call)
    manager.store(0, first.present_key_value)
    got = made(hidden[:, prompt:], position_ids=at[:, prompt:], get_kv_per_layer=True, **call)
    expected = made(hidden, position_ids=at).hidden_states[:, prompt:]
    assert relative_error(got.hidden_states, expected) <= ROUNDOFF
