"""Adapters on q, k, v and o, one per batch row."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from golden import (
    CALL_STAGES,
    Array,
    AttentionConfig,
    AttentionWeights,
    Capture,
    ConfigError,
    Lora,
    ShapeError,
    context_encoding,
    empty_cache,
    forward,
    make_lora,
    project_qkv,
    token_generation,
    weight_shapes,
)
from golden.lora import TARGETS
from tests.golden.features.served import encoded
from tests.golden.layers import (
    LAYERS,
    assert_within,
    identical,
    integer_weights,
    small_integers,
)

RANK, ADAPTERS = 2, 3
SCALING = [1.0, 0.5, 2.0]


def matrices(config: AttentionConfig, *, targets: tuple[str, ...] = TARGETS) -> dict[str, Any]:
    """Return integer adapters, so that merging them into the weights is exact."""
    shapes = weight_shapes(config)
    down, up = {}, {}
    for index, target in enumerate(targets):
        out, width = shapes[f"{target}_proj"]
        down[target] = small_integers(index, ADAPTERS, RANK, width, largest=1)
        up[target] = small_integers(index + 50, ADAPTERS, out, RANK, largest=1)
    return {"down": down, "up": up}


def adapted(config: AttentionConfig, ids: list[int], **changes: Any) -> Lora:
    scaling = {target: np.array(SCALING) for target in changes.get("targets", TARGETS)}
    return make_lora(config, adapter_ids=ids, scaling=scaling, **matrices(config, **changes))


def merged(config: AttentionConfig, weights: AttentionWeights, adapter: int) -> AttentionWeights:
    """Add one adapter to the weights: `W + scaling * up @ down`."""
    parts = matrices(config)
    changed = {
        f"{target}_proj": getattr(weights, f"{target}_proj")
        + SCALING[adapter] * parts["up"][target][adapter] @ parts["down"][target][adapter]
        for target in TARGETS
    }
    return replace(weights, **changed)


def check_merged(layer: str, lora: Lora, ids: list[int]) -> None:
    config = LAYERS[layer]
    weights = integer_weights(config)
    states = 2.0 * small_integers(3, len(ids), 6, config.hidden_size)
    positions = np.tile(np.arange(6), (len(ids), 1))
    got = context_encoding(config, weights, states, position_ids=positions, lora=lora).output
    for row, adapter in enumerate(ids):
        alone = weights if adapter < 0 else merged(config, weights, adapter)
        want = context_encoding(
            config, alone, states[row : row + 1], position_ids=positions[:1]
        ).output
        # projections in are exact, so only o's low-rank sum is in another order
        bound = 2.0 * encoded(config, 0, states[row : row + 1]).bound
        assert_within(got[row : row + 1], want, bound)


@pytest.mark.parametrize("layer", LAYERS)
def test_l1_each_row_has_the_weights_its_adapter_merges_to(layer: str) -> None:
    ids = [2, 0, -1, 1, 2]
    check_merged(layer, adapted(LAYERS[layer], ids), ids)


def test_l1_projections_of_integers_are_exactly_the_merged_ones() -> None:
    config = LAYERS["gqa-bias-rms"]
    weights = integer_weights(config)
    states = 2.0 * small_integers(3, 2, 4, config.hidden_size)
    got = project_qkv(config, weights, states, lora=adapted(config, [1, 2]))
    for row, adapter in enumerate([1, 2]):
        want = project_qkv(config, merged(config, weights, adapter), states[row : row + 1])
        for x, y in zip(got[:3], want[:3], strict=True):
            assert identical(x[row : row + 1], y)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", ["none", "zero"])
def test_l2_no_adapter_and_one_of_zeros_change_no_bit(layer: str, kind: str) -> None:
    config, weights = LAYERS[layer], integer_weights(LAYERS[layer])
    parts = matrices(config)
    if kind == "zero":
        parts["up"] = {target: 0.0 * up for target, up in parts["up"].items()}
    lora = make_lora(config, adapter_ids=[-1, -1] if kind == "none" else [0, 1], **parts)
    states = small_integers(1, 2, 5, config.hidden_size)
    options: dict[str, Any] = {"position_ids": np.tile(np.arange(5), (2, 1))}
    plain = context_encoding(config, weights, states, **options).output
    assert (context_encoding(config, weights, states, lora=lora, **options).output == plain).all()


def test_l1_adapters_act_in_every_phase_and_on_any_subset_of_projections() -> None:
    config = LAYERS["mha"]
    weights = integer_weights(config)
    states = 2.0 * small_integers(2, 2, 6, config.hidden_size)
    lora = adapted(config, [0, 2], targets=("q", "o"))
    options: dict[str, Any] = {"position_ids": np.tile(np.arange(6), (2, 1)), "lora": lora}
    cache = empty_cache(config, batch=2, max_length=6)
    whole = context_encoding(config, weights, states, cache=cache, **options).output
    bound = 4.0 * encoded(config, 0, states).bound
    for run in (token_generation, forward):
        got = run(config, weights, states, cache=cache, **options).output
        assert_within(got, whole, bound)
    bare = context_encoding(config, weights, states, position_ids=options["position_ids"]).output
    assert (np.abs(whole - bare) > bound).any()


def test_accumulations_count_the_low_rank_sum() -> None:
    config = LAYERS["mha"]
    lora = adapted(config, [0, -1])
    states = 2.0 * small_integers(2, 2, 3, config.hidden_size)
    _, _, _, (q_sum, _, _) = project_qkv(config, integer_weights(config), states, lora=lora)
    plain = project_qkv(config, integer_weights(config), states).accumulations[0]
    assert q_sum.length == plain.length + RANK
    down, up, scaling = lora.adapters["q"]
    inner = states[0] @ down[0].T
    extra = scaling[0] ** 2 * np.square(inner) @ np.square(up[0]).T
    assert identical(q_sum.squares()[0], plain.squares()[0] + extra)
    assert identical(q_sum.squares()[1], plain.squares()[1])


LORA_STAGES = [f"{name}_{part}" for name in TARGETS for part in ("base", "lora_down", "lora_up")]


def stages_of(lora: Lora | None) -> dict[str, Array]:
    config, capture = LAYERS["mha"], Capture()
    states = small_integers(2, 2, 3, config.hidden_size)
    positions = np.tile(np.arange(3), (2, 1))
    weights = integer_weights(config)
    context_encoding(config, weights, states, position_ids=positions, lora=lora, observe=capture)
    return capture.values


def test_every_stage_of_an_adapter_is_observed_and_none_without() -> None:
    config = LAYERS["mha"]
    lora, seen = adapted(config, [0, -1]), stages_of(adapted(config, [0, -1]))
    expected = {f"{name}_{part}" for name in TARGETS for part in ("base", "lora")}
    assert seen.keys() & CALL_STAGES.keys() == expected | set(LORA_STAGES)
    assert not stages_of(None).keys() & CALL_STAGES.keys()
    states = small_integers(2, 2, 3, config.hidden_size)
    down, up, scaling = lora.adapters["q"]
    inner = states[0] @ down[0].T
    assert identical(seen["q_lora_down"][0], inner)
    assert identical(seen["q_lora_up"][0], inner @ up[0].T)
    assert identical(seen["q_lora"][0], scaling[0] * (inner @ up[0].T))
    assert not seen["q_lora"][1].any()
    assert identical(seen["q_base"] + seen["q_lora"], seen["q_product"])


@pytest.mark.parametrize("stage", LORA_STAGES)
def test_a_rewrite_of_an_adapters_stage_takes_effect(stage: str) -> None:
    config = LAYERS["mha"]

    def doubled(name: str, value: Array, accumulation: Any = None, /) -> Array:
        return 2.0 * value if name == stage else value

    states = 2.0 * small_integers(2, 2, 3, config.hidden_size)
    call: dict[str, Any] = {"position_ids": np.tile(np.arange(3), (2, 1))}
    call["lora"] = adapted(config, [0, 2])
    plain = context_encoding(config, integer_weights(config), states, **call).output
    call["observe"] = doubled
    assert not identical(
        context_encoding(config, integer_weights(config), states, **call).output, plain
    )


# Planted defects


def test_the_comparison_sees_adapters_of_the_neighbouring_row() -> None:
    ids = [2, 0, -1]
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_merged("mha", adapted(LAYERS["mha"], [0, -1, 2]), ids)


def test_the_comparison_sees_an_output_projection_without_its_adapter() -> None:
    ids = [2, 0]
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_merged("mha", adapted(LAYERS["mha"], ids, targets=("q", "k", "v")), ids)


# Callers' mistakes


def test_mistakes_are_named() -> None:
    config = LAYERS["mha"]
    parts = matrices(config)
    with pytest.raises(
        ConfigError, match="down and up must name the same targets among q, k, v, o"
    ):
        make_lora(config, adapter_ids=[0], down=parts["down"], up={"q": parts["up"]["q"]})
    with pytest.raises(ConfigError, match=re.escape("must lie between -1 and 2, got [3]")):
        make_lora(config, adapter_ids=[3], **parts)
    with pytest.raises(ShapeError, match=r"adapter_ids must be integers of shape \(batch,\)"):
        make_lora(config, adapter_ids=[[0]], **parts)
    wrong: dict[str, Array] = parts["up"] | {"k": parts["up"]["k"][:, :-1]}
    with pytest.raises(ShapeError, match=re.escape("up['k'] must have shape (3, 8, 2)")):
        make_lora(config, adapter_ids=[0], down=parts["down"], up=wrong)
    with pytest.raises(ShapeError, match=r"adapter_ids must have shape \(1,\), \(batch,\)"):
        context_encoding(
            config,
            integer_weights(config),
            np.zeros((1, 1, 8)),
            position_ids=[0],
            lora=make_lora(config, adapter_ids=[0, 0], **parts),
            observe=Capture(),
        )
