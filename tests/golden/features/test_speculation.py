"""A tree of drafts gives each node what its own path gives."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import golden.speculation
from golden import (
    ConfigError,
    ShapeError,
    accept_drafts,
    forward,
    tree_depths,
    tree_mask,
    verify_tree,
)
from tests.golden.features.served import CACHES, SERVED, encoded, serve, whole
from tests.golden.layers import (
    LAYERS,
    assert_within,
    identical,
    integer_weights,
    sampled,
    small_integers,
)

PREFIX = 5
TREE = [-1, 0, 0, 1, 1, 2, 5]


def trees() -> st.SearchStrategy[list[int]]:
    return st.integers(1, 6).flatmap(
        lambda n: st.tuples(*(st.integers(-1, i - 1) for i in range(n))).map(list)
    )


def path_to(node: int, parents: list[int]) -> list[int]:
    return [*(path_to(parents[node], parents) if parents[node] >= 0 else []), node]


def check_tree(cache: str, layer: str, parents: list[int], seed: int) -> None:
    """Compare each node with a sequence that ends in its path."""
    config = LAYERS[layer]
    weights = integer_weights(config, seed)
    depth = max(tree_depths(parents)) + 1
    prefix = whole(config, seed, 1, PREFIX)
    held = CACHES[cache](config, 1, PREFIX + depth)
    _, held = serve(config, seed, prefix, [2], held)
    drafts = small_integers(seed + 77, 1, len(parents), config.hidden_size)
    got = verify_tree(
        config, weights, drafts, root_positions=[PREFIX], parents=parents, cache=held
    ).output
    for node in range(len(parents)):
        path = path_to(node, parents)
        alone = forward(
            config,
            weights,
            drafts[:, path],
            position_ids=[np.arange(PREFIX, PREFIX + len(path))],
            cache=held,
        ).output[:, -1]
        # both sum the same visible terms, in another order among masked zeros
        states = np.concatenate([prefix.states, drafts[:, path]], axis=1)
        assert_within(got[:, node], alone, encoded(config, seed, states).bound[:, -1])


@pytest.mark.parametrize(("cache", "layer"), SERVED)
def test_t3_each_node_of_a_tree_is_its_own_path(cache: str, layer: str) -> None:
    for seed in range(3):
        check_tree(cache, layer, TREE, seed)


@sampled
@given(parents=trees(), seed=st.integers(0, 2**16), layer=st.sampled_from(sorted(LAYERS)))
def test_t3_holds_for_any_tree(parents: list[int], seed: int, layer: str) -> None:
    check_tree("contiguous", layer, parents, seed)


@pytest.mark.parametrize("layer", LAYERS)
def test_t1_a_chain_is_plain_speculation(layer: str) -> None:
    config, weights = LAYERS[layer], integer_weights(LAYERS[layer])
    prefix = whole(config, 0, 2, PREFIX)
    _, held = serve(config, 0, prefix, [], CACHES["contiguous"](config, 2, 9))
    drafts = small_integers(5, 2, 3, config.hidden_size)
    chain = verify_tree(
        config, weights, drafts, root_positions=[5, 5], parents=[-1, 0, 1], cache=held
    )
    plain = forward(config, weights, drafts, position_ids=np.tile([5, 6, 7], (2, 1)), cache=held)
    assert identical(chain.output, plain.output)


@pytest.mark.parametrize("cache", ["contiguous", "paged", "rolling-spare"])
def test_accepted_drafts_and_no_others_are_written(cache: str) -> None:
    config = LAYERS["window-sinks"]
    weights = integer_weights(config)
    prefix = whole(config, 0, 2, PREFIX)
    _, held = serve(config, 0, prefix, [], CACHES[cache](config, 2, 10))
    drafts = small_integers(6, 2, len(TREE), config.hidden_size)
    step = verify_tree(config, weights, drafts, root_positions=[5, 5], parents=TREE, cache=held)
    after = accept_drafts(held, step, [[0, 2, 5], [0, 1, -1]])
    one_by_one = held
    for row, path in enumerate([[0, 2, 5], [0, 1]]):
        for depth, node in enumerate(path):
            one_by_one = one_by_one.write(
                step.k[row : row + 1, :, node : node + 1],
                step.v[row : row + 1, :, node : node + 1],
                [[5 + depth]],
                seq_ids=[row],
            )
    at = np.array([[8], [7]])
    assert all(map(identical, after.prior(at), one_by_one.prior(at)))
    next_token = small_integers(8, 2, 1, config.hidden_size)
    got = forward(config, weights, next_token, position_ids=at, cache=after).output
    for row, path in enumerate([[0, 2, 5], [0, 1]]):
        states = np.concatenate(
            [prefix.states[row : row + 1], drafts[row : row + 1, path], next_token[row : row + 1]],
            axis=1,
        )
        want = encoded(config, 0, states)
        assert_within(got[row : row + 1, 0], want.output[:, -1], want.bound[:, -1])


def test_t2_the_documented_tree() -> None:
    rows = ["".join("01"[int(x)] for x in row) for row in tree_mask([-1, 0, 0, 1])]
    assert rows == ["1000", "1100", "1010", "1101"]
    assert tree_depths(TREE) == [0, 1, 1, 2, 2, 2, 3]


def test_an_idle_row_drafts_nothing() -> None:
    config = LAYERS["mha"]
    weights = integer_weights(config)
    held = CACHES["contiguous"](config, 2, 9)
    step = verify_tree(
        config,
        weights,
        np.ones((2, 2, 8)),
        root_positions=[-1, 0],
        parents=[-1, 0],
        cache=held,
    )
    assert step.positions.tolist() == [[-1, -1], [0, 1]]
    assert (step.output[0] == 0).all()


# Planted defects


def test_the_comparison_sees_siblings_that_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        golden.speculation,
        "tree_mask",
        lambda parents: np.tril(np.ones((len(parents), len(parents)), dtype=bool)),
    )
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_tree("contiguous", "mha", TREE, 0)


def test_the_comparison_sees_positions_counted_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    right = tree_depths
    monkeypatch.setattr(golden.speculation, "tree_depths", lambda p: list(range(len(p))))
    assert right(TREE) != list(range(len(TREE)))
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_tree("contiguous", "mha", TREE, 0)


# Callers' mistakes


def test_mistakes_are_named() -> None:
    config = LAYERS["mha"]
    held = CACHES["contiguous"](config, 1, 9)
    step = verify_tree(
        config,
        integer_weights(config),
        np.ones((1, 3, 8)),
        root_positions=[0],
        parents=[-1, 0, 0],
        cache=held,
    )
    for parents, message in (([0], "got 0 for node 0"), ([-1, 2, 1], "got 2 for node 1")):
        with pytest.raises(ConfigError, match=re.escape(message)):
            tree_mask(parents)
    with pytest.raises(ConfigError, match="paths must name nodes below 3, got 3"):
        accept_drafts(held, step, [[0, 3]])
    with pytest.raises(ConfigError, match="a path must descend one position at a time"):
        accept_drafts(held, step, [[1, 2]])
    with pytest.raises(ShapeError, match=r"root_positions must be integers \(batch,\)"):
        verify_tree(
            config,
            integer_weights(config),
            np.ones((1, 1, 8)),
            root_positions=[0.0],
            parents=[-1],
            cache=held,
        )
