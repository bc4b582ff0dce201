"""What a quantised cache stores, against arithmetic done number by number."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from impl_layers import KV_HEADS, WIDTH, model

from impl import ConfigError, KVCacheManager, ShapeError
from impl.kv_cache import Codec

E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8


def codec(stored: torch.dtype, layer_dtype: torch.dtype = torch.float32, **options: Any) -> Codec:
    return Codec(stored, layer_dtype, heads=KV_HEADS, width=WIDTH, **options)


def values(*numbers: float) -> torch.Tensor:
    """Numbers in row 0 of head 0, BHSD, zeros elsewhere."""
    x = torch.zeros(1, KV_HEADS, len(numbers), WIDTH)
    x[0, 0, :, 0] = torch.tensor(numbers)
    return x


def first_column(x: torch.Tensor) -> list[float]:
    return [float(number) for number in x[0, 0, :, 0].float()]


def nearest(x: float, bits: int, least_exponent: int) -> float:
    """Round to `bits` significant bits, ties to even, by exact arithmetic on doubles."""
    if x == 0:
        return 0.0
    exponent = max(
        torch.frexp(torch.tensor(abs(x), dtype=torch.float64)).exponent.item() - 1, least_exponent
    )
    unit = 2.0 ** (exponent - bits + 1)
    return round(x / unit) * unit


@settings(max_examples=200, deadline=None)
@given(x=st.floats(-400, 400, width=32))
def test_a_direct_cast_rounds_to_nearest_even(x: float) -> None:
    for stored, bits, least in ((E4M3, 4, -6), (E5M2, 3, -14)):
        made = codec(stored)
        got = first_column(made.decode(made.encode(values(x))))
        assert got == [nearest(x, bits, least)]


def test_a_direct_cast_beyond_the_format_is_not_a_number_silently_cut() -> None:
    # 464 is the tie between 448 and 480, which e4m3fn lacks; it goes to the even code, 448.
    numbers = first_column(codec(E4M3).encode(values(448, 464, 464.5, -1e9)))
    assert numbers[:2] == [448, 448]
    assert all(number != number for number in numbers[2:])
    assert first_column(codec(E5M2).encode(values(57344, 61440, -1e9))) == [
        57344,
        float("inf"),
        -float("inf"),
    ]


def test_a_static_scale_clamps_and_int8_rounds_half_to_even() -> None:
    made = codec(INT8, scale=0.5)
    codes = made.encode(values(0.25, 0.75, -0.75, 63.5, 1e6, -1e6))
    assert codes.dtype is INT8
    assert first_column(codes) == [0, 2, -2, 127, 127, -128]
    assert first_column(made.decode(codes)) == [0, 1, -1, 63.5, 63.5, -64]
    assert first_column(codec(INT8, scale=0.5, bound=100).encode(values(1e6, -1e6))) == [100, -100]
    assert first_column(codec(E4M3, scale=2.0).encode(values(1e6, -1e6, 3))) == [448, -448, 1.5]
    assert first_column(codec(E4M3, scale=2.0, bound=240).encode(values(1e6))) == [240]
    assert first_column(codec(E5M2, scale=4.0).encode(values(1e9))) == [57344]


@pytest.mark.parametrize("shape", [(), (KV_HEADS,), (KV_HEADS, WIDTH)])
def test_scales_are_per_tensor_per_head_or_per_channel(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(shape, generator=generator) + 0.5
    x = torch.randn(2, KV_HEADS, 3, WIDTH, generator=generator)
    made = codec(INT8, scale=scale)
    got = made.decode(made.encode(x))
    for b in range(2):
        for h in range(KV_HEADS):
            for t in range(3):
                for d in range(WIDTH):
                    own = scale[(h, d)[: len(shape)]]
                    assert got[b, h, t, d] == torch.round(x[b, h, t, d] / own) * own


@pytest.mark.parametrize("layer_dtype", [torch.bfloat16, torch.float16])
def test_codes_are_scaled_in_float32_and_rounded_once_to_the_layer(
    layer_dtype: torch.dtype,
) -> None:
    made = codec(INT8, layer_dtype, scale=0.1)
    codes = torch.arange(-128, 128, dtype=INT8).reshape(1, 1, -1, 1).expand(-1, KV_HEADS, -1, WIDTH)
    got = made.decode(codes)
    assert torch.equal(got, (codes.float() * torch.tensor(0.1)).to(layer_dtype))
    assert not torch.equal(got, codes.to(layer_dtype) * torch.tensor(0.1).to(layer_dtype))


def test_the_scales_follow_the_manager_and_its_state() -> None:
    config = model(
        torch.float32,
        run={"kv_cache_quant": True, "kv_cache_quant_dtype": INT8},
        num_hidden_layers=2,
    )
    made = KVCacheManager(config, kv_scales=[(0.5, 1.0), (torch.ones(KV_HEADS), 2.0)])
    assert {name for name in made.state_dict() if name.startswith("codecs")} == {
        f"codecs.{i}.scale" for i in range(4)
    }
    assert all(stored.dtype is INT8 for stored in made.past_key_values)
    assert made.get_kv_by_layer_id(1)[0].dtype is torch.float32


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: codec(INT8), ConfigError, "kv_scales must be given for an int8 cache"),
        (lambda: codec(E4M3, bound=240), ConfigError, "kv_cache_quant_bound must be None"),
        (lambda: codec(E4M3, scale=1.0, bound=500), ConfigError, "at most 448"),
        (lambda: codec(INT8, scale=1.0, bound=-1), ConfigError, "at most 127"),
        (lambda: codec(E4M3, scale=0.0), ConfigError, "kv_scales must be positive"),
        (lambda: codec(E4M3, scale=torch.ones(WIDTH + 1)), ShapeError, "kv_scales must have"),
        (lambda: codec(torch.float16), ConfigError, "kv_cache_quant_dtype must be one of"),
        (lambda: codec(torch.float32, scale=1.0), ConfigError, "kv_cache_quant_dtype"),
        (
            lambda: KVCacheManager(model(), kv_scales=[(1.0, 1.0)]),
            ConfigError,
            "kv_scales must come with kv_cache_quant",
        ),
        (
            lambda: KVCacheManager(model(run={"kv_cache_quant": True}), kv_scales=[(1.0, 1.0)] * 2),
            ConfigError,
            "a pair per layer",
        ),
    ],
)
def test_unfit_quantisation_is_refused(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
