"""Caches of every kind driven through one schedule, beside a plain log of what was written."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from impl_layers import KV_HEADS, WIDTH, model
from torch import Tensor

from impl import KVCacheManager
from impl.kv_cache import slot_mapping
from impl.slot_positions import slot_positions

LINES, LENGTH, BLOCK = 3, 32, 4
TABLES = torch.tensor(
    [[7, 2, 9, 4, 16, 0, 11, 18], [3, 22, 5, 1, 13, 8, 20, 6], [10, 12, 14, 15, 17, 19, 21, 23]]
)
PAGES = {"is_block_kv_layout": True, "pa_num_blocks": 24, "pa_block_size": BLOCK}


@dataclass(frozen=True)
class Kind:
    """A kind of cache.

    Attributes:
        run: its fields of `NeuronConfig`.
        fields: those of `InferenceConfig`.
        drafts: tokens of its longest decode step.
        scales: of keys and values, for quantised kinds.
        padding: side of the padding it takes.
        cores: the managers that hold a sequence together, each one core's; None for one that holds
            all.
    """

    run: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    drafts: int = 3
    scales: tuple[Any, Any] | None = None
    padding: str = "right"
    cores: tuple[int | None, ...] = (None,)

    def reach(self, first: int) -> range:
        """Cached positions that some token from `first` on may see."""
        window = self.fields.get("sliding_window")
        chunk = self.fields.get("attention_chunk_size")
        start = 0 if window is None else max(first - window + 1, 0)
        return range(start if chunk is None else first - first % chunk, first)


def quantised(dtype: torch.dtype, scales: Any = None) -> Kind:
    run = {"kv_cache_quant": True, "kv_cache_quant_dtype": dtype}
    return Kind(run=run, scales=scales)


SHARDED: dict[str, Any] = {
    "run": {"flash_decoding_enabled": True},
    "fields": {"num_cores_per_group": 3},
}
PER_HEAD, PER_CHANNEL = torch.tensor([0.5, 2.0]), torch.full((KV_HEADS, WIDTH), 0.25)
KINDS = {
    "contiguous": Kind(),
    "transposed": Kind(run={"k_cache_transposed": True}),
    "tiled": Kind(run={"kv_cache_tiling": True, "seq_len": 256}),
    "rolling": Kind(fields={"sliding_window": 4}, drafts=1),
    "rolling, drafts": Kind(run={"speculation_length": 3}, fields={"sliding_window": 4}),
    "rolling, kernel bucket": Kind(
        run={"attn_block_tkg_nki_kernel_cascaded_attention": True},
        fields={"sliding_window": 5},
        drafts=1,
    ),
    "rolling, window 1": Kind(fields={"sliding_window": 1}, drafts=1),
    "rolling, window above length": Kind(fields={"sliding_window": 90}),
    "chunk": Kind(fields={"attention_chunk_size": 4}, drafts=1),
    "chunk of one": Kind(fields={"attention_chunk_size": 1}, drafts=1),
    "paged": Kind(run={**PAGES, "is_prefix_caching": True}),
    "paged, heads first": Kind(run={**PAGES, "is_chunked_prefill": True}),
    "core-sharded": Kind(**SHARDED, cores=(0, 1, 2)),
    "core-sharded, one process": Kind(**SHARDED),
    "left-padded": Kind(run={"padding_side": "left"}, drafts=1, padding="left"),
    "float8_e4m3fn": quantised(torch.float8_e4m3fn),
    "float8_e5m2": quantised(torch.float8_e5m2),
    "float8_e4m3fn, scale": quantised(torch.float8_e4m3fn, (0.5, 2.0)),
    "int8, scale per head": quantised(torch.int8, (PER_HEAD, PER_HEAD)),
    "int8, scale per channel": quantised(torch.int8, (PER_CHANNEL, PER_CHANNEL)),
}


class Served:
    """Managers of one kind and a log of every sequence, token by token.

    Values are small integers, which every stored format holds exactly. Scales are powers of two,
    and a scale of 2 is used with even values alone.
    """

    def __init__(self, kind: Kind, seed: int = 0, poison: bool = True) -> None:
        self.kind = kind
        config = model(run={"seq_len": LENGTH, "batch_size": LINES, **kind.run}, **kind.fields)
        scales = None if kind.scales is None else [kind.scales]
        self.managers = [KVCacheManager(config, core=core, kv_scales=scales) for core in kind.cores]
        self.generator = torch.Generator().manual_seed(seed)
        self.log: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(LINES)]
        for manager in self.managers:
            for stored in manager.past_key_values:
                # What no token was written to must never be seen.
                stored.copy_(torch.full(stored.shape, float("nan") if poison else 0.0))

    def step(self, seq_ids: Sequence[int], lengths: Sequence[int], keep: Sequence[int]) -> None:
        """Write a step of as many tokens per row, of which the first are kept."""
        longest = max(max(lengths), 1)
        shape = (len(seq_ids), KV_HEADS, longest, WIDTH)
        k, v = (
            2.0 * torch.randint(-3, 4, shape, generator=self.generator).double() for _ in range(2)
        )
        positions = torch.full((len(seq_ids), longest), -1)
        for row, (seq, length, kept) in enumerate(zip(seq_ids, lengths, keep, strict=True)):
            lead = longest - length if self.kind.padding == "left" else 0
            if 0 <= seq < LINES:
                start = len(self.log[seq])
                columns = range(lead, lead + length)
                positions[row, lead : lead + length] = torch.arange(start, start + length)
                self.log[seq] += [(k[row, :, t], v[row, :, t]) for t in columns][:kept]
        self.write(torch.tensor(seq_ids), positions, (k, v))

    def write(self, seq_ids: Tensor, positions: Tensor, kv: tuple[Tensor, Tensor]) -> None:
        """Write tokens into the cache, through `store` and in place alternately."""
        for manager in self.managers:
            call: dict[str, Any] = {"position_ids": positions, "kv_per_layer": kv}
            call["seq_ids"] = seq_ids
            if "pa_block_size" in self.kind.run:
                tables = TABLES[seq_ids.clamp(0, LINES - 1)]
                call["active_block_table"] = tables
                if int(positions.max()) % 2:
                    call["scatter_index"] = slot_mapping(tables, positions, BLOCK)
            if int(positions.max()) % 3:
                manager.store(0, manager.update_kv_by_layer_id(0, **call))
            else:
                manager.write_kv_by_layer_id(0, **call)

    def read(self, seq_ids: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """K and V as rows, and the position of each slot, all cores side by side."""
        found = []
        for manager in self.managers:
            table = TABLES[seq_ids] if "pa_block_size" in self.kind.run else None
            k, v = manager.get_kv_by_layer_id(0, seq_ids=seq_ids, active_block_table=table)
            k = k.transpose(2, 3) if manager.caches[0].k_transposed else k
            found.append((k, v, slot_positions(manager.layout(0), first, v.shape[2])))
        k, v, at = zip(*found, strict=True)
        return torch.cat(k, 2), torch.cat(v, 2), torch.cat(at, 1)

    def leave(self, seq: int) -> None:
        """Free a line; its cache stays as it is."""
        self.log[seq] = []

    def check(self, seq_ids: Sequence[int]) -> None:
        """Assert that the next token of each sequence finds what the log holds, once each."""
        ids = torch.tensor(seq_ids)
        first = torch.tensor([len(self.log[seq]) for seq in seq_ids])
        k, v, at = self.read(ids, first)
        for row, seq in enumerate(seq_ids):
            reach = self.kind.reach(len(self.log[seq]))
            assert int(at[row].max()) < len(self.log[seq]), f"sequence {seq} finds stale slots"
            seen = [int(p) for p in at[row] if int(p) in reach]
            assert sorted(seen) == list(reach), f"sequence {seq} finds {seen}, not {reach}"
            for slot, p in enumerate(at[row].tolist()):
                if p in reach:
                    assert torch.equal(k[row, :, slot], self.log[seq][p][0]), (seq, p, slot)
                    assert torch.equal(v[row, :, slot], self.log[seq][p][1]), (seq, p, slot)


def serve(kind: Kind, seed: int = 0) -> None:
    """A fixed schedule: unequal prompts, decode, drafts, an idle row, a line taken over."""
    served = Served(kind, seed)
    served.step([0, 1, 2], [5, 11, 3], [5, 11, 3])
    served.check([0, 1, 2])
    served.step([2, -1, 0], [1, 0, 1], [1, 0, 1])
    served.check([2, 0, 1])
    for kept in (1, 2, 1):
        served.step([1, 2, 0], [kind.drafts] * 3, [min(kept, kind.drafts)] * 3)
        served.check([0, 1, 2])
    served.leave(1)
    served.step([1], [2], [2])
    served.check([1, 0, 2])
    served.step([0, LINES + 4], [4, 4], [4, 0])
    served.check([0, 1, 2])
