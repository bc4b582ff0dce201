"""One call of a layer: what it attends with, and which phase it is."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from torch import Tensor

from impl.attention_inputs import Norm
from impl.errors import AttentionError, ShapeError, explain
from impl.kv_cache import KeyValue
from impl.neuron_config import NeuronConfig
from impl.packing import PackedSequences
from impl.slot_positions import SlotLayout

PREFIX_LEN_MIN = 128
"""Under prefix caching, a step of this many tokens or more encodes context; a shorter one decodes.

Both have cached keys then, so the length tells them apart; the module's smallest prefix bucket is
of this size.
"""


class Phase(Enum):
    """Context encoding (CTE, prefill) or token generation (TKG, decode)."""

    CONTEXT_ENCODING = 0
    TOKEN_GENERATION = 1


class StepInputs(NamedTuple):
    """The arguments of one `forward`, checked; `NeuronAttentionBase.forward` says what they mean.

    Attributes:
        phase: context encoding or token generation.
        hidden_states: `(batch, seq_len, hidden_size)`, in the caller's dtype.
        position_ids: `(batch, seq_len)`, integer; never None.
        attention_mask: see `forward`.
        past_key_value: keys and values before this step, or None.
        cache_layout: which position each slot of them holds; None is the layer's own.
        write_slots: `(batch, seq_len)`, int64: slots of `past_key_value` that a decode step of one
            call writes its tokens to, in place, negative for nowhere; None writes nothing.
        active_mask: see `forward`.
        packing: how sequences stand in the row, or None for one sequence a row.
        owners: `(batch,)`, or of a packed row `(sequences,)`, integer: which data-parallel group
            keeps each row of a prefill's `past_key_value`; None where each has its own, in order.
        adapter_ids: see `forward`.
        cos_cache: see `forward`.
        sin_cache: see `forward`.
        rmsnorm: see `forward`.
        rotary_position_ids: see `forward`.
        residual: see `forward`.
        use_polar_compatible_rope: see `forward`.
    """

    phase: Phase
    hidden_states: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None = None
    past_key_value: KeyValue | None = None
    cache_layout: SlotLayout | None = None
    write_slots: Tensor | None = None
    active_mask: Tensor | None = None
    packing: PackedSequences | None = None
    owners: Tensor | None = None
    adapter_ids: Tensor | None = None
    cos_cache: Tensor | None = None
    sin_cache: Tensor | None = None
    rmsnorm: Norm | None = None
    rotary_position_ids: Tensor | None = None
    residual: Tensor | None = None
    use_polar_compatible_rope: bool = False


def select_phase(
    run: NeuronConfig,
    q_len: int,
    cached: bool,
    window_idx: int,
    *,
    packed: bool = False,
) -> tuple[Phase, bool]:
    """Tell prefill from decode, by static facts alone, and whether the step reads cached keys.

    Args:
        run: how the layer is run.
        q_len: tokens of the step, on all ranks.
        cached: there are cached keys and values.
        window_idx: `windowed_context_encoding_window_idx`; negative is no window.
        packed: the step is a row of packed sequences.

    Returns:
        Token generation if there are cached keys, but context encoding in a window of a prompt, of
        packed sequences, and under prefix caching from `PREFIX_LEN_MIN` tokens on; and whether
        the keys are read, which in the first window they are not: none are before it.

    Raises:
        AttentionError: a window, but none are configured.
        ShapeError: the window is too long, or a later one lacks the keys of the ones before it.
    """
    if window_idx < 0:
        prefix = run.is_prefix_caching and q_len >= PREFIX_LEN_MIN
        decodes = cached and not prefix and not packed
        return (Phase.TOKEN_GENERATION if decodes else Phase.CONTEXT_ENCODING), cached
    size = run.windowed_context_encoding_size
    if size is None:
        raise AttentionError(
            explain(
                "windowed_context_encoding_window_idx",
                "be negative without windowed_context_encoding_size in the configuration",
                window_idx,
            )
        )
    if q_len > size:
        raise ShapeError(
            explain(
                "hidden_states",
                f"hold at most windowed_context_encoding_size = {size} tokens in a window",
                q_len,
            )
        )
    if window_idx > 0 and not cached:
        raise ShapeError(
            explain(
                "past_key_value",
                f"be given in window {window_idx}",
                None,
                f"the {window_idx * size} tokens before it are cached",
            )
        )
    return Phase.CONTEXT_ENCODING, window_idx > 0
