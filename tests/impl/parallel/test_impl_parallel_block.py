"""Decode blocks of tensor-parallel ranks: the products add up, with the bias once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_tkg_standin import BlockStandin
from impl_layers import ROUNDOFF, positions, relative_error, tokens
from nki_packages import forget_operators, install_packages
from parallel_layers import BATCH, SEQ, build, checkpoint, encode
from thread_ranks import on_ranks
from torch import Tensor

from impl import InferenceConfig, NeuronAttentionBase, NeuronConfig, RotaryEmbedding
from impl.attention_block import AttentionBlock
from impl.kernels import nki_block_limits

STATE = {
    "q_proj.weight": (256, 128),
    "k_proj.weight": (128, 128),
    "v_proj.weight": (128, 128),
    "o_proj.weight": (128, 256),
    "q_proj.bias": (256,),
    "k_proj.bias": (128,),
    "v_proj.bias": (128,),
    "o_proj.bias": (128,),
    "sinks": (4,),
}


def block_layer(run: dict[str, Any], state: dict[str, Tensor]) -> NeuronAttentionBase:
    """Four query heads and two KV heads of 64, whose decode asks for the block kernel."""
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    asked = {"attn_block_tkg_nki_kernel_enabled": True, "qkv_kernel_enabled": True}
    config = InferenceConfig(
        neuron_config=NeuronConfig(
            torch_dtype=torch.float64, batch_size=2, seq_len=128, fused_qkv=True, **asked, **run
        ),
        head_dim=64,
        **sizes,
    )
    made = NeuronAttentionBase(
        config,
        **sizes,
        head_dim=64,
        rotary_emb=RotaryEmbedding(64),
        qkv_bias=True,
        o_bias=True,
        learned_sinks_size=1,
    )
    made.load_state_dict(state)
    return made


@pytest.mark.parametrize("option", ["AR_AG", "RS_AG"])
def test_the_decode_block_on_ranks_gives_the_bits_of_the_layer(option: str) -> None:
    state = checkpoint(6, 2, bias=True, sinks=True)
    run = {"tp_degree": 2, "fused_qkv": True, "ep_dispatch_cc_option": option}
    asked = {"attn_block_tkg_nki_kernel_enabled": True, "qkv_kernel_enabled": True}
    step, at = tokens(1, BATCH, seed=9), positions(1, SEQ, BATCH)

    def decode(rank: int) -> tuple[Tensor, Tensor]:
        plain, block = build(6, 2, run, state), build(6, 2, {**run, **asked}, state)
        assert block.decode_kernel_choice(BATCH, 1, SEQ).reason.startswith("the block's torch form")
        past = encode(plain).present_key_value
        first, second = (made(step, None, at, past_key_value=past) for made in (plain, block))
        assert all(map(torch.equal, first.present_key_value, second.present_key_value))
        return first.hidden_states, second.hidden_states

    for plain, block in on_ranks(2, decode):
        assert torch.equal(plain, block)


def test_the_kernel_of_every_rank_adds_up_to_the_layer_with_the_bias_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = BlockStandin()
    install_packages(monkeypatch, "attention_block_tkg", kernel)
    served = (*nki_block_limits.DTYPES, torch.float64)
    monkeypatch.setattr(nki_block_limits, "DTYPES", served)
    monkeypatch.setattr("impl.attention_block.device_obstacle", lambda: None)
    choose = AttentionBlock.decode_kernel_choice
    monkeypatch.setattr(
        AttentionBlock,
        "decode_kernel_choice",
        lambda self, *shape, **given: choose(self, *shape, **{**given, "device_type": "neuron"}),
    )
    forget_operators()
    generator = torch.Generator().manual_seed(2)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    past, step = (drawn(2, 2, 128, 64), drawn(2, 2, 128, 64)), drawn(2, 1, 128)
    at = torch.tensor([[90], [4]])
    made = {n: 0.1 * drawn(*s) for n, s in STATE.items()}
    alone = block_layer({}, made)(step, None, at, past_key_value=past)
    assert not kernel.calls  # two KV heads are more than it serves

    def decode(rank: int) -> Tensor:
        own = (past[0][:, rank : rank + 1], past[1][:, rank : rank + 1])
        return block_layer({"tp_degree": 2}, made)(step, None, at, past_key_value=own).hidden_states

    for got in on_ranks(2, decode):
        assert relative_error(got, alone.hidden_states) < ROUNDOFF
    assert len(kernel.calls) == 2
    assert all(call["bias_out"] is None for call in kernel.calls)
    forget_operators()
