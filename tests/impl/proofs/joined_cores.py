"""A decode step whose cache several cores keep together, on one core in the place of all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from impl import KVCacheManager, NeuronAttentionBase
from impl.flash_decoding import KeyPart, attend_parts
from impl.masks import active_token_mask, prior_mask
from impl.slot_positions import first_positions, slot_positions


class JoinedCores(nn.Module):
    """A full layer's decode step by flash decoding: each core's keys apart, then joined.

    `impl` itself does this on the ranks of a group, which `tests/impl/parallel` proves; here are
    the same functions without their exchange.

    Args:
        layer: a full layer.
        managers: the cache of each core.
    """

    def __init__(self, layer: NeuronAttentionBase, managers: Sequence[KVCacheManager]) -> None:
        super().__init__()
        self.layer, self.managers = layer, nn.ModuleList(managers)

    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        """Return output, and K and V of each core's updated cache."""
        q, k, v, *_ = self.layer.prep_qkv_tensors(
            hidden_states, position_ids, is_prefill_stage=False
        )
        parts, updates = [], []
        for manager in self.managers:
            assert isinstance(manager, KVCacheManager)
            held_k, held_v = manager.get_kv_by_layer_id(0)
            at = slot_positions(manager.layout(0), first_positions(position_ids), held_v.shape[2])
            parts.append(KeyPart(held_k, held_v, prior_mask(None, position_ids, at)))
            updates += manager.update_kv_by_layer_id(
                0, position_ids=position_ids, kv_per_layer=(k, v)
            )
        parts.append(KeyPart(k, v, active_token_mask(None, position_ids)))
        sink = self.layer.get_learned_sinks(is_prefill_stage=False)
        heads = attend_parts(q, parts, sink, self.layer.score_rule).transpose(1, 2).flatten(2)
        return (self.layer.get_o_proj(False)(heads, lambda product: product), *updates)
