"""Where nki-library's `attention_block_tkg` can compute a decode step, and why not elsewhere.

| it needs | stated by |
| --- | --- |
| float16 or bfloat16 | documentation, "Supported Data Types" |
| no softcap | there is no argument for one |
| one KV head on the rank | docstring, "kv_heads: 1" |
| `head_dim` even and at most 128 | documentation; assertion in `attention_tkg.py` |
| `head_dim` 64 or 128 if it rotates, and every channel turns | assertions in `rope.py` |
| `head_dim` 128 if it norms q and k, both, with one epsilon | assertion in `_rms_norm_inplace` |
| at most 8 tokens a row | docstring, "S_tkg: <= 8 required" |
| rows times tokens times query heads at most 128 | documentation, "Constraints" |
| input as wide as the output, in 128s on each core | documentation; assertions in `qkv_tkg.py` |
| at most 4096 columns of q, k and v | assertion in `qkv_tkg.py` |
| slots in 128s, on each core if there are 256 or more | assertion in `attention_tkg.py` |
| the last slots not needed as a cache | reference of `attention_tkg` |
| no gradients | it has no backward |

Windows, chunks, drafts and trees are masks to it; sinks and biases have arguments. The output
projection's own text asks for hidden sizes in 512s; nothing asserts it, and nki-library tests the
block with 5376, so 128s are what is asked for here.

Source: Neuron documentation, "Attention Block TKG Kernel API Reference" (dated 2026-02-13), and
aws-neuron/nki-library at commit 0759719: `experimental/transformer/attention_block_tkg.py`,
`core/attention/attention_tkg.py`, `core/attention/attention_tkg_torch.py`,
`core/embeddings/rope.py`, `core/qkv/qkv_tkg.py`. Later versions of the block serve more KV heads
and wider heads; the arguments used here mean the same in them.
"""

from __future__ import annotations

import torch

from impl.kernels.token_generation_block import BlockRule, BlockWeights
from impl.slot_positions import ChunkSlots, ContiguousSlots, RollingSlots, SlotLayout

DTYPES = (torch.float16, torch.bfloat16)
PARTITIONS = 128
"""Rows of on-chip memory: what heads, tokens and slots are tiled by."""
ROTATED_WIDTHS = (64, 128)
MAX_TOKENS = 8
MAX_QKV_WIDTH = 4096


def has_free_tail(layout: SlotLayout, slots: int, q_len: int) -> bool:
    """Whether no step of `q_len` tokens that the cache can hold reads its last `q_len` slots.

    Contiguous and chunk caches fill from slot 0, and the step's tokens still fit. (A row padded to
    `q_len` tokens may begin later: so near the end it comes out as NaN.) A ring does not end: it
    needs `q_len` slots beside it, as `impl.kv_cache.plan.kernel_cache_slots` leaves one.

    Args:
        layout: the kind of cache.
        slots: slots of the cache.
        q_len: tokens of the step.
    """
    if isinstance(layout, RollingSlots):
        return slots - layout.ring >= q_len
    return isinstance(layout, ContiguousSlots | ChunkSlots)


def attention_block_tkg_obstacle(
    weights: BlockWeights,
    rule: BlockRule,
    *,
    batch: int,
    q_len: int,
    slots: int,
    rotary_dim: int | None,
    logical_nc_config: int = 1,
    free_tail: bool = True,
    trains: bool = False,
) -> str | None:
    """Say why `attention_block_tkg` cannot compute a decode step.

    Args:
        weights: of this rank.
        rule: what is computed.
        batch: rows.
        q_len: tokens of a row.
        slots: slots of the cache.
        rotary_dim: channels of a head that turn; None is no rotation.
        logical_nc_config: physical cores that it is launched on.
        free_tail: no row needs the last `q_len` slots as a cache.
        trains: gradients will be asked for.

    Returns:
        The reason, in words; None if it can.
    """
    width, hidden = rule.head_dim, weights.qkv.shape[1]
    heads = weights.output.shape[1] // width
    rows = batch * q_len * heads
    norms = [norm for norm in (weights.q_norm, weights.k_norm) if norm is not None]
    hidden_tile = PARTITIONS * logical_nc_config
    # below two tiles the slots are not split over the cores
    slot_tile = hidden_tile if slots >= 2 * PARTITIONS else PARTITIONS
    dtype = weights.qkv.dtype
    reasons = (
        (dtype not in DTYPES, f"it serves float16 and bfloat16, and the layer is in {dtype}"),
        (rule.score.softcap is not None, "it has no softcap"),
        (
            rule.num_key_value_heads != 1,
            f"it serves one KV head a rank, and there are {rule.num_key_value_heads}",
        ),
        (width % 2 != 0, f"head_dim {width} is odd"),
        (width > PARTITIONS, f"head_dim {width} is above the {PARTITIONS} it serves"),
        (
            rotary_dim is not None and width not in ROTATED_WIDTHS,
            f"it rotates heads of 64 or 128, not of {width}",
        ),
        (
            rotary_dim not in (None, width),
            f"it turns every channel of a head, and {rotary_dim} of {width} turn",
        ),
        (len(norms) == 1, "it norms q and k, or neither"),
        (
            bool(norms) and width != PARTITIONS,
            f"it norms heads of {PARTITIONS} alone, not of {width}",
        ),
        (len({norm.eps for norm in norms}) > 1, "it has one epsilon for the norms of q and k"),
        (q_len > MAX_TOKENS, f"it takes {MAX_TOKENS} tokens a row, and there are {q_len}"),
        (
            rows > PARTITIONS,
            f"rows times tokens times query heads are {rows}, above the {PARTITIONS} it serves",
        ),
        (
            weights.output.shape[0] != hidden,
            f"it reads states as wide as it writes, not {hidden} and {weights.output.shape[0]}",
        ),
        (hidden % hidden_tile != 0, f"hidden size {hidden} is no multiple of {hidden_tile}"),
        (
            weights.qkv.shape[0] > MAX_QKV_WIDTH,
            f"q, k and v are {weights.qkv.shape[0]} wide, above the {MAX_QKV_WIDTH} it serves",
        ),
        (slots % slot_tile != 0, f"a cache of {slots} slots is no multiple of {slot_tile}"),
        (not free_tail, "it puts the step's tokens in the last slots, which hold cached keys"),
        (trains, "it has no backward here"),
    )
    return next((f"attention_block_tkg: {why}" for holds, why in reasons if holds), None)
