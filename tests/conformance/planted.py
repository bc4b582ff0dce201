"""Subjects with one bug each, planted in `impl`, and which cases each bug can show in.

Every bug is one that attention code has had: an off-by-one, a feature left out, a layout misread.
They change the call, or patch the one function of `impl` that they break while it runs.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import impl.attention_rotary
from conformance.cases import Case
from conformance.subjects import CoreCall, LayerCall, LayerOutput, subject
from conformance.subjects.impl import attention_layer
from impl.kernels import native
from impl.rotation import apply_rotary_polar_compatible

planted = subject(scope="layer", profile="native")


@planted
def window_one_more(call: LayerCall) -> LayerOutput:
    """A window of W admits W + 1 keys."""
    window = call.config.sliding_window
    if window is None:
        return attention_layer(call)
    return attention_layer(replace(call, config=replace(call.config, sliding_window=window + 1)))


@planted
def sink_dropped(call: LayerCall) -> LayerOutput:
    """The softmax forgets the learned sink."""
    weights = {name: value for name, value in call.weights.items() if name != "sinks"}
    config = replace(call.config, learned_sinks_size=None)
    return attention_layer(replace(call, config=config, weights=weights))


def _rotate_neighbours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    half = cos.shape[-1] // 2
    return apply_rotary_polar_compatible(q, k, cos[..., :half].float(), sin[..., :half].float())


@planted
def rope_interleaved(call: LayerCall) -> LayerOutput:
    """Layers of the half pairing rotate neighbouring channels instead."""
    with mock.patch.object(impl.attention_rotary, "apply_rotary_pos_emb", _rotate_neighbours):
        return attention_layer(call)


@planted
def kv_heads_tiled(call: LayerCall) -> LayerOutput:
    """Query head `h` reads KV head `h % kv_heads` instead of `h // group`."""
    heads, kv_heads = call.config.num_attention_heads, call.config.num_key_value_heads
    order = torch.tensor([h for first in range(kv_heads) for h in range(first, heads, kv_heads)])
    back = torch.argsort(order)

    def tiled(kernel: Callable[..., Tensor], sink_at: int) -> Callable[..., Tensor]:
        def run(q: Tensor, *rest: Any, **options: Any) -> Tensor:
            arguments = list(rest)
            if arguments[sink_at] is not None:
                arguments[sink_at] = arguments[sink_at][order]
            return kernel(q[:, order], *arguments, **options)[:, back]

        return run

    with ExitStack() as patches:
        # where the sink stands among the arguments after q
        for name, sink_at in (("context_encoding", 3), ("token_generation", 6)):
            kernel = tiled(getattr(native, name), sink_at)
            patches.enter_context(mock.patch.object(native, name, kernel))
        return attention_layer(call)


@planted
def k_bias_missing(call: LayerCall) -> LayerOutput:
    """The key projection forgets its bias."""
    weights = dict(call.weights)
    if "k_bias" in weights:
        weights["k_bias"] = torch.zeros_like(weights["k_bias"])
    return attention_layer(replace(call, weights=weights))


@planted
def scale_one_percent(call: LayerCall) -> LayerOutput:
    """The softmax scale is 1 % too large."""
    config = replace(call.config, softmax_scale=call.config.softmax_scale * 1.01)
    return attention_layer(replace(call, config=config))


@planted
def cache_slot_off_by_one(call: LayerCall) -> LayerOutput:
    """Decode writes each token one slot too far, the last slot's to slot 0."""
    update = impl.KVCacheManager.update_kv_by_layer_id

    def late(self: Any, idx: int, *, position_ids: Tensor, **rest: Any) -> Any:
        slots = (position_ids + 1) % self.caches[idx].slots
        return update(self, idx, position_ids=slots, **rest)

    with mock.patch.object(impl.KVCacheManager, "update_kv_by_layer_id", late):
        return attention_layer(call)


@planted
def zeros(call: LayerCall) -> LayerOutput:
    """Right shapes, nothing in them."""
    batch, tokens, _ = call.hidden_states.shape
    width = call.config.hidden_size
    shape = (batch, call.config.num_key_value_heads, tokens, call.config.head_dim)
    k_cache = call.hidden_states.new_zeros(shape) if call.k_cache is None else call.k_cache
    return LayerOutput(
        output=call.hidden_states.new_zeros(batch, tokens, width),
        k_cache=torch.zeros_like(k_cache),
        v_cache=torch.zeros_like(k_cache),
    )


@subject(scope="core", profile="flash")
def dies_in_half(call: CoreCall) -> Tensor:
    """The process is killed at the first call in float16, as where memory runs out."""
    if call.q.dtype == torch.float16:
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.zeros_like(call.q)


def _window_bites(case: Case) -> bool:
    """Whether a window one larger shows some row a key more."""
    window, work = case.config.sliding_window, case.workload
    last = max(work.lengths) + (work.steps if work.phase == "tkg" else 0)
    return window is not None and last > window


def _rotates_halves(case: Case) -> bool:
    return case.config.rope is not None and case.config.rope.pairing == "half"


def _tiling_differs(case: Case) -> bool:
    return case.config.group_size > 1 and case.config.num_key_value_heads > 1


@dataclass(frozen=True, kw_only=True)
class Bug:
    """A planted bug.

    Attributes:
        function: the subject.
        shows: whether a case of suite `features` must turn red, and otherwise stay green.
    """

    function: Callable[[LayerCall], LayerOutput]
    shows: Callable[[Case], bool]


BUGS: dict[str, Bug] = {
    "window W+1": Bug(function=window_one_more, shows=_window_bites),
    "sink dropped": Bug(
        function=sink_dropped, shows=lambda case: case.config.learned_sinks_size is not None
    ),
    "rope pairs interleaved": Bug(function=rope_interleaved, shows=_rotates_halves),
    "KV heads tiled": Bug(function=kv_heads_tiled, shows=_tiling_differs),
    "K bias missing": Bug(function=k_bias_missing, shows=lambda case: case.config.qkv_bias),
    "softmax scale off by 1 %": Bug(
        function=scale_one_percent, shows=lambda case: case.config.sliding_window != 1
    ),
    "cache slot off by one": Bug(
        function=cache_slot_off_by_one, shows=lambda case: case.workload.phase == "tkg"
    ),
    "zeros": Bug(function=zeros, shows=lambda case: True),
}
"""Bugs by name."""
