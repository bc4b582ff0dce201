"""A served layer written from `ServeCall` alone: golden, each stage rounded to nearest.

Nothing of how conformance evaluates a schedule is used, so that a call which told too little would
show. Methods are what planted bugs override.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import golden
from conformance.precision import native
from conformance.rounding_runs import Nearest
from conformance.subjects import LayerCall, LayerOutput, ServeCall, ServeOutput, ServeStep, StoredAs
from conformance.subjects.base import Adapters
from golden import Array


def array(tensor: torch.Tensor) -> Any:
    """The tensor as it is, floating ones as float64."""
    return tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy()


class GoldenServer:
    """A correct served layer of the `native` profile.

    Attributes:
        call: what it was called with.
        observe: rounds every stage.
        weights: the layer's arrays.
        cache: golden's.
    """

    def __init__(self, call: ServeCall) -> None:
        self.call = call
        self.dtype = next(iter(call.weights.values())).dtype
        self.observe = Nearest(native(str(self.dtype)[6:]))
        self.weights = golden.make_weights(
            call.config, **{name: array(value) for name, value in call.weights.items()}
        )
        self.cache = self.empty_cache()
        if call.keys_as is not None and call.values_as is not None:
            stored = quantisation(call.keys_as), quantisation(call.values_as)
            self.cache = golden.QuantisedCache(self.cache, *stored)
        if call.k_prior is not None and call.v_prior is not None:
            place = np.arange(call.k_prior.shape[2])
            lengths = array(call.prior_lengths)[:, None]
            positions = np.where(place < lengths, place, -1)
            self.cache = self.cache.write(array(call.k_prior), array(call.v_prior), positions)
        self.lengths = array(call.prior_lengths).copy()

    def empty_cache(self) -> Any:
        """An empty cache of the layout that the call names."""
        call, kind = self.call, self.call.cache
        config, rows, slots = call.config, call.cache_rows, call.max_length
        if kind.layout == "rolling":
            drafts = call.speculation_length
            return golden.rolling_cache(config, batch=rows, speculation_length=drafts)
        if kind.layout == "chunk":
            return golden.chunk_cache(config, batch=rows)
        if kind.layout == "paged":
            assert call.block_tables is not None
            return golden.paged_cache(
                config,
                num_blocks=call.num_blocks,
                block_size=kind.size,
                block_tables=array(call.block_tables),
            )
        if kind.layout == "sharded":
            return golden.sharded_cache(config, batch=rows, max_length=slots, cores=kind.size)
        make = golden.transposed_cache if kind.layout == "transposed" else golden.empty_cache
        return make(config, batch=rows, max_length=slots)

    def seq_ids(self, step: ServeStep) -> Any:
        """Cache rows of the batch, None for all in order."""
        return None if step.seq_ids is None else array(step.seq_ids)

    def adapter_ids(self, step: ServeStep) -> Any:
        """Adapter of each batch row."""
        assert step.adapter_ids is not None
        return array(step.adapter_ids)

    def rotary(self, step: ServeStep) -> Any:
        """Positions on M-RoPE's axes, None without."""
        return None if step.rotary_position_ids is None else array(step.rotary_position_ids)

    def written(self, step: ServeStep) -> Any:
        """Which tokens are written to the cache."""
        return array(step.kept)

    def attend(self, step: ServeStep, hidden: Array, cache: Any) -> golden.Step:
        """Output, keys and values of a step."""
        lora = None
        if self.call.adapters is not None:
            lora = low_rank(self.call.config, self.call.adapters, self.adapter_ids(step))
        return golden.attend_with_cache(
            self.call.config,
            self.weights,
            hidden,
            position_ids=array(step.position_ids),
            cache=cache,
            seq_ids=self.seq_ids(step),
            active_mask=None if step.active_mask is None else array(step.active_mask),
            rotary_position_ids=self.rotary(step),
            lora=lora,
            observe=self.observe,
        )

    def take(self, step: ServeStep) -> torch.Tensor:
        """Take one step."""
        hidden = array(step.hidden_states)
        norm = self.call.input_norm
        if norm is not None:
            residual = None if step.residual is None else array(step.residual)
            hidden = golden.add_and_normalise(
                hidden,
                weight=array(norm.weight),
                eps=norm.eps,
                residual=residual,
                observe=self.observe,
            ).hidden_states
        if step.query_lens is not None and step.key_lens is not None:
            packed = golden.packed_forward(
                self.call.config,
                self.weights,
                hidden,
                query_lens=step.query_lens,
                key_lens=step.key_lens,
                cache=self.cache,
                seq_ids=self.seq_ids(step),
                observe=self.observe,
            )
            self.cache = packed.cache
            return torch.from_numpy(packed.output).to(self.dtype)
        found = self.attend(step, hidden, self.cache)
        positions = np.where(self.written(step), found.positions, -1)
        self.cache = self.cache.write(found.k, found.v, positions, seq_ids=self.seq_ids(step))
        return torch.from_numpy(found.output).to(self.dtype)

    def follow_lengths(self, step: ServeStep) -> None:
        """Note how many tokens each cache row holds after a step."""
        if step.key_lens is not None:
            ids = np.arange(len(step.key_lens)) if step.seq_ids is None else array(step.seq_ids)
            self.lengths[ids] = step.key_lens
            return
        positions = np.where(array(step.kept), array(step.position_ids), -1)
        ids = np.arange(len(positions)) if step.seq_ids is None else array(step.seq_ids)
        for row, newest in zip(ids, positions.max(axis=1), strict=True):
            if row >= 0 and newest >= 0:
                self.lengths[row] = newest + 1

    def serve(self) -> ServeOutput:
        """Take every step and read the cache back by position."""
        outputs = []
        for step in self.call.steps:
            outputs.append(self.take(step))
            self.follow_lengths(step)
        held = self.cache.prior(self.lengths[:, None])
        stored = []
        for values in (held.k, held.v):
            shape = (*values.shape[:2], self.call.max_length, values.shape[3])
            by_position = np.zeros(shape)
            rows, slots = np.nonzero(held.positions >= 0)
            by_position[rows, :, held.positions[rows, slots]] = values[rows, :, slots]
            stored.append(torch.from_numpy(by_position).to(self.dtype))
        return ServeOutput(outputs=outputs, k_cache=stored[0], v_cache=stored[1])


def quantisation(stored: StoredAs) -> golden.Quantisation:
    """How golden stores what the call says."""
    scale = None if stored.scale is None else array(stored.scale)
    return golden.Quantisation(str(stored.dtype)[6:], scale)  # type: ignore[arg-type]


def low_rank(config: golden.AttentionConfig, adapters: Adapters, ids: Any) -> golden.Lora:
    """Golden's form of the call's adapters."""
    return golden.make_lora(
        config,
        adapter_ids=ids,
        down={name: array(value) for name, value in adapters.down.items()},
        up={name: array(value) for name, value in adapters.up.items()},
        scaling=dict.fromkeys(adapters.down, array(adapters.scaling)),
    )


def golden_server(call: ServeCall | LayerCall) -> ServeOutput | LayerOutput:
    """Serve a schedule correctly."""
    assert isinstance(call, ServeCall)
    return GoldenServer(call).serve()
