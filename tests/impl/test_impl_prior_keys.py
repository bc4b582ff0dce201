"""Prefill over cached keys: a prefix and the rest, or windows, are the whole prompt at once."""

from typing import Any

import pytest
import torch
from impl_layers import (
    HIDDEN,
    KV_HEADS,
    ROUNDOFF,
    WIDTH,
    layer,
    positions,
    relative_error,
    tokens,
)
from torch import Tensor

from impl import NeuronAttentionBase, RMSNorm, RotaryEmbedding, ShapeError
from impl.step import PREFIX_LEN_MIN, Phase, select_phase

LONG = PREFIX_LEN_MIN + 2
DOUBLE = torch.float64
FEATURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({"rotary_emb": RotaryEmbedding(WIDTH)}, {}),
    "sink": ({"rotary_emb": RotaryEmbedding(WIDTH), "learned_sinks_size": 1}, {}),
    "window": ({"rotary_emb": RotaryEmbedding(WIDTH), "sliding_window": 5}, {}),
    "window 1": ({"sliding_window": 1}, {}),
    "window of the prompt": ({"sliding_window": LONG + 3}, {}),
    "window, sink, polar": (
        {"rope_theta": 5e5, "sliding_window": 9, "learned_sinks_size": 1},
        {"use_polar_compatible_rope": True},
    ),
    "softcap, scale": ({"attn_logit_softcapping": 1.5, "softmax_scale": 1.7}, {}),
    "norms": (
        {
            "rotary_emb": RotaryEmbedding(WIDTH),
            "q_layernorm": RMSNorm(WIDTH, dtype=DOUBLE),
            "k_layernorm": RMSNorm(WIDTH, dtype=DOUBLE),
            "qkv_bias": True,
            "o_bias": True,
        },
        {},
    ),
    "temperature": ({"attn_temperature_tuning": True, "floor_scale": 3, "attn_scale": 0.7}, {}),
}
CHUNK: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "chunk": ({"rotary_emb": RotaryEmbedding(WIDTH), "attention_chunk_size": 4}, {}),
    "chunk, polar": (
        {"rope_theta": 5e5, "attention_chunk_size": 6},
        {"use_polar_compatible_rope": True},
    ),
}


def garbage(slots: int, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """A cache full of numbers that must not matter."""
    shape = (2, KV_HEADS, slots, WIDTH)
    k, v = (torch.full(shape, float("nan"), dtype=DOUBLE) for _ in range(2))
    return (k.transpose(2, 3), v) if transposed else (k, v)


def whole_prompt(
    made: NeuronAttentionBase, hidden: Tensor, at: Tensor, call: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    output = made(hidden, at >= 0, at, **call)
    return output.hidden_states, *output.present_key_value


@pytest.mark.parametrize(("features", "call"), FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("prefix", [1, 4, 20])
def test_a_prefix_and_the_rest_are_the_whole_prompt(
    features: dict[str, Any], call: dict[str, Any], prefix: int
) -> None:
    made = layer(run={"is_prefix_caching": True, "seq_len": 256}, **features)
    seq_len = prefix + LONG
    hidden, at = tokens(seq_len), positions(seq_len)
    expected, k, v = whole_prompt(made, hidden, at, call)
    cache = garbage(prefix + 3)
    for slots, new in zip(cache, (k, v), strict=True):
        slots[:, :, :prefix] = new[:, :, :prefix]
    tril = torch.ones(2, 1, LONG, LONG, dtype=torch.bool).tril()
    valid = (torch.arange(prefix + 3) < prefix).expand(2, -1).to(torch.int32)
    for masks in ({}, {"attention_mask": valid, "active_mask": tril}):
        got = made(
            hidden[:, prefix:],
            position_ids=at[:, prefix:],
            past_key_value=cache,
            **masks,
            **call,
        )
        assert relative_error(got.hidden_states, expected[:, prefix:]) <= ROUNDOFF
        for new, row in zip(got.present_key_value, (k, v), strict=True):
            assert relative_error(new, row[:, :, prefix:]) <= ROUNDOFF


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_with_prefixes_of_unlike_length_share_a_step(transposed: bool) -> None:
    run = {"is_prefix_caching": True, "seq_len": 256, "k_cache_transposed": transposed}
    made = layer(run=run, rotary_emb=RotaryEmbedding(WIDTH), learned_sinks_size=1)
    lengths, slots = (3, 11), 16
    hidden, at = tokens(11 + LONG), positions(11 + LONG)
    expected, k, v = whole_prompt(made, hidden, at, {})
    cache = garbage(slots, transposed)
    rest = torch.stack([hidden[b, n : n + LONG] for b, n in enumerate(lengths)])
    rest_at = torch.stack([at[b, n : n + LONG] for b, n in enumerate(lengths)])
    rest_at[1, -5:] = -1  # The second row ends five tokens early.
    for b, n in enumerate(lengths):
        rows = k[b, :, :n]
        if transposed:
            cache[0][b, :, :, :n] = rows.transpose(1, 2)
        else:
            cache[0][b, :, :n] = rows
        cache[1][b, :, :n] = v[b, :, :n]
    got = made(rest, position_ids=rest_at, past_key_value=cache).hidden_states
    assert relative_error(got[0], expected[0, 3 : 3 + LONG]) <= ROUNDOFF
    assert relative_error(got[1, :-5], expected[1, 11 : 6 + LONG]) <= ROUNDOFF
    assert torch.equal(got[1, -5:], torch.zeros_like(got[1, -5:]))


def test_validity_of_the_prefix_limits_what_is_seen() -> None:
    made = layer(run={"is_prefix_caching": True, "seq_len": 256}, learned_sinks_size=1)
    hidden, at = tokens(8 + LONG), positions(8 + LONG)
    _, k, v = whole_prompt(made, hidden, at, {})
    valid = torch.ones(2, 8, dtype=torch.int64)
    valid[:, 2:4] = 0
    arguments = {"hidden_states": hidden[:, 8:], "position_ids": at[:, 8:]}
    got = made(past_key_value=(k[:, :, :8], v[:, :, :8]), attention_mask=valid, **arguments)
    left = valid[0].bool()
    # Without RoPE a key is known by nothing but its content: dropping two slots is the same.
    expected = made(
        hidden_states=hidden[:, 8:],
        position_ids=at[:, 8:] - 2,
        past_key_value=(k[:, :, :8][:, :, left], v[:, :, :8][:, :, left]),
    )
    assert relative_error(got.hidden_states, expected.hidden_states) <= ROUNDOFF
    everything = made(past_key_value=(k[:, :, :8], v[:, :, :8]), **arguments)
    assert relative_error(got.hidden_states, everything.hidden_states) > 1e-3


@pytest.mark.parametrize(
    ("features", "call"),
    [*FEATURES.values(), *CHUNK.values()],
    ids=[*FEATURES, *CHUNK],
)
@pytest.mark.parametrize(("seq_len", "size"), [(12, 4), (13, 5), (9, 9)])
def test_windows_of_a_prompt_are_the_whole_prompt(
    features: dict[str, Any], call: dict[str, Any], seq_len: int, size: int
) -> None:
    made = layer(run={"windowed_context_encoding_size": size}, **features)
    hidden, at = tokens(seq_len), positions(seq_len).clone()
    at[1, -2:] = -1  # A shorter second row.
    expected, k, v = whole_prompt(made, hidden, at, call)
    cache = garbage(seq_len + 2)
    for idx, start in enumerate(range(0, seq_len, size)):
        window = slice(start, min(start + size, seq_len))
        got = made(
            hidden[:, window],
            position_ids=at[:, window],
            past_key_value=cache,
            windowed_context_encoding_window_idx=idx,
            **call,
        )
        real = at[:, window] >= 0
        assert relative_error(got.hidden_states[real], expected[:, window][real]) <= ROUNDOFF
        for slots, new in zip(cache, got.present_key_value, strict=True):
            slots[:, :, window] = new
    assert relative_error(cache[0][:, :, :seq_len], k) <= ROUNDOFF
    assert relative_error(cache[1][:, :, :seq_len], v) <= ROUNDOFF


def test_the_first_window_reads_no_cache() -> None:
    made = layer(run={"windowed_context_encoding_size": 4})
    call = {"position_ids": positions(4), "windowed_context_encoding_window_idx": 0}
    got = made(tokens(4), positions(4) >= 0, past_key_value=garbage(0), **call)
    assert torch.equal(got.hidden_states, made(tokens(4), positions(4) >= 0).hidden_states)


@pytest.mark.parametrize(
    ("run", "q_len", "has_past", "window_idx", "phase"),
    [
        ({}, 4, False, -1, Phase.CONTEXT_ENCODING),
        ({}, 4, True, -1, Phase.TOKEN_GENERATION),
        ({}, 4096, True, -1, Phase.TOKEN_GENERATION),
        ({"is_prefix_caching": True}, 127, True, -1, Phase.TOKEN_GENERATION),
        ({"is_prefix_caching": True}, 128, True, -1, Phase.CONTEXT_ENCODING),
        ({"is_prefix_caching": True}, 1, False, -1, Phase.CONTEXT_ENCODING),
        ({"windowed_context_encoding_size": 4}, 4, True, 3, Phase.CONTEXT_ENCODING),
        ({"windowed_context_encoding_size": 4}, 1, True, -1, Phase.TOKEN_GENERATION),
    ],
)
def test_the_phase_follows_from_static_facts(
    run: dict[str, Any], q_len: int, has_past: bool, window_idx: int, phase: Phase
) -> None:
    got, reads = select_phase(layer(run=run).neuron_config, q_len, has_past, window_idx)
    assert got is phase
    assert reads is has_past


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_prefill_over_cached_keys_takes_the_sinks_of_prefill(prefix_caching: bool) -> None:
    run = {"is_prefix_caching": prefix_caching, "windowed_context_encoding_size": 128}
    made = layer(run={**run, "seq_len": 256}, learned_sinks_size=1)
    made.tkg_learned_sinks = layer(learned_sinks_size=1, seed=7).learned_sinks
    made.cp_degree, made.dp_degree = 2, 1  # Where the two phases have sinks of their own.
    hidden, at = tokens(128 + 4), positions(128 + 4)
    k, v = (torch.zeros(2, KV_HEADS, 4, WIDTH, dtype=DOUBLE) for _ in range(2))
    calls = {
        "prefill": {
            "hidden_states": hidden[:, 4:],
            "position_ids": at[:, 4:],
            "windowed_context_encoding_window_idx": -1 if prefix_caching else 1,
        },
        "decode": {"hidden_states": hidden[:, 4:5], "position_ids": at[:, 4:5]},
    }
    for phase, call in calls.items():
        before = made(past_key_value=(k, v), **call).hidden_states
        sinks = made.learned_sinks if phase == "prefill" else made.tkg_learned_sinks
        sinks.sink.add_(3.0)
        assert not torch.equal(made(past_key_value=(k, v), **call).hidden_states, before)
        sinks.sink.sub_(3.0)
        other = made.tkg_learned_sinks if phase == "prefill" else made.learned_sinks
        other.sink.add_(3.0)
        assert relative_error(made(past_key_value=(k, v), **call).hidden_states, before) <= ROUNDOFF
        other.sink.sub_(3.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"windowed_context_encoding_window_idx": 1}, "past_key_value must be given in window 1"),
        ({"windowed_context_encoding_window_idx": 0, "hidden_states": tokens(5)}, "at most"),
        (
            {"windowed_context_encoding_window_idx": 1, "past_key_value": garbage(4)},
            "position_ids must be given with cached keys",
        ),
        (
            {
                "windowed_context_encoding_window_idx": 1,
                "past_key_value": garbage(4),
                "position_ids": positions(4, 4),
                "attention_mask": torch.ones(2, 4, 4, dtype=torch.bool),
            },
            "attention_mask must have shape",
        ),
    ],
)
def test_a_window_that_does_not_fit_is_refused(call: dict[str, Any], words: str) -> None:
    made = layer(run={"windowed_context_encoding_size": 4})
    with pytest.raises(ShapeError, match=words):
        made(**{"hidden_states": tokens(4), **call})


def test_a_padded_token_of_a_decode_step_is_zero_and_unseen() -> None:
    made = layer(rotary_emb=RotaryEmbedding(WIDTH), learned_sinks_size=1)
    cache = tuple(torch.randn(2, KV_HEADS, 8, WIDTH, dtype=DOUBLE) for _ in range(2))
    at = torch.tensor([[5, 6, -1], [-1, -1, -1]])
    tril = torch.ones(2, 1, 3, 3, dtype=torch.bool).tril()
    call = {"past_key_value": cache, "active_mask": tril}
    hidden = tokens(3)
    got = made(hidden, position_ids=at, **call).hidden_states
    assert torch.equal(got[at < 0], torch.zeros(4, HIDDEN, dtype=DOUBLE))
    short = {"past_key_value": cache, "active_mask": tril[..., :2, :2]}
    expected = made(hidden[:, :2], position_ids=at[:, :2], **short).hidden_states
    assert relative_error(got[0, :2], expected[0]) <= ROUNDOFF
    idle = made(hidden[:, :1], position_ids=at[:, 2:], past_key_value=cache).hidden_states
    assert torch.equal(idle, torch.zeros_like(idle))
