"""From a path to its layer, what the call takes, and what golden says it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from forward_paths import Path
from joined_cores import JoinedCores
from path_caches import (
    Served,
    Values,
    by_position,
    cached_lengths,
    golden_cache,
    out_of_reach,
    positions_before,
    rows_of,
    slots_of,
)
from path_layers import LAYERS
from torch import Tensor, nn

import golden
from conformance.subjects.base import Adapters, InputNorm
from conformance.subjects.impl_layer import Layer, make_layer
from golden import AttentionConfig
from impl import KVCacheManager
from impl.kv_cache import slot_mapping

_ROWS_ADAPTERS = [1, -1]


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

    def forward(self, **tensors: Tensor) -> tuple[Tensor, ...]:
        """Return output, K and V, and the residual if one was given."""
        past: dict[str, Any] = {}
        if "k_prior" in tensors:
            past["past_key_value"] = (tensors.pop("k_prior"), tensors.pop("v_prior"))
        if "k_buffer" in tensors:
            past["kvcache_buffer"] = [(tensors.pop("k_buffer"), tensors.pop("v_buffer"))]
        if self.manager is not None:
            past["kv_mgr"] = self.manager
        result = self.layer(**tensors, **past, **self.settled, rmsnorm=self.norm)
        residual = () if result.residual is None else (result.residual,)
        return (result.hidden_states, *result.present_key_value, *residual)


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What golden was given.

    Attributes:
        config: the layer.
        weights: its arrays.
        hidden_states: `(batch, q_len, input_size)`, after norm and residual if they are fused.
        positions: `(batch, q_len)`, -1 for padding.
        rotary_positions: positions for RoPE alone, or None.
        cache: what was cached before.
    """

    config: AttentionConfig
    weights: golden.AttentionWeights
    hidden_states: Values
    positions: Values
    rotary_positions: Values | None
    cache: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """A path ready to run.

    Attributes:
        step: the call, as a module of tensors.
        tensors: what it takes.
        expected: golden's output, K and V, and residual if there is one, float64; NaN where
            nothing is promised. K and V are those of the step `(batch, heads, q_len, head_dim)`,
            or of the whole cache, by position.
        read: turns what a step returned into arrays like `expected`.
        valid: `(batch, q_len)`, which tokens are no padding.
        keys: keys that a query sees at most.
        problem: what golden was given.
    """

    step: nn.Module
    tensors: dict[str, Tensor]
    expected: tuple[Values, ...]
    read: Callable[[Sequence[Tensor]], tuple[Values, ...]]
    valid: Values
    keys: int
    problem: Problem


class _Maker:
    """Draws a path's numbers, which every dtype holds exactly, and builds both sides from them."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self.path, self.dtype = path, dtype
        self.config = LAYERS[path.layer]
        self.rng = np.random.default_rng(0)
        self.weights = golden.make_weights(
            self.config,
            **{
                name: ("norm" in name and "bias" not in name) + 0.25 * self.draw(shape)
                for name, shape in golden.weight_shapes(self.config).items()
            },
        )
        self.batch = 1 if path.packed is not None else 2
        self.hidden = self.draw((self.batch, path.q_len, self.config.input_size))
        self.valid, self.positions = self._places()
        self.known = np.where(self.valid, self.positions, -1)
        self.norm_weight = self.draw(self.config.hidden_size)
        self.normed = "norm and residual" in path.given
        self.down, self.up = self._adapters() if "adapters" in path.given else ({}, {})

    def draw(self, shape: Any) -> Values:
        """Signed multiples of 1/32, about 1."""
        drawn: Values = np.round(32.0 * self.rng.standard_normal(shape)) / 32.0
        return drawn

    def tensor(self, array: Any) -> Tensor:
        """In the dtype of the path, if it is of floating point."""
        made = torch.from_numpy(np.array(array))
        return made.to(self.dtype) if made.is_floating_point() else made

    def _places(self) -> tuple[Values, Values]:
        """Which tokens are no padding, and the position of each."""
        path = self.path
        valid = np.ones((self.batch, path.q_len), dtype=bool)
        positions = np.stack([np.arange(path.q_len)] * self.batch)
        if path.packed is not None:
            at = [held + np.arange(new) for new, held in path.packed]
            real = np.concatenate(at)
            positions[0, : len(real)] = real
            valid[0, len(real) :] = False
        elif path.cached:
            positions += np.array(cached_lengths(path))[:, None]
        elif path.mask == "tokens" and path.run.get("padding_side") == "left":
            valid[1, : path.padding] = False
            positions[1] -= path.padding
        elif path.mask == "tokens":
            valid[1, path.q_len - path.padding :] = False
        return valid, positions

    def _adapters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Two adapters of rank 3 for every projection: what goes down, what goes up."""
        shapes = {name: golden.weight_shapes(self.config)[f"{name}_proj"] for name in "qkvo"}
        normal = self.rng.standard_normal
        down = {name: 0.3 * normal((2, 3, into)) for name, (_, into) in shapes.items()}
        up = {name: 0.3 * normal((2, out, 3)) for name, (out, _) in shapes.items()}
        return down, up

    @property
    def seq_ids(self) -> Tensor | None:
        """Cache line of each row."""
        return None if self.path.seq_ids is None else torch.tensor(self.path.seq_ids)

    @property
    def rotary_positions(self) -> Values | None:
        """Positions for RoPE alone: three axes where the layer turns by three."""
        at = np.maximum(self.positions, 0)
        if self.config.rope is not None and self.config.rope.mrope_section:
            return np.stack([at, 2 * at, 3 * at + 1])
        return 3 * at if "rotary_position_ids" in self.path.given else None

    def layer(self) -> Layer:
        """Impl's layer, and what each call of it is given besides its tensors."""
        path, config = self.path, self.config
        longest = slots_of(path) if path.cached or path.manager else path.q_len
        limits = ("sliding_window", "attention_chunk_size") if path.own_slots else ()
        model = {name: getattr(config, name) for name in limits}
        run: dict[str, Any] = {"batch_size": rows_of(path), "seq_len": longest, **path.run}
        if path.stored is not None:
            code = getattr(torch, path.stored[0].code)
            run |= {"kv_cache_quant": True, "kv_cache_quant_dtype": code}
        if run.get("flash_decoding_enabled"):
            model["num_cores_per_group"] = 2
        adapters = None
        if self.down:
            adapters = Adapters(
                ids=torch.tensor(_ROWS_ADAPTERS),
                down={name: self.tensor(a) for name, a in self.down.items()},
                up={name: self.tensor(b) for name, b in self.up.items()},
                scaling=self.tensor(np.array([0.5, 2.0])),
            )
        return make_layer(
            config,
            {name: self.tensor(getattr(self.weights, name)) for name in self._names()},
            positions=longest,
            run=run,
            model=model,
            adapters=adapters,
            input_norm=InputNorm(weight=self.tensor(self.norm_weight), eps=1e-6)
            if self.normed
            else None,
        )

    def _names(self) -> list[str]:
        return list(golden.weight_shapes(self.config))

    def call_tensors(self) -> dict[str, Tensor]:
        """What the call takes, its cache apart."""
        path = self.path
        tensors = {"hidden_states": self.tensor(self.hidden)}
        if path.packed is None:
            tensors["position_ids"] = torch.from_numpy(self.known)
        else:
            new, held = zip(*path.packed, strict=True)
            tensors["num_queries"] = torch.tensor(new)
            tensors["computed_context_lens"] = torch.tensor(held)
        if path.packed is None and not path.cached and path.mask != "none":
            square = np.tril(np.ones((1, 1, path.q_len, path.q_len), dtype=bool))
            tensors["attention_mask"] = self.tensor(self.valid if path.mask == "tokens" else square)
        if path.cached and "attention_mask" in path.given:
            before = np.array(cached_lengths(path))[:, None]
            tensors["attention_mask"] = self.tensor(np.arange(slots_of(path)) < before)
        if path.among is not None:
            tensors["active_mask"] = self.tensor(path.among[None, None])
        if self.normed:
            tensors["residual"] = torch.ones_like(tensors["hidden_states"])
        if self.down:
            tensors["adapter_ids"] = torch.tensor(_ROWS_ADAPTERS)
        if self.seq_ids is not None:
            tensors["seq_ids"] = self.seq_ids
        if self.rotary_positions is not None:
            tensors["rotary_position_ids"] = torch.from_numpy(self.rotary_positions)
        return tensors

    def golden_result(self, cache: Any) -> tuple[Values, Any, Values | None]:
        """Golden's output, its cache after the call, and the residual that goes on."""
        path = self.path
        seen, residual = self.hidden, None
        if self.normed:
            seen, residual = golden.add_and_normalise(
                seen, weight=self.norm_weight, residual=np.ones_like(seen)
            )
        self.seen = seen
        if path.packed is not None:
            packed = golden.packed_forward(
                self.config,
                self.weights,
                seen,
                query_lens=[new for new, _ in path.packed],
                key_lens=[new + held for new, held in path.packed],
                cache=cache,
            )
            return packed.output, packed.cache, residual
        result = golden.forward(
            self.config,
            self.weights,
            seen,
            position_ids=self.known,
            cache=cache,
            seq_ids=path.seq_ids,
            active_mask=path.among,
            rotary_position_ids=self.rotary_positions,
            lora=golden.make_lora(
                self.config,
                adapter_ids=_ROWS_ADAPTERS,
                down=self.down,
                up=self.up,
                scaling={name: np.array([0.5, 2.0]) for name in self.down},
            ),
        )
        return result.output, result.cache, residual

    def lengths_after(self) -> Values:
        """Tokens of each row of the cache after the call."""
        path = self.path
        if path.packed is not None:
            return np.array([new + held for new, held in path.packed])
        lengths = np.zeros(rows_of(path), dtype=np.int64)
        lines = range(2) if path.seq_ids is None else path.seq_ids
        for line, newest in zip(lines, self.known.max(axis=1), strict=True):
            if line >= 0:
                lengths[line] = newest + 1
        return lengths


def build(path: Path, dtype: torch.dtype) -> Built:
    """Make a path's layer and inputs, and golden's answer."""
    maker = _Maker(path, dtype)
    cache, before = golden_cache(path, maker.config), positions_before(path)
    width = before.shape[1] if path.manager or not path.cached else slots_of(path)
    shape = (len(before), maker.config.num_key_value_heads, width, maker.config.head_dim)
    k, v = maker.draw(shape), maker.draw(shape)  # beyond a row's length slots hold anything
    held = before.shape[1]
    if held:
        cache = cache.write(k[:, :, :held], v[:, :, :held], before, seq_ids=path.seq_ids)
    layer, settled = maker.layer()
    tensors = maker.call_tensors()
    output, after, residual = maker.golden_result(cache)
    lengths = maker.lengths_after()
    norm = settled.pop("rmsnorm", None)
    if "cos_cache" in path.given:
        tensors["cos_cache"], tensors["sin_cache"] = layer.rotary_emb(
            tensors["hidden_states"], tensors["position_ids"]
        )
    settled["windowed_context_encoding_window_idx"] = path.window
    step: nn.Module
    expected: tuple[Values, ...]
    if path.manager:
        served = Served.of(path, layer.config)
        if held:
            served.write(maker.tensor(k), maker.tensor(v), before, maker.seq_ids)
        if served.tables is not None:
            tensors["active_block_table"] = served.tables
        if "scatter_index" in path.given:
            at = torch.from_numpy(maker.known)
            size = path.run["pa_block_size"]
            assert served.tables is not None
            tensors["scatter_index"] = slot_mapping(served.tables, at, size)
        settled |= {"get_kv_per_layer": path.cached or path.packed is not None}
        settled |= {"update_kv_per_layer": True, "idx": 0}
        if "kvcache_buffer" in path.given:
            own = served.managers[0].past_key_values
            tensors |= {"k_buffer": own[0].clone(), "v_buffer": own[1].clone()}
            served.managers[0].reset()
            settled |= {"seq_len": slots_of(path) - 1, "is_for_context_encoding": False}
        step = Step(layer, served.managers[0], norm, settled)
        if path.cores > 1:
            step = JoinedCores(layer, served.managers)
        held_after = by_position(*after.prior(lengths[:, None]), served.length)
        hidden = out_of_reach(maker.config, lengths, served.length)[:, None, :, None]
        expected = tuple(np.where(hidden, np.nan, values) for values in held_after)
        of_keys = served.reader(lengths)
    else:
        if path.cached:
            k_prior = maker.tensor(k.swapaxes(2, 3) if layer.k_cache_transposed else k)
            tensors |= {"k_prior": k_prior, "v_prior": maker.tensor(v)}
        step = Step(layer, None, norm, settled)
        expected, of_keys = _of_step(maker, after), _as_arrays
    output = np.where(maker.valid[..., None], output, np.nan)
    if path.seq_ids is not None:
        output[np.array(path.seq_ids) < 0] = np.nan
    rest = () if residual is None else (residual,)
    count = len(expected) * path.cores

    def read(results: Sequence[Tensor]) -> tuple[Values, ...]:
        first, *others = (result.detach() for result in results)
        return (first.numpy(), *of_keys(others[:count]), *_as_arrays(others[count:]))

    return Built(
        step=step.eval().requires_grad_(False),
        tensors=tensors,
        expected=(output, *expected, *rest),
        read=read,
        valid=maker.valid,
        keys=slots_of(path),
        problem=Problem(
            config=maker.config,
            weights=maker.weights,
            hidden_states=maker.seen,
            positions=maker.known,
            rotary_positions=maker.rotary_positions,
            cache=cache,
        ),
    )


def _of_step(maker: _Maker, after: Any) -> tuple[Values, Values]:
    """Golden's K and V of the step's own tokens, NaN for padding."""
    rows, valid = np.arange(maker.batch)[:, None], maker.valid
    at = maker.positions
    if maker.path.packed is not None:  # each token in the cache row of its sequence
        new = [count for count, _ in maker.path.packed]
        owners = np.repeat(np.arange(len(new)), new)
        rows = np.pad(owners, (0, valid.shape[1] - len(owners)))[None]
    found = [
        np.where(valid[..., None, None], held[rows, :, np.maximum(at, 0)], np.nan)
        for held in (after.k, after.v)
    ]
    return found[0].swapaxes(1, 2), found[1].swapaxes(1, 2)


def _as_arrays(tensors: Sequence[Tensor]) -> tuple[Values, ...]:
    return tuple(tensor.numpy() for tensor in tensors)
