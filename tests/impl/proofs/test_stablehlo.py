"""Every path lowers to StableHLO, and what XLA makes of it is what golden defines."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from forward_paths import PATHS
from judging import roundoff, worst_error
from path_build import build
from proofs import Planted, as_one_graph, reviewed

pytest.importorskip("torch_mlir", reason="the extra stablehlo is not installed")
pytest.importorskip("jaxlib", reason="the extra stablehlo is not installed")

from conformance.stablehlo import Program, StableHLOBackend


@pytest.fixture(scope="module")
def operators() -> set[str]:
    """Operators of all paths, gathered as they are lowered."""
    return set()


@pytest.mark.parametrize("name", PATHS)
def test_every_path_through_stablehlo_is_golden_in_float64(name: str, operators: set[str]) -> None:
    programs: list[Program] = []
    built = build(PATHS[name], torch.float64)
    results = as_one_graph(built.step, built.tensors, StableHLOBackend(programs.append))
    (program,) = programs
    assert program.is_static
    assert "custom_call" not in program.stablehlo
    operators |= program.operators
    assert program.operators <= reviewed("stablehlo")
    assert worst_error(built, results) <= roundoff(built)


def test_no_reviewed_operator_is_stale(operators: set[str], request: pytest.FixtureRequest) -> None:
    ran = [item for item in request.session.items if "golden_in_float64" in item.name]
    if len(ran) < len(PATHS) or request.session.testsfailed:
        pytest.skip("not every path was lowered in this process")
    assert sorted(reviewed("stablehlo") - operators) == []


def test_a_gradient_goes_the_same_way() -> None:
    def loss(x: torch.Tensor) -> torch.Tensor:
        return (torch.softmax(x, -1) * x).sum()

    with torch.enable_grad():
        x = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).requires_grad_()
        torch._dynamo.reset()
        compiled = torch.compile(loss, backend=StableHLOBackend(), fullgraph=True, dynamic=False)
        (got,) = torch.autograd.grad(compiled(x), x)
        (expected,) = torch.autograd.grad(loss(x), x)
    # six terms a sum, three operations deep, each within one unit roundoff of values below 2
    assert (got - expected).abs().max() <= 6 * 3 * 2 * 2.0**-53


def test_constants_inside_keep_their_values() -> None:
    table = torch.tensor([0.1, -2.0, 3.0], dtype=torch.float64)
    (got,) = as_one_graph(
        Planted(lambda x: x * torch.tensor([0.1, -2.0, 3.0], dtype=torch.float64)),
        {"x": torch.ones(3, dtype=torch.float64)},
        StableHLOBackend(),
    )
    assert torch.equal(got, table + 1)


def _draws(x: torch.Tensor) -> torch.Tensor:
    return x + torch.rand_like(x)


def _sizes(x: torch.Tensor) -> torch.Tensor:
    return x + torch.nonzero(x).shape[0]


@pytest.mark.parametrize("spoil", [_draws, _sizes])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_step_that_has_no_static_reviewed_graph_is_found(
    spoil: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    programs: list[Program] = []
    try:
        tensors = {"x": torch.ones(3)}
        as_one_graph(Planted(spoil), tensors, StableHLOBackend(programs.append))
    except Exception:  # as good: it did not lower at all
        return
    (program,) = programs
    assert not program.is_static or not program.operators <= reviewed("stablehlo")
