"""Backward through every path that trains is golden's vector-Jacobian product.

In 16 bits the judge decides, row by row; in float64, which it does not know, and in float32, whose
roundings it knows too, one limit for each gradient finds any formula that is wrong.

Limits, relative to the largest value of each gradient. Forward, four contractions of fewer than 100
terms follow each other (`ROUNDOFF` in impl_layers.py); backward, each of them becomes two, so three
times as many in all. The first-order error of a sequence of operations is proportional to the unit
roundoff, so float32's limit is float64's times 2^29.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from forward_paths import PATHS
from impl_layers import ROUNDOFF
from path_build import Built, build
from path_layers import LAYERS
from torch import Tensor

import golden
from conformance.cases import Case, Workload
from conformance.runner import judge_case
from conformance.subjects import load_subject
from impl import NeuronAttentionBase

LIMITS = {torch.float64: 3 * ROUNDOFF, torch.float32: 3 * ROUNDOFF * 2.0**29}
TRAINED = [
    name
    for name, path in PATHS.items()
    if path.mask != "square" and not (path.manager or path.given or path.run)
    # the limits are for sums of 100 terms; test_impl_kernels_flash.py has the streamed gradient
    if max(path.q_len, path.slots) < 100
    if path.among is None or np.array_equal(path.among, np.tril(path.among | True))
]
_NAMES = {
    "q_proj.weight": "q_proj",
    "k_proj.weight": "k_proj",
    "v_proj.weight": "v_proj",
    "q_proj.bias": "q_bias",
    "k_proj.bias": "k_bias",
    "v_proj.bias": "v_bias",
    "o_proj.weight": "o_proj",
    "o_proj.bias": "o_bias",
    "q_layernorm.weight": "q_norm",
    "k_layernorm.weight": "k_norm",
    "q_layernorm.bias": "q_norm_bias",
    "k_layernorm.bias": "k_norm_bias",
    "learned_sinks.sink": "sinks",
}

Gradients = dict[str, np.ndarray[Any, Any]]


def cotangents(built: Built) -> list[np.ndarray[Any, Any]]:
    """Draw cotangents of output, K and V, which float32 holds; padded keys have none."""
    rng = np.random.default_rng(1)
    drawn = [np.round(32.0 * rng.standard_normal(e.shape)) / 32.0 for e in built.expected]
    for of_keys in drawn[1:]:
        of_keys *= built.valid[:, None, :, None]
    return drawn


def autograd(built: Built, upstream: list[np.ndarray[Any, Any]]) -> Gradients:
    """What autograd finds, by golden's names."""
    with torch.enable_grad():
        built.step.requires_grad_(True)
        named = {".".join(name.split(".")[-2:]): p for name, p in built.step.named_parameters()}
        held = ("hidden_states", "k_prior", "v_prior")
        inputs = {n: t.requires_grad_(True) for n, t in built.tensors.items() if n in held}
        results = built.step(**built.tensors)
        wanted = {**named, **inputs}
        found = torch.autograd.grad(
            results,
            list(wanted.values()),
            [torch.from_numpy(d).to(r.dtype) for d, r in zip(upstream, results, strict=True)],
        )
    return {
        _NAMES.get(name, name): gradient.to(torch.float64).numpy()
        for name, gradient in zip(wanted, found, strict=True)
    }


def expected_gradients(built: Built, upstream: list[np.ndarray[Any, Any]]) -> Gradients:
    """Golden's gradients by the same names; a fused projection's are fused."""
    given = built.problem
    decodes = "k_prior" in built.tensors
    vjp = golden.token_generation_vjp if decodes else golden.context_encoding_vjp
    row, token = np.nonzero(built.valid)
    after = []
    for of_keys in upstream[1:]:
        of_cache = np.zeros_like(given.cache.k)
        of_cache[row, :, given.positions[row, token]] = of_keys[row, :, token]
        after.append(of_cache)
    found = vjp(
        given.config,
        given.weights,
        given.hidden_states,
        upstream[0],
        position_ids=given.positions,
        rotary_position_ids=given.rotary_positions,
        cache=given.cache,
        d_cache_k=after[0],
        d_cache_v=after[1],
    )
    named = {name: getattr(found.weights, name) for name in golden.weight_shapes(given.config)}
    if given.config.fused_qkv:
        weight, bias = golden.fuse_qkv(found.weights)
        apart = {f"{name}_{kind}" for name in "qkv" for kind in ("proj", "bias")}
        named = {name: values for name, values in named.items() if name not in apart}
        named |= {"Wqkv.weight": weight, "Wqkv.bias": bias}
    named["hidden_states"] = found.hidden_states
    if decodes:
        # the call does not write to what it is given; a slot it would write to is not read either
        named |= {"k_prior": found.cache_k, "v_prior": found.cache_v}
    return named


def worst(built: Built) -> float:
    """Largest difference over the largest value, of every gradient."""
    upstream = cotangents(built)
    got, expected = autograd(built, upstream), expected_gradients(built, upstream)
    assert got.keys() == expected.keys()
    return max(
        float(np.abs(got[name] - expected[name]).max() / np.abs(expected[name]).max())
        for name in expected
    )


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", TRAINED)
def test_backward_is_goldens_vector_jacobian_product(name: str, dtype: torch.dtype) -> None:
    assert worst(build(PATHS[name], dtype)) <= LIMITS[dtype]


def test_every_kind_of_layer_trains_in_every_phase_that_it_has_a_path_for() -> None:
    kinds = {(PATHS[name].layer, PATHS[name].cached) for name in TRAINED}
    assert kinds >= {(layer, True) for layer in LAYERS}
    assert kinds >= {
        (path.layer, False) for path in PATHS.values() if path.packed is None and not path.cached
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "work",
    [
        Workload(phase="cte", lengths=(17, 5), backward=True),
        Workload(phase="tkg", lengths=(10, 4), backward=True),
    ],
    ids=["prefill", "decode"],
)
@pytest.mark.parametrize(
    "layer", [x for x in LAYERS if not isinstance(LAYERS[x], golden.Eagle3AttentionConfig)]
)
def test_the_judge_finds_no_gradient_off(layer: str, work: Workload, dtype: str) -> None:
    case = Case(config=LAYERS[layer], workload=work, dtype=dtype)
    record = judge_case(case, load_subject("impl"))
    assert record.verdict == "CONFORMS", f"{case.id}: {record.reason}"
    assert not record.vacuous


class _Scaled(torch.autograd.Function):
    """Passes values on, and gradients with a relative error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, error: float) -> Tensor:
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * (1.0 + ctx.error), None


@pytest.mark.parametrize("dtype", LIMITS)
def test_a_gradient_slightly_off_is_found(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    sinks = NeuronAttentionBase.get_learned_sinks
    error = 4 * LIMITS[dtype]
    monkeypatch.setattr(
        NeuronAttentionBase,
        "get_learned_sinks",
        lambda self, *stage, **named: _Scaled.apply(sinks(self, *stage, **named), error),
    )
    assert worst(build(PATHS["prefill full"], dtype)) > LIMITS[dtype]
