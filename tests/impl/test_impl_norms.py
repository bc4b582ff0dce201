import pytest
import torch

from impl import ConfigError, L2Norm, RMSNorm

X = torch.tensor([[3.0, -4.0, 0.0, 12.0]], dtype=torch.float64)


def test_rms_norm_divides_by_the_root_mean_square() -> None:
    expected = X / torch.sqrt(torch.tensor(169 / 4 + 0.5, dtype=torch.float64))
    got = RMSNorm(4, eps=0.5, dtype=torch.float64)(X)
    assert (got - expected).abs().max() < 1e-15


def test_gemma_weights_are_stored_minus_one() -> None:
    norm = RMSNorm(4, weight_offset=1.0, dtype=torch.float64)
    assert torch.equal(norm.weight, torch.zeros(4, dtype=torch.float64))
    assert torch.equal(norm(X), RMSNorm(4, dtype=torch.float64)(X))


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_l2_norm_uses_the_epsilon_it_is_given(eps: float | None) -> None:
    expected = X / torch.sqrt(X.square().mean() + eps)
    assert (L2Norm(eps)(X) - expected).abs().max() < 1e-15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_rounds_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 128, generator=generator).to(dtype)
    norm = RMSNorm(128, dtype=dtype)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * torch.randn(128, generator=generator))
    expected = norm.double()(x.double()).to(dtype)
    got = norm.to(dtype)(x)
    assert got.dtype is dtype
    # float32 inside: results differ only at rounding boundaries, within 2^-24 of 2^-11 or more.
    assert (got != expected).float().mean() < 0.005


@pytest.mark.parametrize("eps", [0.0, -1.0, None])
def test_an_epsilon_that_is_not_positive_is_refused(eps: float | None) -> None:
    with pytest.raises(ConfigError, match="eps must be a positive number"):
        RMSNorm(4, eps=eps)
