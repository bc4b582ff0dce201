"""Correct attention kernels that round at different places and sum in different orders.

Each claims the profile it keeps to; none of them may ever fail. `flash_reversed`, `split_merged`
and the tile sizes differ in the order of sums alone, `exact_inside` and `float32_inside` round
less than they claim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from conformance import expected, runner
from conformance.cases import Case
from conformance.error_model import ErrorScale
from conformance.expected import Inputs, Reference
from conformance.precision import PrecisionProfile
from conformance.subjects import CoreCall, LayerCall, LayerOutput, Subject, load_subject, subject
from impl.kernels import native

Kernel = Callable[[CoreCall], Tensor]


@contextmanager
def shared_work() -> Iterator[None]:
    """Do what depends on the case and the profile alone once, for all subjects judged in here.

    Inputs and golden outputs are kept for the latest case, predicted errors for all of them. The
    prediction reads the case (whose checksum is its seed) and the profile, never the subject.
    """
    known: dict[tuple[str, str, int], Mapping[str, ErrorScale]] = {}
    prediction = runner.predicted
    inputs_of = lru_cache(maxsize=1)(runner.inputs_of)
    latest: dict[Case, Reference] = {}

    def reference(case: Case, inputs: Inputs) -> Reference:
        if case not in latest:
            latest.clear()
            latest[case] = expected.reference(case, inputs)
        return latest[case]

    def predicted(
        case: Case, inputs: Inputs, exact: Reference, profile: PrecisionProfile, *, runs: int
    ) -> Mapping[str, ErrorScale]:
        key = (profile.name, case.id, runs)
        if key not in known:
            known[key] = prediction(case, inputs, exact, profile, runs=runs)
        return known[key]

    with mock.patch.multiple(runner, inputs_of=inputs_of, reference=reference, predicted=predicted):
        yield


def per_query_head(kv: Tensor, q: Tensor) -> Tensor:
    """Repeat each KV head for the query heads that read it."""
    return kv.repeat_interleave(q.shape[1] // kv.shape[1], dim=1)


def masked_scores(call: CoreCall, dtype: torch.dtype) -> Tensor:
    """Scores with every stage stored in `dtype`, -inf where masked."""
    k = per_query_head(call.k, call.q)
    scores = call.q.to(dtype) @ k.to(dtype).transpose(2, 3) * call.softmax_scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    return scores.masked_fill(~call.mask, float("-inf"))


def sink_logits(call: CoreCall, dtype: torch.dtype) -> Tensor:
    """Sink of each row, -inf without one, `(1, num_attention_heads, 1, 1)`."""
    if call.sinks is None:
        return torch.full((1, call.q.shape[1], 1, 1), float("-inf"), dtype=dtype)
    return call.sinks.to(dtype).view(1, -1, 1, 1)


def softmax(scores: Tensor, sink: Tensor) -> Tensor:
    """Normalised weights; zeros in a row that sees nothing."""
    top = torch.maximum(scores.amax(dim=-1, keepdim=True), sink)
    top = top.masked_fill(top == float("-inf"), 0.0)
    exps = torch.exp(scores - top)
    total = exps.sum(dim=-1, keepdim=True) + torch.exp(sink - top)
    return exps / total.masked_fill(total == 0, 1.0)


@subject(profile="eager")
def eager(call: CoreCall) -> Tensor:
    """Operator by operator in the model's dtype, softmax in float32."""
    scores = masked_scores(call, call.q.dtype).float()
    weights = softmax(scores, sink_logits(call, torch.float32)).to(call.v.dtype)
    return weights @ per_query_head(call.v, call.q)


def all_in(call: CoreCall, dtype: torch.dtype) -> Tensor:
    """Everything in `dtype`, the output cast once at the end."""
    weights = softmax(masked_scores(call, dtype), sink_logits(call, dtype))
    return (weights @ per_query_head(call.v, call.q).to(dtype)).to(call.q.dtype)


@subject(profile="flash")
def float32_inside(call: CoreCall) -> Tensor:
    """Float32 inside, whatever the model's dtype."""
    return all_in(call, torch.float32)


@subject(profile="flash")
def exact_inside(call: CoreCall) -> Tensor:
    """Float64 inside: more exact than any profile claims."""
    return all_in(call, torch.float64)


@subject(profile="native")
def native_kernel(call: CoreCall) -> Tensor:
    """The production module's own prefill kernel."""
    rule = native.ScoreRule(divisor=1.0 / call.softmax_scale, softcap=call.softcap)
    return native.context_encoding(call.q, call.k, call.v, call.mask, call.sinks, rule)


@subject(profile="native")
def native_split(call: CoreCall) -> Tensor:
    """The production module's own decode kernel, the last key as the active one."""
    rule = native.ScoreRule(divisor=1.0 / call.softmax_scale, softcap=call.softcap)
    return native.token_generation(
        call.q,
        call.k[:, :, -1:],
        call.v[:, :, -1:],
        call.k[:, :, :-1],
        call.v[:, :, :-1],
        call.mask[..., :-1],
        call.mask[..., -1:],
        call.sinks,
        rule,
    )


def streamed(call: CoreCall, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Online softmax over tiles of keys, unnormalised.

    Returns:
        The sum of weights times values and the sum of weights, both relative to the exponential of
        the third, the largest score; all float32.
    """
    scores = masked_scores(call, torch.float32)
    v = per_query_head(call.v, call.q)
    rows = scores.shape[:-1]
    top = torch.full((*rows, 1), float("-inf"))
    total = torch.zeros(*rows, 1)
    mixed = torch.zeros(*rows, v.shape[-1])
    for start in range(0, scores.shape[-1], tile):
        part = scores[..., start : start + tile]
        new_top = torch.maximum(top, part.amax(dim=-1, keepdim=True))
        base = new_top.masked_fill(new_top == float("-inf"), 0.0)
        weights = torch.exp(part - base)
        shrink = torch.exp(top - base)
        total = total * shrink + weights.sum(dim=-1, keepdim=True)
        stored = weights.to(call.v.dtype).float()
        mixed = mixed * shrink + stored @ v[:, :, start : start + tile].float()
        top = new_top
    return mixed, total, top


def finished(call: CoreCall, mixed: Tensor, total: Tensor, top: Tensor) -> Tensor:
    """Add the sink to the sum of weights, divide, and store."""
    sink = sink_logits(call, torch.float32)
    base = torch.maximum(top, sink)
    base = base.masked_fill(base == float("-inf"), 0.0)
    shrink = torch.exp(top - base)
    total = total * shrink + torch.exp(sink - base)
    return (mixed * shrink / total.masked_fill(total == 0, 1.0)).to(call.q.dtype)


def flash(tile: int) -> Kernel:
    """Return a flash-style kernel with tiles of that many keys."""

    @subject(profile="flash")
    def kernel(call: CoreCall) -> Tensor:
        return finished(call, *streamed(call, tile))

    return kernel


def keys_between(call: CoreCall, first: int, last: int) -> CoreCall:
    """The same call with some of its keys alone."""
    keys = slice(first, last)
    return replace(
        call,
        k=call.k[:, :, keys],
        v=call.v[:, :, keys],
        mask=call.mask[..., keys],
        kv_positions=call.kv_positions[:, keys],
    )


@subject(profile="flash")
def flash_reversed(call: CoreCall) -> Tensor:
    """The last key first."""
    flipped = replace(
        call,
        k=call.k.flip(2),
        v=call.v.flip(2),
        mask=call.mask.flip(3),
        kv_positions=call.kv_positions.flip(1),
    )
    return finished(call, *streamed(flipped, 32))


@subject(profile="flash")
def split_merged(call: CoreCall) -> Tensor:
    """Three parts of the keys on their own, then merged by their largest scores."""
    kv_len = call.k.shape[2]
    edges = sorted({0, kv_len // 3, 2 * kv_len // 3, kv_len})
    parts = [
        streamed(keys_between(call, first, last), 64) for first, last in itertools.pairwise(edges)
    ]
    top = torch.stack([part[2] for part in parts]).amax(dim=0)
    base = top.masked_fill(top == float("-inf"), 0.0)
    shrinks = [torch.exp(part[2] - base) for part in parts]
    mixed = torch.stack([part[0] * s for part, s in zip(parts, shrinks, strict=True)]).sum(dim=0)
    total = torch.stack([part[1] * s for part, s in zip(parts, shrinks, strict=True)]).sum(dim=0)
    return finished(call, mixed, total, top)


KERNELS: dict[str, Kernel] = {
    "eager": eager,
    "float32 inside": float32_inside,
    "float64 inside": exact_inside,
    "native": native_kernel,
    "native, decode form": native_split,
    "flash, tile 16": flash(16),
    "flash, tile 32": flash(32),
    "flash, tile 64": flash(64),
    "flash, tile 128": flash(128),
    "flash, reversed keys": flash_reversed,
    "split and merged": split_merged,
}
"""Correct kernels for cases of scope `core`."""


def core_subject(name: str) -> Subject:
    """Return a kernel of `KERNELS` as a subject."""
    kernel: Any = KERNELS[name]
    return Subject(name=name, function=kernel, **kernel.__conformance__)


def _changed(name: str, run: Callable[[LayerCall], LayerOutput]) -> Subject:
    return replace(load_subject("impl"), name=name, function=run)


def permuted_hidden(call: LayerCall) -> LayerOutput:
    """`impl` with the hidden channels in another order: the projections sum differently."""
    order = torch.randperm(call.config.hidden_size, generator=torch.Generator().manual_seed(0))
    weights = {
        name: tensor[:, order] if name in ("q_proj", "k_proj", "v_proj") else tensor
        for name, tensor in call.weights.items()
    }
    shuffled = replace(call, weights=weights, hidden_states=call.hidden_states[..., order])
    result: LayerOutput = load_subject("impl").function(shuffled)
    return result


def float32_layer(call: LayerCall) -> LayerOutput:
    """`impl` in float32, its outputs cast to the model's dtype."""
    dtype = call.hidden_states.dtype
    wide = replace(
        call,
        weights={name: tensor.float() for name, tensor in call.weights.items()},
        hidden_states=call.hidden_states.float(),
        k_cache=None if call.k_cache is None else call.k_cache.float(),
        v_cache=None if call.v_cache is None else call.v_cache.float(),
    )
    result: LayerOutput = load_subject("impl").function(wide)
    return LayerOutput(
        output=result.output.to(dtype),
        k_cache=result.k_cache.to(dtype),
        v_cache=result.v_cache.to(dtype),
    )


LAYERS: dict[str, Subject] = {
    "impl": load_subject("impl"),
    "impl, permuted hidden": _changed("impl, permuted hidden", permuted_hidden),
    "impl in float32": _changed("impl in float32", float32_layer),
}
"""Correct layers for cases of scope `layer`."""
