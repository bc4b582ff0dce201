"""Every path runs without values, compiles as one graph and exports reviewed operators alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from forward_paths import PATHS
from judging import same_bits
from path_build import build
from proofs import Planted, as_one_graph, exported_operators, on_fake_tensors, reviewed
from torch import Tensor

MODEL_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", MODEL_DTYPES)
@pytest.mark.parametrize("name", PATHS)
def test_every_path_runs_on_fake_tensors(name: str, dtype: torch.dtype) -> None:
    built = build(PATHS[name], dtype)
    fake = on_fake_tensors(built.step, built.tensors)
    real = built.step(**built.tensors)
    assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in real]


@pytest.mark.parametrize("name", PATHS)
def test_every_path_compiles_as_one_graph_of_the_same_bits(name: str) -> None:
    built = build(PATHS[name], torch.bfloat16)
    expected = [result.clone() for result in built.step(**built.tensors)]
    built = build(PATHS[name], torch.bfloat16)  # a step may have written its cache
    got = as_one_graph(built.step, built.tensors, "aot_eager")
    assert len(got) == len(expected)
    assert all(map(same_bits, got, expected))


def test_exported_graphs_hold_the_reviewed_operators_and_no_other() -> None:
    found = set()
    for path in PATHS.values():
        built = build(path, torch.bfloat16)
        found |= exported_operators(built.step, built.tensors)
    assert sorted(found - reviewed("export")) == [], "not reviewed"
    assert sorted(reviewed("export") - found) == [], "reviewed, but no path has it any more"


def _branches(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def _reads(x: Tensor) -> Tensor:
    return x * x[0].item()


def _counts(x: Tensor) -> Tensor:
    return x[x > 0].sum() + x


def _leaves_torch(x: Tensor) -> Tensor:
    return x + torch.from_numpy(x.numpy() + 1)


def _prints(x: Tensor) -> Tensor:
    print(x.shape)
    return x


def _sorts(x: Tensor) -> Tensor:
    return x.sort().values


def _draws(x: Tensor) -> Tensor:
    return x + torch.rand_like(x)


def _planted(spoil: Callable[[Tensor], Tensor]) -> tuple[Any, dict[str, Tensor]]:
    return Planted(spoil), {"x": torch.arange(1.0, 5.0)}


@pytest.mark.parametrize("spoil", [_branches, _reads, _counts, _leaves_torch])
def test_fake_tensors_find_a_step_that_needs_values(spoil: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(Exception, match=r".+"):
        on_fake_tensors(*_planted(spoil))


@pytest.mark.parametrize("spoil", [_branches, _prints])
def test_compilation_finds_a_step_that_leaves_the_graph(spoil: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported):
        as_one_graph(*_planted(spoil), "eager")


@pytest.mark.parametrize(
    ("spoil", "operator"), [(_sorts, "aten.sort.default"), (_draws, "aten.rand_like.default")]
)
def test_export_finds_an_operator_that_nobody_reviewed(
    spoil: Callable[[Tensor], Tensor], operator: str
) -> None:
    found = exported_operators(*_planted(spoil)) - reviewed("export")
    assert found == {operator}
