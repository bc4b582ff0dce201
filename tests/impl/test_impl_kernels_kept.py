"""What data hides is zero or NaN, whatever it held, by bits or by `masked_fill`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from impl.kernels import kept

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HELD = [0.0, -0.0, 1.5, -2.0, 1e-40, math.inf, -math.inf, math.nan]


def values(dtype: torch.dtype) -> Tensor:
    return torch.tensor(HELD, dtype=dtype).repeat(3, 4, 1)


WHERE = torch.tensor([True, False, True])[:, None, None]


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_kept_is_zero_and_the_rest_keeps_its_bits(
    dtype: torch.dtype, reuse: bool
) -> None:
    held = values(dtype)
    expected = held.masked_fill(~WHERE, 0.0)
    given = held.clone()
    cleaned = kept.zero_unless(given, WHERE, reuse=reuse)
    assert bits(cleaned) == bits(expected)
    assert bits(given) == bits(expected if reuse else held)


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_broken_is_nan_and_the_rest_keeps_its_bits(dtype: torch.dtype, reuse: bool) -> None:
    held = values(dtype)
    given = held.clone()
    marked = kept.nan_where(given, WHERE, reuse=reuse)
    assert marked[0].isnan().all()
    assert marked[2].isnan().all()
    assert bits(marked[1]) == bits(held[1])
    assert bits(given) == bits(marked if reuse else held)


def test_a_gradient_passes_where_values_are_kept() -> None:
    held = torch.ones(3, 2, 2, requires_grad=True)
    with torch.enable_grad():
        kept.zero_unless(held, WHERE, reuse=True).sum().backward()
    assert held.grad is not None
    assert held.grad[:, 0, 0].tolist() == [1.0, 0.0, 1.0]
    assert held.tolist() == torch.ones(3, 2, 2).tolist()


def bits(tensor: Tensor) -> list[object]:
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    found: list[object] = tensor.detach().view(whole).tolist()
    return found
