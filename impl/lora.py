"""Low-rank adapters (LoRA) on a layer's projections, one adapter per batch row.

A row with adapter `a` adds `scaling[a] * lora_B[a] @ (lora_A[a] @ x)` to the projection of `x`; a
row with a negative id adds nothing. The term is computed in the compute dtype, and its sum with the
projection is rounded to the layer's dtype.

Source: Hu et al. (2021), LoRA, arXiv 2106.09685, equation 3; names as in PEFT's checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from impl.errors import ConfigError, ShapeError, StateDictError, explain
from impl.layer_options import LayerOptions
from impl.neuron_config import require, require_positive
from impl.parallel.head_layout import ShardHeads, Slots
from impl.parallel.weights import shard_heads
from impl.precision import compute_dtype

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
_ENTRY = re.compile(r"^(?:.*\.)?([a-z_]+)\.lora_(A|B)(?:\.\w+)?\.weight$")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraServingConfig:
    """Adapters that are held at once.

    Attributes:
        max_loras: adapters; ids run from 0 to `max_loras - 1`.
        max_lora_rank: largest rank; smaller ones are padded with zeros.
        target_modules: projections that have adapters.

    Raises:
        ConfigError: a value out of range, or an unknown projection.
    """

    max_loras: int = 1
    max_lora_rank: int = 16
    target_modules: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        require_positive(self, ("max_loras", "max_lora_rank"))
        unknown = sorted(set(self.target_modules) - set(TARGETS))
        require(
            bool(self.target_modules) and not unknown,
            "target_modules",
            f"be among {TARGETS}",
            unknown or self.target_modules,
        )


class LoraProjection(nn.Module):
    """Adapters of one projection.

    Attributes:
        lora_A: `(max_loras, max_lora_rank, in_features)`.
        lora_B: `(max_loras, out_features, max_lora_rank)`; zeros at first, so adapters do nothing.
        scaling: `(max_loras,)`, compute dtype; `lora_alpha / rank`.

    Args:
        config: how many adapters, and of which rank.
        in_features: width of the projection's input.
        out_features: width of its output.
        dtype: dtype of the two matrices.
    """

    scaling: Tensor

    def __init__(
        self, config: LoraServingConfig, in_features: int, out_features: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        count, rank = config.max_loras, config.max_lora_rank
        self.lora_A = nn.Parameter(torch.zeros(count, rank, in_features, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(count, out_features, rank, dtype=dtype))
        self.scaling = nn.Parameter(
            torch.ones(count, dtype=compute_dtype(dtype)), requires_grad=False
        )

    def forward(self, x: Tensor, adapter_ids: Tensor) -> Tensor:
        """Compute what the rows' adapters add.

        Args:
            x: `(batch, seq_len, in_features)`, the projection's input.
            adapter_ids: `(batch,)`, integer, negative for none. An id past the last adapter is an
                index error where the device checks indices (CPU), and undefined elsewhere.

        Returns:
            `(batch, seq_len, out_features)`, compute dtype.

        Raises:
            ShapeError: `adapter_ids` is not one integer per row.
        """
        kind = adapter_ids.dtype
        if tuple(adapter_ids.shape) != x.shape[:1] or kind.is_floating_point or kind == torch.bool:
            raise ShapeError(
                explain(
                    "adapter_ids",
                    f"be integers ({x.shape[0]},), one per batch row",
                    f"{kind} {tuple(adapter_ids.shape)}",
                )
            )
        dtype = compute_dtype(x.dtype)
        ids = adapter_ids.clamp(min=0)
        used = self.scaling.index_select(0, ids).to(dtype).masked_fill(adapter_ids < 0, 0.0)
        down = self.lora_A.index_select(0, ids).to(dtype).transpose(1, 2)
        up = self.lora_B.index_select(0, ids).to(dtype).transpose(1, 2)
        return torch.matmul(torch.matmul(x.to(dtype), down), up) * used[:, None, None]


class LayerLora(nn.ModuleDict):
    """Adapters of one layer, by projection; on several ranks, of this rank's heads.

    A rank holds `lora_B` of its heads of q, k and v, and `lora_A` of its heads' columns of the
    output projection, whose terms add up over ranks as its products do. Where prefill and decode
    give a rank other heads it holds both parts, as it does of the weights: `cte_q_proj` and
    `tkg_q_proj` in place of `q_proj`.

    Args:
        config: which projections, how many adapters, of which rank.
        options: the layer's numeric options.
        input_size: width of what q, k and v read.
        prefill: this rank's heads in prefill.
        decode: its heads in decode; None is those of prefill, and one part for both.
        dtype: the layer's dtype.
    """

    def __init__(
        self,
        config: LoraServingConfig,
        options: LayerOptions,
        *,
        input_size: int,
        prefill: ShardHeads,
        decode: ShardHeads | None = None,
        dtype: torch.dtype,
    ) -> None:
        width, hidden = options.width, options.hidden_size
        self._prefixes = ("", "") if decode is None else ("tkg_", "cte_")
        parts = {"": prefill} if decode is None else {"tkg_": decode, "cte_": prefill}
        made, slots = dict[str, nn.Module](), dict[str, tuple[str, Slots]]()
        for prefix, heads in parts.items():
            for target in config.target_modules:
                held = heads.query if target in ("q_proj", "o_proj") else heads.key_value
                sizes = (input_size, len(held) * width)
                if target == "o_proj":
                    sizes = (len(held) * width, hidden)
                made[prefix + target] = LoraProjection(config, *sizes, dtype=dtype)
                slots[prefix + target] = (target, held)
        super().__init__(made)
        self.config = config
        self._slots, self._head_dim = slots, width
        q, kv = options.num_attention_heads * width, options.num_key_value_heads * width
        self._whole = {"q_proj": (input_size, q), "o_proj": (q, hidden)}
        self._whole |= dict.fromkeys(("k_proj", "v_proj"), (input_size, kv))

    def add(
        self,
        x: Tensor,
        adapter_ids: Tensor | None,
        target: str,
        product: Tensor,
        *,
        is_prefill_stage: bool,
    ) -> Tensor:
        """Add each row's low-rank term to a projection.

        Args:
            x: `(batch, seq_len, in_features)`, the projection's input.
            adapter_ids: `(batch,)`, or None for no adapters.
            target: `q_proj`, `k_proj`, `v_proj` or `o_proj`.
            product: `(batch, seq_len, out_features)`, the projection of `x` with its bias.
            is_prefill_stage: the phase, which says which heads this rank holds.

        Returns:
            Like `product`.
        """
        name = self._prefixes[is_prefill_stage] + target
        if adapter_ids is None or name not in self:
            return product
        term: Tensor = self[name](x, adapter_ids)
        return (product.to(term.dtype) + term).to(product.dtype)

    def load_adapter(
        self,
        index: int,
        state_dict: Mapping[str, Tensor],
        *,
        lora_alpha: float,
        use_rslora: bool = False,
        prefix: str = "",
    ) -> None:
        """Put one adapter into place; projections it does not name get none.

        Args:
            index: its id from now on.
            state_dict: entries `*.<projection>.lora_A.weight`, `(rank, in_features)`, and
                `*.lora_B.weight`, `(out_features, rank)`, as PEFT writes them, of every head of
                the model.
            lora_alpha: numerator of the scaling.
            use_rslora: divide it by the root of the rank and not by the rank.
            prefix: where this layer's entries are; others are not read.

        Raises:
            ConfigError: `index` is not an id.
            StateDictError: an unknown projection, half of a pair, or a shape that does not fit.
        """
        if not 0 <= index < self.config.max_loras:
            raise ConfigError(explain("index", f"be in 0..{self.config.max_loras - 1}", index))
        found: dict[str, dict[str, Tensor]] = {}
        for name, value in state_dict.items():
            entry = _ENTRY.match(name) if name.startswith(prefix) else None
            if entry is not None:
                found.setdefault(entry[1], {})[entry[2]] = value
        self._check(found)
        with torch.no_grad():
            for name, module in self.items():
                assert isinstance(module, LoraProjection)
                target, slots = self._slots[name]
                module.lora_A[index].zero_()
                module.lora_B[index].zero_()
                if target not in found:
                    continue
                down, up = self._own(target, slots, found[target]["A"], found[target]["B"])
                rank = down.shape[0]
                module.lora_A[index, :rank] = down
                module.lora_B[index, :, :rank] = up
                module.scaling[index] = lora_alpha / (rank**0.5 if use_rslora else rank)

    def _own(self, target: str, slots: Slots, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's heads of an adapter's two matrices."""
        width = self._head_dim
        if target == "o_proj":
            return shard_heads(down, slots, width, 1), up
        return down, shard_heads(up, slots, width)

    def _check(self, found: Mapping[str, Mapping[str, Tensor]]) -> None:
        known = sorted(self.config.target_modules)
        unknown = sorted(set(found) - set(known))
        if unknown or not found:
            raise StateDictError(
                explain("adapter", f"name projections among {known}", unknown or "none")
            )
        for target, pair in found.items():
            if set(pair) != {"A", "B"}:
                raise StateDictError(
                    explain(f"adapter {target}", "hold lora_A and lora_B", sorted(pair))
                )
            down, up = tuple(pair["A"].shape), tuple(pair["B"].shape)
            most, (width, out) = self.config.max_lora_rank, self._whole[target]
            rank = down[0] if len(down) == 2 else 0
            if not 0 < rank <= most or down != (rank, width) or up != (out, rank):
                raise StateDictError(
                    explain(
                        f"adapter {target}",
                        f"have shapes (rank, {width}) and ({out}, rank), rank at most {most}",
                        f"{down} and {up}",
                    )
                )
