"""Layers with the caches they are served from: every step gives the rows of one long prefill."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from impl_layers import HIDDEN, ROUNDOFF, WIDTH, layer, model, relative_error, tokens
from served_caches import BLOCK, PAGES, TABLES
from torch import Tensor

from impl import KVCacheManager, NeuronAttentionBase, RotaryEmbedding
from impl.kv_cache import slot_mapping

LINES, LENGTH, TOTAL = 3, 32, 24


@dataclass(frozen=True)
class Served:
    """A layer and its cache.

    Attributes:
        run: fields of `NeuronConfig`.
        limits: window or chunk, of model and layer.
        features: other arguments of the layer.
        call: keywords of each step.
        drafts: tokens of its longest decode step.
    """

    run: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    drafts: int = 3


ROPE = {"rotary_emb": RotaryEmbedding(WIDTH)}
SINK = {**ROPE, "learned_sinks_size": 1}
POLAR: dict[str, Any] = {
    "features": {"rope_theta": 5e5},
    "call": {"use_polar_compatible_rope": True},
}
SPECULATION = {"speculation_length": 3, "enable_fused_speculation": True}
KINDS = {
    "contiguous": Served(features=SINK),
    "contiguous, polar": Served(**POLAR),
    "transposed": Served(run={"k_cache_transposed": True}, features=ROPE),
    "tiled": Served(run={"kv_cache_tiling": True, "seq_len": 256}, features=ROPE),
    "one core's share of flash decoding": Served(run={"flash_decoding_enabled": True}),
    "rolling": Served(limits={"sliding_window": 4}, features=SINK, drafts=1),
    "rolling, polar": Served(limits={"sliding_window": 5}, drafts=1, **POLAR),
    "rolling, window 1": Served(limits={"sliding_window": 1}, features=ROPE, drafts=1),
    "rolling, transposed elsewhere": Served(
        run={"k_cache_transposed": True}, limits={"sliding_window": 4}, features=ROPE, drafts=1
    ),
    "rolling, drafts": Served(run=SPECULATION, limits={"sliding_window": 4}, features=SINK),
    "rolling, drafts, polar": Served(run=SPECULATION, limits={"sliding_window": 6}, **POLAR),
    "chunk": Served(limits={"attention_chunk_size": 4}, features=ROPE, drafts=1),
    "chunk, polar": Served(limits={"attention_chunk_size": 6}, drafts=1, **POLAR),
    "paged": Served(run={**PAGES, "is_prefix_caching": True}, features=SINK),
    "paged, window": Served(run=PAGES, limits={"sliding_window": 5}, features=ROPE),
    "left-padded": Served(run={"padding_side": "left"}, features=SINK, drafts=1),
}


class Server:
    """Feeds tokens of three sequences to a layer, each row with its own cache line."""

    def __init__(self, kind: Served) -> None:
        run = {"seq_len": LENGTH, "batch_size": LINES, **kind.run}
        self.kind = kind
        config = model(run=run, **kind.limits)
        self.made: NeuronAttentionBase = layer(config=config, **kind.limits, **kind.features)
        self.manager = KVCacheManager(config)
        for stored in self.manager.past_key_values:
            stored.fill_(float("nan"))  # What no token was written to must never be seen.
        self.hidden = tokens(TOTAL, batch=LINES)
        at = torch.arange(TOTAL).expand(LINES, TOTAL)
        self.expected = self.made(self.hidden, at >= 0, at, **kind.call).hidden_states
        self.cached = [0] * LINES

    def step(
        self,
        seq_ids: list[int],
        lengths: list[int],
        keep: list[int] | None = None,
        prefill: bool = False,
        **call: Any,
    ) -> None:
        """Run a step, compare its kept rows, and count them as cached; others are wrong drafts."""
        longest = max(lengths)
        hidden = torch.full((len(seq_ids), longest, HIDDEN), 0.7, dtype=torch.float64)
        at = torch.full((len(seq_ids), longest), -1)
        spans = {}
        for row, (seq, length) in enumerate(zip(seq_ids, lengths, strict=True)):
            lead = longest - length if self.kind.run.get("padding_side") == "left" else 0
            kept = length if keep is None else keep[row]
            start = self.cached[seq]
            if seq >= 0:
                hidden[row, lead : lead + kept] = self.hidden[seq, start : start + kept]
                spans[row] = (seq, lead, start, kept)
            at[row, lead : lead + length] = torch.arange(start, start + length)
        if longest > 1 and not prefill:
            call["active_mask"] = torch.ones(1, 1, longest, longest, dtype=torch.bool).tril()
        if prefill and "windowed_context_encoding_window_idx" not in call:
            call["attention_mask"] = at >= 0
        if "pa_block_size" in self.kind.run:
            tables = TABLES[torch.tensor(seq_ids).clamp(0, LINES - 1)]
            call["active_block_table"] = tables
            call["scatter_index"] = slot_mapping(tables, at, BLOCK)
        output = self.made(
            hidden,
            position_ids=at,
            kv_mgr=self.manager,
            get_kv_per_layer=not prefill or "windowed_context_encoding_window_idx" in call,
            update_kv_per_layer=True,
            idx=0,
            seq_ids=torch.tensor(seq_ids),
            **self.kind.call,
            **call,
        )
        self.manager.store(0, output.present_key_value)
        for row, seq in enumerate(seq_ids):
            got = output.hidden_states[row]
            if seq < 0:
                assert torch.equal(got, torch.zeros_like(got))
                continue
            _, lead, start, kept = spans[row]
            whole = self.expected[seq, start : start + kept]
            assert relative_error(got[lead : lead + kept], whole) <= ROUNDOFF
            self.cached[seq] += kept


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_serving_gives_the_rows_of_one_long_prefill(kind: Served) -> None:
    server = Server(kind)
    server.step([2, 0], [7, 4], prefill=True)
    server.step([0, -1, 2], [1, 1, 1])
    server.step([1], [9], prefill=True)  # A sequence joins the batch.
    for _ in range(2):
        server.step([1, 2, 0], [1, 1, 1])
    if kind.drafts > 1:
        server.step([0, 1, 2], [3, 3, 3], keep=[3, 1, 2])
        server.step([2, -1, 0], [3, 3, 3], keep=[1, 1, 3])
    for _ in range(3):
        server.step([0, 1, 2], [1, 1, 1])


@pytest.mark.parametrize(
    "name",
    ["contiguous", "contiguous, polar", "transposed", "rolling", "rolling, drafts", "chunk"],
)
def test_windows_of_a_prompt_are_served_from_every_cache(name: str) -> None:
    kind = KINDS[name]
    size = 4 if not kind.limits else next(iter(kind.limits.values()))
    run = {**kind.run, "windowed_context_encoding_size": size}
    server = Server(Served(run, kind.limits, kind.features, kind.call, kind.drafts))
    for idx in range(3):
        lengths = [size, size] if idx < 2 else [size, 1]
        server.step([1, 0], lengths, prefill=True, windowed_context_encoding_window_idx=idx)
    for _ in range(3):
        server.step([0, 1], [1, 1])


def test_a_shared_prefix_is_read_through_the_blocks_of_another_sequence() -> None:
    server = Server(KINDS["paged"])
    server.hidden[1, :8] = server.hidden[0, :8]
    at = torch.arange(TOTAL).expand(LINES, TOTAL)
    server.expected = server.made(server.hidden, at >= 0, at).hidden_states
    server.step([0], [10], prefill=True)
    tables = TABLES[1:2].clone()
    tables[:, :2] = TABLES[0, :2]  # Two blocks of four tokens.
    rest = at[1:2, 8:12]
    output = server.made(
        server.hidden[1:2, 8:12],
        position_ids=rest,
        active_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool).tril(),
        kv_mgr=server.manager,
        get_kv_per_layer=True,
        idx=0,
        active_block_table=tables,
    )
    assert relative_error(output.hidden_states, server.expected[1:2, 8:12]) <= ROUNDOFF


def test_a_tree_of_drafts_gives_each_branch_its_own_row() -> None:
    server = Server(KINDS["contiguous"])
    server.step([0, 1, 2], [5, 5, 5], prefill=True)
    # A root, two children, and a child of the second: each row is a chain of its own.
    parents = [-1, 0, 0, 2]
    depth = [0, 1, 1, 2]
    drafts = tokens(4, batch=3, seed=8)
    tree = torch.zeros(4, 4, dtype=torch.bool)
    for node, parent in enumerate(parents):
        tree[node, node] = True
        if parent >= 0:
            tree[node] |= tree[parent]
    at = 5 + torch.tensor(depth).expand(3, 4)
    cache = {"kv_mgr": server.manager, "get_kv_per_layer": True, "idx": 0}
    got = server.made(drafts, position_ids=at, active_mask=tree[None, None], **cache)
    for node in range(4):
        path = [n for n in range(4) if tree[node, n]]
        chain = drafts[:, path]
        prompt = torch.cat((server.hidden[:, :5], chain), dim=1)
        at_chain = torch.arange(5 + len(path)).expand(3, -1)
        alone: Tensor = server.made(prompt, at_chain >= 0, at_chain).hidden_states[:, -1]
        assert relative_error(got.hidden_states[:, node], alone) <= ROUNDOFF


def test_the_attention_dtype_holds_from_the_cache_to_the_output() -> None:
    run = {"attention_dtype": torch.float32, "seq_len": LENGTH}
    config = model(torch.bfloat16, run, sliding_window=4)
    made = layer(config=config, sliding_window=4, learned_sinks_size=1, **ROPE)
    manager = KVCacheManager(config)
    assert {stored.dtype for stored in manager.past_key_values} == {torch.float32}
    hidden, at = tokens(7, dtype=torch.bfloat16), torch.arange(7).expand(2, 7)
    whole = made(hidden, at >= 0, at)
    assert whole.hidden_states.dtype is torch.bfloat16
    prompt = made(
        hidden[:, :6], at[:, :6] >= 0, at[:, :6], kv_mgr=manager, update_kv_per_layer=True, idx=0
    )
    manager.store(0, prompt.present_key_value)
    step = made(hidden[:, 6:], position_ids=at[:, 6:], kv_mgr=manager, get_kv_per_layer=True, idx=0)
    assert step.hidden_states.dtype is torch.bfloat16
    assert step.present_key_value[0].dtype is torch.float32
    # Contractions below 100 long are off by 100 * 2^-24 on either side, and bfloat16 values lie at
    # least 2^-8 apart: of 96 values a share of 200 * 2^-16, 0.3 %, may round apart, not 5 of them.
    assert int((step.hidden_states != whole.hidden_states[:, 6:]).sum()) < 5
