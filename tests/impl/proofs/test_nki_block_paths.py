"""Decode on the route of nki-library's block gives golden's answer, the kernel a stand-in.

The layer chooses as on neuron, builds the kernel's arguments and takes its results; between them
`BlockStandin` computes what the kernel's documentation says, so that the whole route is held
against golden, caches of every kind included. In float64, which the kernel does not serve: that
limit is lifted. No kernel runs here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from block_tkg_standin import BlockStandin
from impl_layers import ROUNDOFF
from nki_packages import forget_operators, install_packages
from torch import Tensor

import golden
from conformance.subjects.base import InputNorm
from conformance.subjects.impl_layer import make_layer
from golden import AttentionConfig, QKNorm, RopeConfig
from impl import KVCacheManager
from impl.attention_block import AttentionBlock
from impl.kernels import nki_block_limits
from impl.strategy import KernelChoice

CACHED, SLOTS = (70, 9), 128
CHAIN = np.tril(np.ones((3, 3), dtype=bool))
TREE = golden.tree_mask([-1, 0, 0])
RUN = {"attn_block_tkg_nki_kernel_enabled": True, "batch_size": 2, "seq_len": SLOTS}


def _layer(**features: Any) -> AttentionConfig:
    sizes = {
        "hidden_size": 128,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "fused_qkv": True,
    }
    return AttentionConfig(**{**sizes, **features})


@dataclass(frozen=True)
class Path:
    """A decode step.

    Attributes:
        config: the layer.
        among: which of the step's tokens see which; None for one token.
        run: fields of `NeuronConfig`.
        own_slots: the cache is of the kind that the layer needs: rolling or chunk.
    """

    config: AttentionConfig
    among: Any = None
    run: dict[str, Any] = field(default_factory=dict)
    own_slots: bool = False


FULL = _layer(rope=RopeConfig(), learned_sinks_size=1, qkv_bias=True, o_bias=True)
YARN = golden.YarnScaling(factor=4.0, original_max_position_embeddings=16)
POLAR = RopeConfig(pairing="interleaved")
PATHS = {
    "full": Path(FULL),
    "full, draft": Path(FULL, among=CHAIN),
    "full, tree": Path(FULL, among=TREE),
    "keys as columns": Path(FULL, run={"k_cache_transposed": True}),
    "scaled rotation, scale": Path(_layer(rope=RopeConfig(scaling=YARN), softmax_scale=0.2)),
    "no rotation": Path(_layer()),
    "interleaved": Path(_layer(rope=POLAR, learned_sinks_size=1), among=CHAIN),
    "norms": Path(_layer(head_dim=128, rope=RopeConfig(), qk_norm=QKNorm())),
    "norms after": Path(
        _layer(head_dim=128, rope=POLAR, qk_norm=QKNorm(placement="post_rope")), among=CHAIN
    ),
    "window": Path(_layer(rope=RopeConfig(), sliding_window=6), among=CHAIN),
    "window, its own cache": Path(
        _layer(rope=RopeConfig(), sliding_window=20, learned_sinks_size=1),
        run={"attn_block_tkg_nki_kernel_cascaded_attention": True},
        own_slots=True,
    ),
    "chunk": Path(_layer(rope=POLAR, attention_chunk_size=32)),
    "chunk, its own cache": Path(
        _layer(rope=POLAR, attention_chunk_size=SLOTS), run={"seq_len": 2 * SLOTS}, own_slots=True
    ),
}


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[BlockStandin]:
    """The stand-in, on what layers take for neuron."""
    made = BlockStandin()
    install_packages(monkeypatch, "attention_block_tkg", made, device=True)
    served = (*nki_block_limits.DTYPES, torch.float64)
    monkeypatch.setattr(nki_block_limits, "DTYPES", served)
    choose = AttentionBlock.decode_kernel_choice

    def choice(self: AttentionBlock, *shape: int, **given: Any) -> KernelChoice:
        return choose(self, *shape, **{**given, "device_type": "neuron"})

    monkeypatch.setattr(AttentionBlock, "decode_kernel_choice", choice)
    forget_operators()
    yield made
    forget_operators()


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_route_of_the_kernel_gives_goldens_answer(path: Path, kernel: BlockStandin) -> None:
    config, rng = path.config, np.random.default_rng(0)
    weights = golden.make_weights(
        config,
        **{
            name: ("norm" in name) + 0.1 * rng.standard_normal(shape)
            for name, shape in golden.weight_shapes(config).items()
        },
    )
    q_len = 1 if path.among is None else len(path.among)
    hidden, scale = rng.standard_normal((2, q_len, 128)), 1 + 0.1 * rng.standard_normal(128)
    positions = np.array(CACHED)[:, None] + np.arange(q_len)
    shape = (2, 1, 2 * SLOTS if path.own_slots else SLOTS, config.head_dim)
    held = [rng.standard_normal(shape) for _ in range(2)]
    cache = golden.filled_cache(config, *held, np.array(CACHED))
    limits = ("sliding_window", "attention_chunk_size") if path.own_slots else ()
    made, settled = make_layer(
        config,
        {n: torch.from_numpy(getattr(weights, n)) for n in golden.weight_shapes(config)},
        positions=SLOTS,
        run={**RUN, **path.run},
        model={name: getattr(config, name) for name in limits},
        input_norm=InputNorm(weight=torch.from_numpy(scale), eps=1e-6),
    )
    at = torch.from_numpy(positions)
    k, v = (torch.from_numpy(values) for values in held)
    if path.among is not None:
        settled["active_mask"] = torch.from_numpy(np.array(path.among))[None, None]
    if path.own_slots:
        manager = KVCacheManager(made.config)
        before = torch.arange(max(CACHED)).expand(2, -1)
        before = before.masked_fill(before >= torch.tensor(CACHED)[:, None], -1)
        past = (k[:, :, : max(CACHED)], v[:, :, : max(CACHED)])
        written = manager.update_kv_by_layer_id(0, position_ids=before, kv_per_layer=past)
        manager.store(0, written)
        settled |= {"kv_mgr": manager, "idx": 0, "get_kv_per_layer": True}
    else:
        settled["past_key_value"] = (k.transpose(2, 3) if made.k_cache_transposed else k, v)
    result = made(torch.from_numpy(hidden), position_ids=at, **settled)
    assert len(kernel.calls) == 1
    assert kernel.route.count("wrap_nki") == 1
    zeros = np.zeros_like(hidden)
    seen = golden.add_and_normalise(hidden, weight=scale, residual=zeros).hidden_states
    want = golden.forward(
        config, weights, seen, position_ids=positions, cache=cache, active_mask=path.among
    )
    rows = np.arange(2)[:, None]
    expected = [want.output]
    expected += [x[rows, :, positions].transpose(0, 2, 1, 3) for x in (want.cache.k, want.cache.v)]
    got: list[Tensor] = [result.hidden_states, *result.present_key_value]
    # the longest contraction has 192 terms, 2.1e-14 of roundoff: see `ROUNDOFF` for the rest
    for ours, right in zip(got, expected, strict=True):
        assert ours.shape == right.shape
        assert np.abs(ours.numpy() - right).max() <= ROUNDOFF * np.abs(right).max()
