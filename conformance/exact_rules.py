"""Exact rules: changes of the call that must change no bit of what a subject returns.

No rounding excuses these, so their limit is 0 and they add nothing to the false-alarm rate:

* `repeated run`: the same call gives the same bits.
* `masked values`: keys that a row does not see may be huge.
* `masked NaN`: they may even be NaN. Not claimed unless a subject says so, since the plain product
  of weights and values makes NaN of 0 times NaN.
* `batch mates`: other rows of the batch may hold anything.
* `other strides`: inputs that are views into wider or transposed storage. A kernel may take another
  path for them; then its result must conform like the first, bit for bit or not.

A schedule has changes of its own (`conformance.serve_rules`).

A subject names the rules it disclaims. Whether every element is written cannot be told from a
tensor that the subject itself returns: what it leaves unwritten shows as a deviation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

import golden
from conformance.calls import Call
from conformance.cases import Case
from conformance.error_model import Outputs, RowMask
from conformance.expected import Inputs
from conformance.gradients.inputs import GradientInputs
from conformance.inputs import CoreInputs, LayerInputs
from conformance.serve_inputs import ServeInputs
from conformance.serve_rules import serve_changes
from conformance.subjects.serving import ServeCall
from reports.records import Statistic

Rows: TypeAlias = Mapping[str, RowMask]

_HUGE = {"float16": 2.0**12, "bfloat16": 2.0**60, "float32": 2.0**60}
"""What masked values are set to: their products with queries of ordinary size stay finite."""


@dataclass(frozen=True, slots=True)
class Subjected:
    """A subject as the rules see it.

    Attributes:
        call_of: makes the call of some inputs.
        run: calls the subject and returns its outputs as float64, finite or not; raises if their
            shapes or dtypes are wrong.
        conforms: whether outputs would pass the case's other statistics.
        disclaims: rules not to hold it to.
    """

    call_of: Callable[[Inputs], Call]
    run: Callable[[Call, Inputs], Outputs]
    conforms: Callable[[Outputs], bool]
    disclaims: tuple[str, ...]


def exact_statistics(
    case: Case, inputs: Inputs, first: Outputs, rows: Rows, subject: Subjected
) -> tuple[Statistic, ...]:
    """Hold a subject to every rule that it claims and the case can show.

    Args:
        case: the case.
        inputs: its inputs.
        first: what the subject returned for them.
        rows: per output, which rows count.
        subject: how to call it again.
    """
    found = []
    for rule, changed, compared in _changes(case, inputs, rows):
        if rule in subject.disclaims:
            continue
        call = subject.call_of(changed)
        if rule == "other strides":
            call = _restrided(call)
        try:
            again = subject.run(call, changed)
        except Exception as error:  # whatever a subject raises is its answer
            found.append(_failed(rule, f"{type(error).__name__}: {error}"))
            continue
        forgiven = rule == "other strides" and subject.conforms(again)
        for name, counted in compared.items():
            moved = (again[name] != first[name]).any(axis=-1) & counted
            count = 0 if forgiven else int(np.count_nonzero(moved))
            found.append(_statistic(rule, name, count, moved))
    return tuple(found)


def _statistic(rule: str, output: str, count: int, moved: RowMask) -> Statistic:
    return Statistic(
        output=output,
        name=f"exact: {rule}",
        value=float(count),
        limit=0.0,
        derivation="rows that changed; none may",
        where=tuple(int(i) for i in np.argwhere(moved)[0]) if count else (),
    )


def _failed(rule: str, text: str) -> Statistic:
    return Statistic(
        output="output", name=f"exact: {rule}", value=float("inf"), limit=0.0, derivation=text
    )


def _changes(case: Case, inputs: Inputs, rows: Rows) -> Iterator[tuple[str, Inputs, Rows]]:
    """Yield each rule with the inputs to give and the rows that must not change."""
    yield "repeated run", inputs, rows
    if isinstance(inputs, GradientInputs):  # what one row may not change in another, a sum may
        return
    yield "other strides", inputs, rows
    if isinstance(inputs, ServeInputs):
        yield from serve_changes(case, inputs, rows, _HUGE[case.dtype])
        return
    masked, unseeing = _masked(case, inputs, rows)
    if masked.any():
        for rule, value in (("masked values", _HUGE[case.dtype]), ("masked NaN", np.nan)):
            yield rule, _poisoned(inputs, masked, value), unseeing
    if case.workload.batch > 1:
        first = {name: _only_first(counted) for name, counted in rows.items()}
        yield "batch mates", _other_mates(inputs), first


def _only_first(counted: RowMask) -> RowMask:
    kept = np.zeros_like(counted)
    kept[0] = counted[0]
    return kept


def _masked(
    case: Case, inputs: LayerInputs | CoreInputs, rows: Rows
) -> tuple[NDArray[np.bool_], Rows]:
    """Pick keys to poison, `(batch, kv_len)`, and the rows that see none of them.

    In prefill they are the keys that the middle query does not see, in decode those that no query
    sees.
    """
    mask = golden.layer_mask(case.config)
    if isinstance(inputs, CoreInputs):
        queries, keys = inputs.q_positions, inputs.kv_positions
    elif inputs.cache_lengths is None:
        queries = keys = inputs.position_ids
    else:
        queries, keys = inputs.position_ids, _slots(inputs)
    visible: NDArray[np.bool_] = np.array(golden.visible_keys(mask, queries, keys))[:, 0]
    if case.workload.phase == "tkg":
        masked = np.count_nonzero(visible, axis=1) == 0
    else:
        masked = ~visible[:, visible.shape[1] // 2]
    blind = np.count_nonzero(visible & masked[:, None], axis=2) == 0
    if isinstance(inputs, LayerInputs) and inputs.cache_lengths is None:
        blind &= ~masked  # a poisoned token's own row changes
    unseeing = {
        name: counted & (blind[:, None] if counted.ndim == 3 else blind)
        for name, counted in rows.items()
    }
    return masked, unseeing


def _slots(inputs: LayerInputs) -> NDArray[np.int64]:
    """Return the position each cache slot holds after the last step, -1 for none."""
    assert inputs.k_cache is not None
    slots = np.arange(inputs.k_cache.shape[2])
    return np.where(slots <= inputs.position_ids[:, -1:], slots, -1)


def _poisoned(inputs: LayerInputs | CoreInputs, masked: NDArray[np.bool_], value: float) -> Inputs:
    if isinstance(inputs, LayerInputs) and inputs.k_cache is None:
        hidden = np.where(masked[..., None], value, inputs.hidden_states)
        return replace(inputs, hidden_states=hidden)
    names = ("k", "v") if isinstance(inputs, CoreInputs) else ("k_cache", "v_cache")
    changed: dict[str, Any] = {
        name: np.where(masked[:, None, :, None], value, getattr(inputs, name)) for name in names
    }
    return replace(inputs, **changed)


def _other_mates(inputs: LayerInputs | CoreInputs) -> Inputs:
    """Turn the sign of everything that rows after the first hold."""
    names = ("q", "v") if isinstance(inputs, CoreInputs) else ("hidden_states", "v_cache")
    changed: dict[str, Any] = {}
    for name in names:
        values = getattr(inputs, name)
        if values is not None:
            changed[name] = np.concatenate([values[:1], -values[1:]])
    return replace(inputs, **changed)


def _restrided(call: Call) -> Call:
    """Return the call with activations and caches as views: BSHD storage, or wider rows."""
    names = ("q", "k", "v", "hidden_states", "k_cache", "v_cache", "k_prior", "v_prior")
    changed: dict[str, Any] = {}
    if isinstance(call, ServeCall):
        changed["steps"] = tuple(
            replace(step, hidden_states=_view(step.hidden_states)) for step in call.steps
        )
    for name in names:
        tensor = getattr(call, name, None)
        if isinstance(tensor, torch.Tensor):
            changed[name] = _view(tensor)
    return replace(call, **changed)


def _view(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.ndim == 4:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return torch.cat([tensor, tensor], dim=-1)[..., : tensor.shape[-1]]
