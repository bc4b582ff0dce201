"""Every forward path and every kind of layer, once: the table that the proofs run through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import golden
from conformance.subjects.base import Adapters, InputNorm
from conformance.subjects.impl_layer import make_layer
from golden import AttentionConfig, Llama3Scaling, QKNorm, RopeConfig, TemperatureTuning
from impl import InferenceConfig, KVCacheManager
from impl.kv_cache import slot_mapping

CACHED, BLOCK = (7, 4), 4
"""Tokens that each row of the batch has cached before a step that reads a cache; a page's slots."""


def _layer(**features: Any) -> AttentionConfig:
    sizes = {
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    return AttentionConfig(**{**sizes, **features})


_LLAMA3 = Llama3Scaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
_YARN = golden.YarnScaling(factor=4.0, original_max_position_embeddings=16, truncate=False)
_POLAR = RopeConfig(pairing="interleaved")
LAYERS = {
    "full": _layer(rope=RopeConfig(), learned_sinks_size=1, qkv_bias=True, o_bias=True),
    "window": _layer(rope=RopeConfig(scaling=_YARN), sliding_window=4, qk_norm=QKNorm()),
    "window-polar": _layer(rope=_POLAR, sliding_window=3, learned_sinks_size=1),
    "chunk": _layer(
        rope=_POLAR,
        attention_chunk_size=4,
        qk_norm=QKNorm(placement="post_rope", weighted=False),
    ),
    "nope": _layer(
        num_key_value_heads=6,
        temperature_tuning=TemperatureTuning(floor_scale=4.0, attn_scale=0.5),
        qk_norm=QKNorm(kind="layer", eps=1e-5),
        softcap=5.0,
    ),
    "fused": _layer(
        num_key_value_heads=1,
        fused_qkv=True,
        qkv_bias=True,
        clip_qkv=1.5,
        rope=RopeConfig(rotary_dim=4, scaling=_LLAMA3),
    ),
    "dynamic": _layer(
        rope=RopeConfig(
            scaling=golden.DynamicNTKScaling(factor=2.0, original_max_position_embeddings=4)
        )
    ),
    "flat-norm": _layer(qk_norm=QKNorm(scope="projection"), rope=RopeConfig(rotary_dim=4)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Path:
    """One call of forward.

    Attributes:
        layer: a key of `LAYERS`.
        q_len: tokens of the call.
        cached: whether the cache holds `CACHED` tokens before it.
        among: which of a decode step's own tokens see which, `(q_len, q_len)`, bool; None in
            prefill and for one token.
        mask: of a prefill: `tokens` `(batch, seq_len)`, `square` `(1, 1, seq_len, seq_len)`, or
            `none`.
        manager: whether the layer reads and writes its cache itself.
        own_slots: whether that cache is of the kind the layer needs: rolling, chunk or paged.
        given: further arguments of forward: `norm and residual`, `adapters`, `cos_cache`,
            `rotary_position_ids`, `windowed_context_encoding_window_idx`.
        run: fields of `NeuronConfig`.
    """

    layer: str
    q_len: int = 5
    cached: bool = False
    among: np.ndarray[Any, Any] | None = None
    mask: str = "tokens"
    manager: bool = False
    own_slots: bool = False
    given: tuple[str, ...] = ()
    run: Mapping[str, Any] = field(default_factory=dict)


_PAGES = {"is_block_kv_layout": True, "pa_num_blocks": 8, "pa_block_size": BLOCK}
_TABLES = torch.tensor([[5, 2, 7], [0, 3, 6]])
_ROWS_ADAPTERS = [1, -1]
_CHAIN = np.tril(np.ones((3, 3), dtype=bool))
_TREE = golden.tree_mask([-1, 0, 0])
PATHS: dict[str, Path] = {
    **{f"prefill {layer}": Path(layer=layer) for layer in LAYERS},
    **{f"decode {layer}": Path(layer=layer, q_len=1, cached=True) for layer in LAYERS},
    "prefill full, square mask": Path(layer="full", mask="square"),
    "prefill window, no mask": Path(layer="window", mask="none"),
    "prefill chunk, no mask": Path(layer="chunk", mask="none"),
    "prefill full, cache written": Path(layer="full", manager=True),
    "prefill full, fused norm and residual": Path(layer="full", given=("norm and residual",)),
    "prefill full, adapters": Path(layer="full", given=("adapters",)),
    "decode full, adapters": Path(layer="full", q_len=1, cached=True, given=("adapters",)),
    "prefill window, positions for RoPE": Path(layer="window", given=("rotary_position_ids",)),
    "prefill full, cos and sin given": Path(layer="full", given=("cos_cache", "sin_cache")),
    "decode full, draft": Path(layer="full", q_len=3, cached=True, among=_CHAIN),
    "decode window, draft": Path(layer="window", q_len=3, cached=True, among=_CHAIN),
    "decode full, tree": Path(layer="full", q_len=3, cached=True, among=_TREE),
    "decode full, cache read and written": Path(layer="full", q_len=1, cached=True, manager=True),
    "decode full, draft, cache read and written": Path(
        layer="full", q_len=3, cached=True, among=_CHAIN, manager=True
    ),
    **{
        f"prefill {layer}, second window": Path(
            layer=layer,
            cached=True,
            given=("windowed_context_encoding_window_idx",),
            run={"windowed_context_encoding_size": 5},
        )
        for layer in ("full", "window", "chunk", "nope")
    },
    **{
        f"prefill {layer} after a cached prefix": Path(
            layer=layer, q_len=129, cached=True, run={"is_prefix_caching": True}
        )
        for layer in ("full", "window-polar")
    },
    **{
        f"decode {layer}, its own cache": Path(
            layer=layer, q_len=1, cached=True, manager=True, own_slots=True
        )
        for layer in ("window", "window-polar", "chunk")
    },
    "decode window, draft, its own cache": Path(
        layer="window",
        q_len=3,
        cached=True,
        among=_CHAIN,
        manager=True,
        own_slots=True,
        run={"speculation_length": 3},
    ),
    "decode full, pages": Path(
        layer="full", q_len=1, cached=True, manager=True, own_slots=True, run=_PAGES
    ),
    "decode fused, transposed keys": Path(
        layer="fused", q_len=1, cached=True, run={"k_cache_transposed": True}
    ),
    "decode fused, transposed keys, cache read and written": Path(
        layer="fused", q_len=1, cached=True, manager=True, run={"k_cache_transposed": True}
    ),
}


class Step(nn.Module):
    """One call of forward with all but its tensors settled.

    Args:
        layer: the layer.
        manager: the cache it reads and writes, or None.
        norm: norm of the hidden states to fuse, or None.
        settled: arguments of forward that are no tensors.
    """

    def __init__(
        self,
        layer: nn.Module,
        manager: KVCacheManager | None,
        norm: nn.Module | None,
        settled: dict[str, Any],
    ) -> None:
        super().__init__()
        self.layer, self.manager, self.norm = layer, manager, norm
        self.settled = settled

    def forward(self, **tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return output, K and V."""
        past = {}
        if "k_prior" in tensors:
            past["past_key_value"] = (tensors.pop("k_prior"), tensors.pop("v_prior"))
        if self.manager is not None:
            past["kv_mgr"] = self.manager
        result = self.layer(**tensors, **past, **self.settled, rmsnorm=self.norm)
        return (result.hidden_states, *result.present_key_value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What golden was given.

    Attributes:
        config: the layer.
        weights: its arrays.
        hidden_states: `(batch, q_len, hidden_size)`, after norm and residual if they are fused.
        positions: `(batch, q_len)`, -1 for padding.
        cache: what was cached before.
    """

    config: AttentionConfig
    weights: golden.AttentionWeights
    hidden_states: np.ndarray[Any, Any]
    positions: np.ndarray[Any, Any]
    cache: golden.ContiguousCache


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """A path ready to run.

    Attributes:
        step: the call, as a module of tensors.
        tensors: what it takes.
        expected: golden's output, K and V, float64, in the order of the step's; output alone
            where a cache keeps K and V in slots of its own.
        valid: `(batch, q_len)`, which tokens are no padding.
        problem: what golden was given.
    """

    step: Step
    tensors: dict[str, Tensor]
    expected: tuple[np.ndarray[Any, Any], ...]
    valid: np.ndarray[Any, Any]
    problem: Problem


def build(path: Path, dtype: torch.dtype) -> Built:
    """Make a path's layer and inputs, which every dtype holds exactly."""
    config = LAYERS[path.layer]
    rng = np.random.default_rng(0)

    def draw(shape: Any) -> np.ndarray[Any, Any]:
        drawn: np.ndarray[Any, Any] = np.round(32.0 * rng.standard_normal(shape)) / 32.0
        return drawn

    weights = golden.make_weights(
        config,
        **{
            name: ("norm" in name and "bias" not in name) + 0.25 * draw(shape)
            for name, shape in golden.weight_shapes(config).items()
        },
    )
    hidden = draw((2, path.q_len, config.hidden_size))
    positions = np.stack([np.arange(path.q_len)] * 2)
    valid = np.ones_like(positions, dtype=bool)
    slots = 12 if path.q_len < 6 else max(CACHED) + path.q_len
    cache = golden.empty_cache(config, batch=2, max_length=slots)
    if path.cached:
        positions += np.array(CACHED)[:, None]
        shape = (2, config.num_key_value_heads, slots, config.head_dim)
        held = [draw(shape) for _ in range(2)]
        if path.manager:  # what a manager never wrote is zero; elsewhere slots hold anything
            for row, length in enumerate(CACHED):
                for values in held:
                    values[row, :, length:] = 0.0
        cache = golden.filled_cache(config, *held, np.array(CACHED))
    elif path.mask == "tokens":
        valid[1, 3:] = False

    known = np.where(valid, positions, -1)

    def tensor(array: Any) -> Tensor:
        made = torch.from_numpy(np.array(array))
        return made.to(dtype) if made.is_floating_point() else made

    longest = slots if path.cached or path.manager else path.q_len
    limits = ("sliding_window", "attention_chunk_size") if path.own_slots else ()
    seen, scale = hidden, draw(config.hidden_size)
    if "norm and residual" in path.given:
        ones = np.ones_like(hidden)
        seen = golden.add_and_normalise(hidden, weight=scale, residual=ones).hidden_states
    down, up = _adapters(config, rng) if "adapters" in path.given else ({}, {})
    layer, settled = make_layer(
        config,
        {name: tensor(getattr(weights, name)) for name in golden.weight_shapes(config)},
        positions=longest,
        run={"batch_size": 2, "seq_len": longest, **path.run},
        model={name: getattr(config, name) for name in limits},
        adapters=Adapters(
            ids=torch.tensor(_ROWS_ADAPTERS),
            down={name: tensor(a) for name, a in down.items()},
            up={name: tensor(b) for name, b in up.items()},
            scaling=tensor(np.array([0.5, 2.0])),
        )
        if down
        else None,
        input_norm=InputNorm(weight=tensor(scale), eps=1e-6)
        if "norm and residual" in path.given
        else None,
    )
    k_cache, v_cache = tensor(cache.k), tensor(cache.v)
    tensors = {"hidden_states": tensor(hidden), "position_ids": torch.from_numpy(known)}
    if not path.cached and path.mask != "none":
        square = np.tril(np.ones((1, 1, path.q_len, path.q_len), dtype=bool))
        tensors["attention_mask"] = tensor(valid if path.mask == "tokens" else square)
    if path.among is not None:
        tensors["active_mask"] = tensor(path.among[None, None])
    manager = None
    if path.manager:
        manager, tables = _filled(path, layer.config, (k_cache, v_cache), known)
        tensors |= tables
        settled |= {"get_kv_per_layer": path.cached, "update_kv_per_layer": True, "idx": 0}
    elif path.cached:
        k_prior = k_cache.transpose(2, 3) if layer.k_cache_transposed else k_cache
        tensors |= {"k_prior": k_prior.contiguous(), "v_prior": v_cache}
    spread = None
    if "norm and residual" in path.given:
        tensors["residual"] = torch.ones_like(tensors["hidden_states"])
    if down:
        tensors["adapter_ids"] = torch.tensor(_ROWS_ADAPTERS)
    if "windowed_context_encoding_window_idx" in path.given:
        settled["windowed_context_encoding_window_idx"] = 1
    if "rotary_position_ids" in path.given:
        spread = 3 * positions
        tensors["rotary_position_ids"] = torch.from_numpy(spread)
    if "cos_cache" in path.given:
        tensors["cos_cache"], tensors["sin_cache"] = layer.rotary_emb(
            tensors["hidden_states"], tensors["position_ids"]
        )
    result = golden.forward(
        config,
        weights,
        seen,
        position_ids=known,
        cache=cache,
        active_mask=path.among,
        rotary_position_ids=spread,
        lora=golden.make_lora(
            config,
            adapter_ids=_ROWS_ADAPTERS,
            down=down,
            up=up,
            scaling={name: np.array([0.5, 2.0]) for name in down},
        ),
    )
    keys: tuple[np.ndarray[Any, Any], ...] = (result.cache.k, result.cache.v)
    if path.own_slots:
        keys = ()
    elif not path.manager:
        rows = np.arange(2)[:, None]
        keys = tuple(held[rows, :, positions].transpose(0, 2, 1, 3) for held in keys)
    elif layer.k_cache_transposed:
        keys = (keys[0].transpose(0, 1, 3, 2), keys[1])
    step = Step(layer, manager, settled.pop("rmsnorm", None), settled).eval().requires_grad_(False)
    problem = Problem(
        config=config, weights=weights, hidden_states=seen, positions=known, cache=cache
    )
    return Built(
        step=step,
        tensors=tensors,
        expected=(result.output, *keys),
        valid=valid,
        problem=problem,
    )


def _adapters(
    config: AttentionConfig, rng: np.random.Generator
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draw two adapters of rank 3 for every projection: what goes down, what goes up."""
    shapes = {name: golden.weight_shapes(config)[f"{name}_proj"] for name in "qkvo"}
    down = {name: 0.3 * rng.standard_normal((2, 3, into)) for name, (_, into) in shapes.items()}
    up = {name: 0.3 * rng.standard_normal((2, out, 3)) for name, (out, _) in shapes.items()}
    return down, up


def _filled(
    path: Path,
    config: InferenceConfig,
    held: tuple[Tensor, Tensor],
    positions: np.ndarray[Any, Any],
) -> tuple[KVCacheManager, dict[str, Tensor]]:
    """Make the cache of a path, write what it holds, and return what a call to it takes besides."""
    tables: dict[str, Tensor] = {}
    manager = KVCacheManager(config)
    before = torch.arange(max(CACHED)).expand(2, -1)
    before = before.masked_fill(before >= torch.tensor(CACHED)[:, None], -1)
    past: dict[str, Tensor] = {}
    if "pa_block_size" in path.run:
        past = {
            "active_block_table": _TABLES,
            "scatter_index": slot_mapping(_TABLES, before, BLOCK),
        }
        slots = slot_mapping(_TABLES, torch.from_numpy(positions), BLOCK)
        tables = {"active_block_table": _TABLES, "scatter_index": slots}
    if path.cached:
        k, v = (values[:, :, : max(CACHED)] for values in held)
        manager.store(
            0, manager.update_kv_by_layer_id(0, position_ids=before, kv_per_layer=(k, v), **past)
        )
    return manager, tables
