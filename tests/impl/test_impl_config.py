import dataclasses
from typing import Any

import pytest
import torch
from impl_layers import model

from impl import ConfigError, InferenceConfig, NeuronConfig

DP = {"is_continuous_batching": True, "batch_size": 8}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tp_degree": 6, "cp_degree": 4}, "tp_degree must be a multiple of cp_degree"),
        (
            {"tp_degree": 6, "attention_dp_degree": 4, **DP},
            "tp_degree must be a multiple of attention_dp_degree",
        ),
        (
            {"tp_degree": 4, "attention_dp_degree": 4, **DP, "batch_size": 2},
            "tkg_batch_size must be a multiple of attention_dp_degree, got 2 and 4",
        ),
        (
            {"tp_degree": 8, "cp_degree": 2, "attention_dp_degree": 4, **DP},
            "cp_degree must be a multiple of attention_dp_degree",
        ),
        ({"tp_degree": 2, "attention_dp_degree": 2, "batch_size": 2}, "is_continuous_batching"),
        ({"strided_context_parallel_kernel_enabled": True}, "cp_degree must exceed 1"),
        ({"k_cache_transposed": True, "flash_decoding_enabled": True}, "k_cache_transposed"),
        ({"k_cache_transposed": True, "is_chunked_prefill": True}, "k_cache_transposed"),
        ({"k_cache_transposed": True, "is_block_kv_layout": True}, "k_cache_transposed"),
        ({"attn_block_tkg_nki_kernel_enabled": True}, "qkv_kernel_enabled must be True"),
        (
            {
                "attn_block_tkg_nki_kernel_enabled": True,
                "qkv_kernel_enabled": True,
                "flash_decoding_enabled": True,
            },
            "be False when flash_decoding_enabled",
        ),
        (
            {
                "attn_block_tkg_nki_kernel_enabled": True,
                "qkv_kernel_enabled": True,
                "is_chunked_prefill": True,
            },
            "be False when is_chunked_prefill",
        ),
        ({"tp_degree": 4, "ep_dispatch_cc_option": "RS_AG"}, "tp_degree must be at most"),
        (
            {"tp_degree": 4, "ep_dispatch_cc_option": "RS_AG", "batch_size": 6},
            "tkg_batch_size must be a multiple of tp_degree",
        ),
        ({"ep_dispatch_cc_option": "XX"}, "ep_dispatch_cc_option"),
        ({"padding_side": "middle"}, "padding_side"),
        ({"logical_nc_config": 3}, "logical_nc_config"),
        ({"torch_dtype": torch.int8}, "torch_dtype"),
        ({"seq_len": 0}, "seq_len must be an integer >= 1, got 0"),
        ({"speculation_length": -1}, "speculation_length"),
    ],
)
def test_neuron_config_refuses(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        NeuronConfig(**fields)


@pytest.mark.parametrize(
    ("run", "fields", "words"),
    [
        ({}, {"num_attention_heads": 8, "num_key_value_heads": 3}, "got 8 and 3"),
        (
            {"tp_degree": 4, "attention_dp_degree": 2, **DP},
            {"num_attention_heads": 8, "num_key_value_heads": 4},
            "DP configuration is not supported",
        ),
        (
            {"tp_degree": 2, "cp_degree": 2},
            {"num_attention_heads": 4, "num_key_value_heads": 4},
            "num_key_value_heads must be at most tp_degree",
        ),
        (
            {"tp_degree": 8, "cp_degree": 4, "attention_dp_degree": 2, **DP},
            {"num_attention_heads": 8, "num_key_value_heads": 8},
            "at most tp_degree / attention_dp_degree",
        ),
        ({"flash_decoding_enabled": True}, {"attention_chunk_size": 4}, "flash_decoding_enabled"),
        ({"is_prefix_caching": True}, {"attention_chunk_size": 4}, "is_prefix_caching"),
        ({"is_chunked_prefill": True}, {"attention_chunk_size": 4}, "is_chunked_prefill"),
        ({"padding_side": "left"}, {"attention_chunk_size": 4}, "padding_side"),
        (
            {"tp_degree": 2, "attention_dp_degree": 2, **DP},
            {"attention_chunk_size": 4, "num_key_value_heads": 1},
            "attention_dp_degree",
        ),
        (
            {"tp_degree": 2, "cp_degree": 2},
            {"attention_chunk_size": 5},
            "attention_chunk_size must be a multiple of cp_degree",
        ),
        (
            {"tp_degree": 2, "cp_degree": 2, "seq_len": 13},
            {"attention_chunk_size": 4},
            "seq_len % attention_chunk_size",
        ),
        ({"windowed_context_encoding_size": 8}, {"sliding_window": 4}, "got 8 and 4"),
        ({}, {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ({}, {"sliding_window": 0}, "sliding_window"),
    ],
)
def test_inference_config_refuses(run: dict[str, Any], fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        model(run=run, **fields)


@pytest.mark.parametrize(
    ("tp", "cp", "dp", "kv"), [(8, 4, 2, 4), (16, 8, 2, 4), (64, 16, 8, 8), (8, 2, 1, 8)]
)
def test_documented_parallel_configurations_are_accepted(
    tp: int, cp: int, dp: int, kv: int
) -> None:
    run = {"tp_degree": tp, "cp_degree": cp, "attention_dp_degree": dp, **(DP if dp > 1 else {})}
    config = model(run=run, num_attention_heads=64, num_key_value_heads=kv)
    assert config.neuron_config.cp_degree == cp


def test_too_few_copies_of_a_head_after_prefill_are_refused() -> None:
    # cp 4 of 12 ranks leaves 3 ranks a group: 4 copies of 2 heads; decode in 2 groups of 6 reads 6.
    run = {"tp_degree": 12, "cp_degree": 4, "attention_dp_degree": 2, **DP}
    with pytest.raises(ConfigError, match="as many copies"):
        model(run=run, num_attention_heads=12, num_key_value_heads=2)


def test_configurations_are_frozen_and_keyword_only() -> None:
    config = model()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1
    with pytest.raises(TypeError):
        InferenceConfig(config.neuron_config, 48, 6)


def test_unset_fields_follow_the_ones_they_default_to() -> None:
    run = NeuronConfig(batch_size=3, seq_len=7, torch_dtype=torch.float16)
    assert (run.max_batch_size, run.tkg_batch_size, run.max_length) == (3, 3, 7)
    assert run.attention_dtype is torch.float16
    config = InferenceConfig(neuron_config=run, hidden_size=32, num_attention_heads=4)
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)


def test_every_field_is_documented() -> None:
    for kind in (NeuronConfig, InferenceConfig):
        for field in dataclasses.fields(kind):
            assert f"        {field.name}: " in kind.__doc__, field.name
