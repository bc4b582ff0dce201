"""Turns the inputs of a schedule into a `ServeCall`."""

from __future__ import annotations

import torch

from conformance.cases import Case
from conformance.schedule_calls import PlannedCall
from conformance.serve_expected import longest_draft
from conformance.serve_inputs import ServeInputs, rotary_of
from conformance.subjects.serving import ServeCall, ServeStep, StoredAs
from conformance.tensors import Tensors, whole
from golden import Quantisation


def serve_call(case: Case, inputs: ServeInputs, tensor: Tensors) -> ServeCall:
    """Return what a served layer is called with."""
    kinds = inputs.quantisation
    return ServeCall(
        config=case.config,
        weights=tensor.weights(case.config, inputs.weights),
        cache=inputs.schedule.cache,
        cache_rows=inputs.prior_lengths.size,
        max_length=inputs.walk.max_length,
        speculation_length=longest_draft(inputs.walk.calls),
        steps=tuple(_step(case, inputs, call, tensor) for call in inputs.walk.calls),
        k_prior=tensor.maybe(inputs.k_prior),
        v_prior=tensor.maybe(inputs.v_prior),
        prior_lengths=whole(inputs.prior_lengths),
        block_tables=whole(inputs.block_tables),
        num_blocks=inputs.num_blocks,
        keys_as=None if kinds is None else _stored(kinds[0]),
        values_as=None if kinds is None else _stored(kinds[1]),
        adapters=tensor.adapters(inputs.lora),
        input_norm=tensor.input_norm(inputs.input_norm),
    )


def _step(case: Case, inputs: ServeInputs, call: PlannedCall, tensor: Tensors) -> ServeStep:
    lora, packing = inputs.lora_of(call), call.packing
    return ServeStep(
        kind=call.kind,
        hidden_states=tensor(inputs.hidden_of(call)),
        position_ids=whole(call.positions),
        seq_ids=None if call.in_order else whole(call.rows),
        fresh=call.fresh,
        active_mask=None if call.seen is None else torch.from_numpy(call.seen.copy()),
        kept=torch.from_numpy(call.kept.copy()),
        query_lens=None if packing is None else packing.query_lens,
        key_lens=None if packing is None else packing.key_lens,
        piece=call.piece,
        piece_size=inputs.schedule.parts[call.part].piece,
        adapter_ids=None if lora is None else whole(lora.adapter_ids),
        residual=tensor.maybe(inputs.residual_of(call)),
        rotary_position_ids=whole(rotary_of(case, call)),
    )


def _stored(how: Quantisation) -> StoredAs:
    scale = None if how.scale is None else torch.from_numpy(how.scale.copy()).float()
    return StoredAs(dtype=getattr(torch, how.code), scale=scale)
