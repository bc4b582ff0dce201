"""From queries, keys and values to the heads' outputs: masks and kernels of every kind of step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from impl.attention_setup import AttentionSetup
from impl.decode_strategy import DecodeStep, resolve_decode_kernel
from impl.errors import ShapeError, explain
from impl.flash_decoding import KeyPart, attend_on_group
from impl.kernels import PriorKeys, decode, native, prefill
from impl.kv_cache import KeyValue
from impl.masks import active_token_mask, context_encoding_mask, prior_mask, validity
from impl.packing import PackedSequences, side_by_side, together
from impl.parallel.token_order import Run
from impl.slot_positions import (
    NOWHERE,
    ContiguousSlots,
    SlotLayout,
    first_positions,
    slot_positions,
)
from impl.step import Phase, StepInputs
from impl.strategy import Implementation
from impl.training import trains


class AttentionCore(AttentionSetup):
    """Attention proper: of a prompt, one whose start is cached, packed prompts, and decode."""

    def attend(self, step: StepInputs, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a step, by its phase and by whether there are cached keys.

        Args:
            step: the step.
            q: `(batch, num_attention_heads, tokens, head_dim)`, BHSD, of this rank's heads and
                tokens, rotated.
            k: `(batch, num_key_value_heads, seq_len, head_dim)`, of this rank's heads; in prefill
                of every token, in natural order.
            v: like `k`.

        Returns:
            Like `q`.
        """
        past = step.past_key_value
        if step.packing is not None:
            return self.perform_contexted_prefill(q, k, v, step, step.packing)
        if past is None:
            return self.perform_prefill(q, k, v, step.attention_mask, step.position_ids)
        prior = (past, step.attention_mask, step.active_mask, step.cache_layout)
        if step.phase is Phase.CONTEXT_ENCODING:
            return self.perform_prefix_prefill(q, k, v, step.position_ids, *prior, step.owners)
        return self.compute_for_token_gen(q, k, v, step.position_ids, *prior)

    def perform_prefill(
        self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, position_ids: Tensor
    ) -> Tensor:
        """Attention of a prefill step.

        Args:
            q: as in `attend`, like k and v.
            k: see q.
            v: see q.
            attention_mask: as in `forward`, of the whole sequence as the caller has it.
            position_ids: `(batch, seq_len)`, likewise.

        Returns:
            Like `q`.

        Raises:
            ConfigError: the strided kernel was asked for where it cannot run.
        """
        choice = self.kernel_choice(
            q.shape[2],
            attention_mask is not None or self.prefill_rule.limited,
            explicit_mask=attention_mask is not None and attention_mask.dim() == 4,
            trains=trains(q, k, v, self.get_learned_sinks(is_prefill_stage=True)),
            device_type=q.device.type,
        )
        return self._own_queries(q, k, v, choice.implementation, attention_mask, position_ids)

    def _own_queries(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        implementation: Implementation,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        prior: PriorKeys | None = None,
    ) -> Tensor:
        """Attention of this rank's queries in prefill, run by run of its tokens.

        Args:
            q: as in `attend`, like k and v.
            k: see q.
            v: see q.
            implementation: who computes it.
            attention_mask: of the step's own keys, whole and as the caller has it, or None.
            position_ids: likewise.
            prior: cached keys, or None.
        """
        phase = self.parallel.prefill
        own_positions = phase.tokens(position_ids, 1)
        runs = phase.runs(position_ids.shape[1])
        if implementation is Implementation.NATIVE:
            # positions are explicit there, so that one call does for any tokens
            runs = (Run(0, q.shape[2], 0, 1),)
        heads = []
        for run in runs:
            rule = replace(self.prefill_rule, q_offset=run.offset, q_stride=run.stride)
            heads.append(
                prefill(
                    q.narrow(2, run.start, run.length),
                    k,
                    v,
                    implementation=implementation,
                    rule=rule,
                    sink=self.get_learned_sinks(is_prefill_stage=True),
                    attention_mask=phase.mask(attention_mask, run),
                    position_ids=own_positions.narrow(1, run.start, run.length),
                    kv_position_ids=phase.natural(position_ids, 1),
                    prior=prior,
                )
            )
        return heads[0] if len(heads) == 1 else torch.cat(heads, dim=2)

    def perform_prefix_prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position_ids: Tensor,
        past_key_value: KeyValue,
        attention_mask: Tensor | None,
        active_mask: Tensor | None,
        cache_layout: SlotLayout | None = None,
        owners: Tensor | None = None,
    ) -> Tensor:
        """Attention of a prefill step whose first tokens are cached: a prefix, earlier windows.

        The layer's window, chunk and sinks hold over cached and new keys together. Ranks give each
        other the cached heads, rows and tokens that the others' prefill reads.

        Args:
            q: as in `attend`, like k and v.
            k: see q.
            v: see q.
            position_ids: `(batch, seq_len)`.
            past_key_value: as in `forward`, like the rest.
            attention_mask: see `forward`; here `(batch, slots)` or `(batch or 1, 1, 1, slots)`.
            active_mask: see `forward`.
            cache_layout: which position each slot holds; None is the layer's own.
            owners: see `StepInputs`.

        Returns:
            Like `q`.

        Raises:
            ConfigError: the strided kernel was asked for where it cannot run.
            ShapeError: a tensor that does not fit.
        """
        held = self._held(position_ids, past_key_value[1].shape[2], cache_layout)
        if attention_mask is not None:
            held = held.masked_fill(~validity(attention_mask, *held.shape), NOWHERE)
        among = position_ids >= 0
        if active_mask is not None:
            among = active_token_mask(active_mask, position_ids)
        choice = self.kernel_choice(
            q.shape[2],
            has_attention_mask=False,
            explicit_mask=active_mask is not None,
            prior=True,
            prior_in_order=attention_mask is None
            and isinstance(cache_layout or self.cache_layout, ContiguousSlots),
            trains=trains(q, k, v, *past_key_value, self.get_learned_sinks(is_prefill_stage=True)),
            device_type=q.device.type,
        )
        prior = self._gathered_prior(past_key_value, held, owners)
        return self._own_queries(q, k, v, choice.implementation, among, position_ids, prior)

    def _gathered_prior(
        self, past_key_value: KeyValue, held: Tensor, owners: Tensor | None
    ) -> PriorKeys:
        """Cached keys of a prefill step: of this rank's prefill heads and every row.

        Args:
            past_key_value: this rank's.
            held: `(batch, slots)`, position in each slot of every row.
            owners: see `StepInputs`.

        Raises:
            ShapeError: a cache of another shape, or rows that do not split evenly.
        """
        k, v = past_key_value
        rows = held.shape[0]
        if owners is None:
            rows = self.parallel.decode.rows(held).shape[0]
        self._check_cache(k, v, rows, len(self.parallel.decode_heads.key_value))
        k = k.transpose(2, 3) if self.k_cache_transposed else k
        return self.parallel.gather_prior(PriorKeys(k=k, v=v, positions=held), owners)

    def perform_contexted_prefill(
        self, q: Tensor, k: Tensor, v: Tensor, step: StepInputs, packing: PackedSequences
    ) -> Tensor:
        """Attention of a row of packed sequences (chunked prefill), each with its own cached keys.

        Args:
            q: as in `attend`, like k and v; the batch is 1.
            k: see q.
            v: see q.
            step: the step; an `attention_mask` `(1, 1, seq_len, seq_len)` narrows what lengths
                and positions allow.
            packing: how sequences stand in the row.

        Returns:
            Like `q`.

        Raises:
            ShapeError: a tensor that does not fit.
        """
        limits: dict[str, Any] = {
            "sliding_window": self.options.sliding_window,
            "attention_chunk_size": self.options.attention_chunk_size,
        }
        phase, everything = self.parallel.prefill, Run(0, q.shape[2], 0, 1)
        at, keys_at = (part(step.position_ids, 1) for part in (phase.tokens, phase.natural))
        of_keys = packing.segments(k.shape[2])
        segments = phase.tokens(phase.given(of_keys, 0), 0)
        among = together(segments, of_keys) & active_token_mask(
            phase.mask(step.active_mask, everything), at, kv_position_ids=keys_at, **limits
        )
        if step.attention_mask is not None:
            given = context_encoding_mask(
                phase.mask(step.attention_mask, everything),
                at,
                sliding_window=self.options.sliding_window,
                attention_chunk_size=self.options.attention_chunk_size,
                kv_position_ids=keys_at,
            )
            assert given is not None
            among = among & given
        sink = self.get_learned_sinks(is_prefill_stage=True)
        if step.past_key_value is None:
            return native.context_encoding(q, k, v, among, sink, self.score_rule)
        held = slot_positions(
            step.cache_layout or self.cache_layout,
            packing.computed_context_lens,
            step.past_key_value[1].shape[2],
        )
        prior = self._gathered_prior(step.past_key_value, held, step.owners)
        seen = prior_mask(None, at, prior.positions.reshape(1, -1), **limits)
        return native.token_generation(
            q,
            k,
            v,
            side_by_side(prior.k),
            side_by_side(prior.v),
            seen & packing.own_slots(segments, prior.positions.shape[1]),
            among,
            sink,
            self.score_rule,
        )

    def compute_for_token_gen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position_ids: Tensor,
        past_key_value: KeyValue,
        attention_mask: Tensor | None,
        active_mask: Tensor | None,
        cache_layout: SlotLayout | None = None,
    ) -> Tensor:
        """Attention of a decode step.

        Args:
            q: as in `attend`, like k and v.
            k: see q.
            v: see q.
            position_ids: `(batch, seq_len)`.
            past_key_value: as in `forward`, like the rest.
            attention_mask: see `forward`.
            active_mask: see `forward`; needed for more than one token, not read for one.
            cache_layout: which position each slot holds; None is the layer's own.

        Returns:
            Like `q`.

        Raises:
            ShapeError: there are several tokens and no `active_mask`, or a tensor does not fit.
        """
        k_prior, v_prior = past_key_value
        self._check_cache(k_prior, v_prior, *k.shape[:2])
        seen, own = self.decode_masks(
            position_ids, v_prior.shape[2], attention_mask, active_mask, cache_layout
        )
        sink = self.get_learned_sinks(is_prefill_stage=False)
        if self.parallel.core_group.size > 1:
            cached, active = KeyPart(k_prior, v_prior, seen), KeyPart(k, v, own)
            return attend_on_group(
                q, cached, active, position_ids, sink, self.score_rule, self.row_sum_exchange
            )
        return decode(
            q,
            k,
            v,
            k_prior,
            v_prior,
            seen,
            own,
            sink,
            self.score_rule,
            implementation=resolve_decode_kernel(
                DecodeStep(
                    batch=q.shape[0],
                    num_attention_heads=q.shape[1],
                    num_key_value_heads=k.shape[1],
                    q_len=q.shape[2],
                    slots=v_prior.shape[2],
                    head_dim=self.head_dim,
                    dtype=v_prior.dtype,
                    trains=trains(q, k, v, k_prior, v_prior, sink),
                    device_type=q.device.type,
                )
            ),
            k_prior_transposed=self.k_cache_transposed,
        )

    def decode_masks(
        self,
        position_ids: Tensor,
        slots: int,
        attention_mask: Tensor | None,
        active_mask: Tensor | None,
        cache_layout: SlotLayout | None,
    ) -> tuple[Tensor, Tensor]:
        """Which cached keys, and which of the step's, the tokens of a decode step see.

        Raises:
            ShapeError: there are several tokens and no `active_mask`, or a tensor does not fit.
        """
        q_len = position_ids.shape[1]
        if q_len > 1 and active_mask is None:
            raise ShapeError(
                explain(
                    "active_mask",
                    f"be given for a decode step of {q_len} tokens",
                    None,
                    "tril for a draft; pass no past_key_value to prefill",
                )
            )
        held = self._held(position_ids, slots, cache_layout)
        limits: dict[str, Any] = {
            "sliding_window": self.options.sliding_window,
            "attention_chunk_size": self.options.attention_chunk_size,
        }
        among = active_mask if q_len > 1 else None
        return (
            prior_mask(attention_mask, position_ids, held, **limits),
            active_token_mask(among, position_ids, **limits),
        )

    def _held(self, position_ids: Tensor, slots: int, layout: SlotLayout | None) -> Tensor:
        """Position in each slot of a cache before a step; see `impl.slot_positions`."""
        return slot_positions(layout or self.cache_layout, first_positions(position_ids), slots)

    def _check_cache(self, k_prior: Tensor, v_prior: Tensor, batch: int, heads: int) -> None:
        width = self.head_dim
        slots = max(v_prior.shape[2], 1) if v_prior.dim() == 4 else 1
        expected = (batch, heads, slots, width)
        k_expected = (batch, heads, width, slots) if self.k_cache_transposed else expected
        for name, tensor, want in (
            ("past_key_value[0]", k_prior, k_expected),
            ("past_key_value[1]", v_prior, expected),
        ):
            if tensor.dtype != self.torch_dtype:
                raise ShapeError(explain(name, f"be {self.torch_dtype}", tensor.dtype))
            if tuple(tensor.shape) != want:
                raise ShapeError(
                    explain(name, f"have shape {want}", tuple(tensor.shape), "is it BHSD?")
                )
