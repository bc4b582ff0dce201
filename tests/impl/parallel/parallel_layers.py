"""Layers whose ranks load one checkpoint, for tests of `impl.parallel`."""

from typing import Any

import torch
from impl_layers import HIDDEN, WIDTH, model, positions, tokens
from torch import Tensor

from impl import NeuronAttentionBase, RotaryEmbedding

SEQ, BATCH = 24, 4


def checkpoint(
    heads: int, kv: int, *, bias: bool = False, sinks: bool = False
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"q_proj": (heads * WIDTH, HIDDEN), "o_proj": (HIDDEN, heads * WIDTH)}
    shapes |= dict.fromkeys(("k_proj", "v_proj"), (kv * WIDTH, HIDDEN))
    made: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in shapes.items()}
    if bias:
        made |= {f"{name}.bias": shape[:1] for name, shape in shapes.items()}
    if sinks:
        made["sinks"] = (heads,)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3
        for name, shape in made.items()
    }


def build(
    heads: int, kv: int, run: dict[str, Any], state: dict[str, Tensor], **features: Any
) -> NeuronAttentionBase:
    if run.get("attention_dp_degree", 1) > 1:
        run = {"is_continuous_batching": True, **run}
    config = model(
        run={"batch_size": BATCH, **run}, num_attention_heads=heads, num_key_value_heads=kv
    )
    made = NeuronAttentionBase(
        config,
        hidden_size=HIDDEN,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=WIDTH,
        rotary_emb=RotaryEmbedding(WIDTH),
        qkv_bias="q_proj.bias" in state,
        o_bias="o_proj.bias" in state,
        learned_sinks_size=1 if "sinks" in state else None,
        **features,
    )
    norms = {name: value for name, value in made.state_dict().items() if "layernorm" in name}
    made.load_state_dict(state | norms)
    return made


def encode(made: NeuronAttentionBase) -> Any:
    mask = torch.ones(BATCH, SEQ, dtype=torch.bool)
    return made(tokens(SEQ, BATCH), mask, positions(SEQ, batch=BATCH))
