"""Vector-Jacobian products through observers: every stage is shown, and is what the rest reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import golden
from golden import (
    GRADIENT_STAGES,
    Accumulation,
    Array,
    AttentionConfig,
    Capture,
    Observer,
    unobserved,
)
from tests.golden.layers import EVERYTHING

LENGTHS = np.array([5, 3])


def gradients(
    config: AttentionConfig = EVERYTHING, *, decode: bool = False, observe: Observer = unobserved
) -> dict[str, Array]:
    """Golden's gradients of a drawn layer, by name."""
    rng = np.random.default_rng(0)
    weights = golden.make_weights(
        config,
        **{name: rng.standard_normal(s) for name, s in golden.weight_shapes(config).items()},
    )
    hidden, d_output = rng.standard_normal((2, 2, 5, config.hidden_size))
    positions = np.where(np.arange(5) < LENGTHS[:, None], np.arange(5), -1)
    shape = (2, config.num_key_value_heads, 12, config.head_dim)
    k, v, d_k, d_v = rng.standard_normal((4, *shape))
    given: dict[str, Any] = {"d_cache_k": d_k, "d_cache_v": d_v, "observe": observe}
    found: Any
    if decode:
        cache = golden.filled_cache(config, k, v, LENGTHS)
        at = LENGTHS[:, None] + np.arange(5)
        found = golden.token_generation_vjp(
            config, weights, hidden, d_output, position_ids=at, cache=cache, **given
        )
    else:
        cache = golden.empty_cache(config, batch=2, max_length=12)
        found = golden.context_encoding_vjp(
            config, weights, hidden, d_output, position_ids=positions, cache=cache, **given
        )
    named = {name: getattr(found.weights, name) for name in golden.weight_shapes(config)}
    return named | {"hidden_states": found.hidden_states, "cache_k": found.cache_k}


@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
def test_every_stage_is_shown_once_and_showing_it_changes_no_bit(decode: bool) -> None:
    shown: list[str] = []

    def copied(stage: str, value: Array, accumulation: Accumulation | None = None, /) -> Array:
        shown.append(stage)
        return value.copy()

    fused = {"d_q_hidden", "d_k_hidden", "d_v_hidden", "d_hidden_sum"}
    for config in (EVERYTHING, replace(EVERYTHING, fused_qkv=True)):
        shown.clear()
        observed = gradients(config, decode=decode, observe=copied)
        for name, exact in gradients(config, decode=decode).items():
            assert np.array_equal(observed[name], exact), name
        assert len(shown) == len(set(shown))
        missing = GRADIENT_STAGES.keys() - set(shown)
        assert missing == (fused if config.fused_qkv else set())
        assert set(shown) - GRADIENT_STAGES.keys() <= golden.STAGES.keys()


READERS = {
    "d_attn": {"k_proj", "q_proj", "v_proj", "sinks"},
    "d_weights": {"k_proj", "q_proj", "sinks"},
    "delta": {"k_proj", "q_proj", "sinks"},
    "logsumexp": {"k_proj", "q_proj", "v_proj"},
    "weights_again": {"v_proj", "v_bias"},
    "d_v_heads": {"v_proj", "v_bias"},
    "delta_weights": {"k_proj", "q_proj", "sinks"},
    "delta_output": {"k_proj", "q_proj", "sinks"},
    "delta_sum": {"k_proj", "q_proj", "sinks"},
    "d_shifted_scores": {"k_proj", "q_proj"},
    "d_softcap": {"k_proj", "q_proj"},
    "d_softcap_tanh": {"k_proj", "q_proj"},
    "d_softcap_ratio": {"k_proj", "q_proj"},
    "d_qk": {"k_proj", "q_proj"},
    "d_k_heads": {"k_proj", "k_norm", "k_bias"},
    "d_q_temperature": {"q_proj", "q_norm", "q_bias"},
    "d_q_rope_cos": {"q_proj", "q_norm", "q_bias"},
    "d_k_rope_sin": {"k_proj", "k_norm", "k_bias"},
    "d_k_norm_unit": {"k_proj", "k_bias"},
    "d_q_norm_mean": {"q_proj", "q_bias"},
    "d_k_norm_terms": {"k_norm"},
    "d_v_hidden": {"hidden_states"},
    "d_hidden_sum": {"hidden_states"},
}
"""Stages to some of the gradients that read them."""


@pytest.mark.parametrize("stage", READERS)
def test_what_an_observer_returns_is_what_the_gradients_read(stage: str) -> None:
    def grown(seen: str, value: Array, accumulation: Accumulation | None = None, /) -> Array:
        return value * 1.01 if seen == stage else value

    exact, changed = gradients(), gradients(observe=grown)
    moved = {name for name in exact if not np.array_equal(exact[name], changed[name])}
    assert moved >= READERS[stage]
    if stage.startswith(("d_v", "weights_again", "d_hidden")):
        assert moved <= READERS[stage] | {"hidden_states"}


def test_the_observer_is_told_how_each_sum_was_made() -> None:
    sums: dict[str, tuple[Array, Accumulation]] = {}

    def kept(stage: str, value: Array, accumulation: Accumulation | None = None, /) -> Array:
        if accumulation is not None and stage in GRADIENT_STAGES:
            sums[stage] = (value, accumulation)
        return value

    gradients(observe=kept)
    assert {"d_q", "d_k", "d_v", "d_attn", "delta", "grad_sinks", "grad_q_proj"} <= sums.keys()
    for stage, (value, accumulation) in sums.items():
        count, squares = accumulation.count(), accumulation.squares()
        np.broadcast_to(squares, value.shape)
        assert (count <= accumulation.length).all(), stage
        # Cauchy and Schwarz: no sum of n terms has a larger square than n times their squares
        assert (np.square(value) <= np.maximum(count, 1) * squares * (1 + 1e-12)).all(), stage


def test_a_group_tells_of_all_its_terms() -> None:
    rng = np.random.default_rng(1)
    q, d_output = rng.standard_normal((2, 1, 4, 3, 5))
    k, v = rng.standard_normal((2, 1, 2, 3, 5))
    found: dict[str, Accumulation] = {}

    def kept(stage: str, value: Array, accumulation: Accumulation | None = None, /) -> Array:
        if accumulation is not None:
            found[stage] = accumulation
        return value

    seen = Capture(only=frozenset({"weights_again"}), through=kept)
    golden.attend_vjp(
        q,
        k,
        v,
        d_output,
        q_positions=np.arange(3),
        kv_positions=np.arange(3),
        mask=golden.Causal(),
        observe=seen,
    )
    weights = seen.values["weights_again"].reshape(1, 2, 2, 3, 3)
    terms = weights[..., None] * d_output.reshape(1, 2, 2, 3, 1, 5)
    assert np.allclose(found["d_v"].squares(), np.square(terms).sum(axis=(2, 3)), rtol=1e-12)
    visible = np.tri(3).sum(axis=0)
    assert np.array_equal(found["d_v"].count()[0, 0, :, 0], 2 * visible)


def test_delta_of_a_rounded_output_is_moved_by_what_rounding_did() -> None:
    rng = np.random.default_rng(2)
    q, k, v, d_output = rng.standard_normal((4, 1, 2, 3, 5))
    moves = 0.01 * rng.standard_normal(v.shape)

    def moved(stage: str, value: Array, accumulation: Accumulation | None = None, /) -> Array:
        return value + moves if stage == "delta_output" else value

    given: dict[str, Any] = {
        "q_positions": np.arange(3),
        "kv_positions": np.arange(3),
        "mask": golden.Everything(),
    }
    seen = Capture(only=frozenset({"d_shifted_scores"}))
    golden.attend_vjp(q, k, v, d_output, **given, observe=seen)
    changed = Capture(only=frozenset({"d_shifted_scores"}), through=moved)
    golden.attend_vjp(q, k, v, d_output, **given, observe=changed)
    change = changed.values["d_shifted_scores"] - seen.values["d_shifted_scores"]
    want = -(moves * d_output).sum(axis=-1, keepdims=True)
    assert np.allclose(change, np.broadcast_to(want, change.shape), rtol=1e-10, atol=0.0)
