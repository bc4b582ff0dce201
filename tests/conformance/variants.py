"""Correct subjects for tests: `conformance.variants`, `impl`'s kernels as such, and its layer.

Each claims the profile it keeps to; none of them may ever fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from unittest import mock

import torch
from torch import Tensor

from conformance import expected, runner
from conformance.cases import Case
from conformance.error_model import ErrorScale
from conformance.expected import Inputs, Reference
from conformance.precision import PrecisionProfile
from conformance.scale_cache import ScaleCache
from conformance.subjects import CoreCall, LayerCall, LayerOutput, Subject, load_subject, subject
from conformance.variants import VARIANTS, streamed
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

    def reference(
        case: Case,
        inputs: Inputs,
        cache: ScaleCache | None = None,
        profile: PrecisionProfile | None = None,
    ) -> Reference:
        del profile  # subjects of several share it
        if case not in latest:
            latest.clear()
            latest[case] = expected.reference(case, inputs, cache)
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


_SHIPPED = (
    "eager",
    "float32 inside",
    "float64 inside",
    "flash, tile 32",
    "flash, tile 64",
    "flash, tile 128",
    "flash, keys reversed",
    "split in 2, merged",
    "split in 5, merged",
)
CORES: dict[str, Subject] = {
    **{name: VARIANTS[name].subject for name in _SHIPPED},
    "flash, tile 16": Subject(name="flash, tile 16", function=streamed.flash(16), profile="flash"),
    "native": Subject(name="native", function=native_kernel, profile="native"),
    "native, decode form": Subject(
        name="native, decode form", function=native_split, profile="native"
    ),
}
"""Correct kernels for cases of scope `core`: those that ship, small tiles, and `impl`'s own."""


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
