"""The module's error conditions, clause by clause; those of parallel degrees are in `parallel`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from impl_layers import HIDDEN, KV_HEADS, WIDTH, layer, model, positions, tokens

from impl import ConfigError, GroupQueryAttention_QKV, NeuronConfig, RMSNorm, UnsupportedError
from impl.strategy import get_flash_attention_strategy

CHUNK = {"attention_chunk_size": 4}
BLOCK_TKG = {"attn_block_tkg_nki_kernel_enabled": True, "qkv_kernel_enabled": True}


def chunked_step_of_three() -> Any:
    cache = tuple(torch.zeros(2, KV_HEADS, 8, WIDTH, dtype=torch.float64) for _ in range(2))
    return layer(**CHUNK)(tokens(3), position_ids=positions(3, 4), past_key_value=cache)


def strided_kernel(**facts: Any) -> Any:
    given = {"q_len": 512, "has_attention_mask": True, "head_dim": 64, "cp_degree": 2}
    given |= {"logical_nc_config": 2, "strided_context_parallel_kernel_enabled": True, **facts}
    return get_flash_attention_strategy(**given)


CLAUSES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "sinks in a chunked layer": (
        lambda: layer(learned_sinks_size=1, **CHUNK),
        ConfigError,
        "learned sinks are not supported for chunked attention",
    ),
    "several tokens decode in a chunked layer": (
        chunked_step_of_three,
        NotImplementedError,
        "hold one token in a decode step of a chunked layer, got 3",
    ),
    "more than one sink": (lambda: layer(learned_sinks_size=2), ConfigError, "must be 1 or None"),
    "q_layernorm alone": (
        lambda: layer(q_layernorm=RMSNorm(WIDTH)),
        ConfigError,
        "got q_layernorm alone",
    ),
    "k_layernorm alone": (
        lambda: layer(k_layernorm=RMSNorm(WIDTH)),
        ConfigError,
        "got k_layernorm alone",
    ),
    "strided kernel without context parallelism": (
        lambda: NeuronConfig(strided_context_parallel_kernel_enabled=True),
        ConfigError,
        "cp_degree must exceed 1",
    ),
    "strided kernel on one physical core": (
        lambda: strided_kernel(logical_nc_config=1),
        ConfigError,
        "logical_nc_config is 2",
    ),
    "strided kernel on few queries": (
        lambda: strided_kernel(q_len=64),
        ConfigError,
        "q_len exceeds head_dim",
    ),
    "strided kernel with a window": (
        lambda: strided_kernel(sliding_window=128),
        ConfigError,
        "no sliding_window",
    ),
    "chunks with flash decoding": (
        lambda: layer(run={"flash_decoding_enabled": True}, **CHUNK),
        ConfigError,
        "flash_decoding_enabled must be False",
    ),
    "chunks with prefix caching": (
        lambda: layer(run={"is_prefix_caching": True}, **CHUNK),
        ConfigError,
        "is_prefix_caching must be False",
    ),
    "chunks with chunked prefill": (
        lambda: layer(run={"is_chunked_prefill": True}, **CHUNK),
        ConfigError,
        "is_chunked_prefill must be False",
    ),
    "chunks with padding on the left": (
        lambda: layer(run={"padding_side": "left"}, **CHUNK),
        ConfigError,
        'padding_side must be "right"',
    ),
    "windows of a prompt unlike the sliding window": (
        lambda: model(run={"windowed_context_encoding_size": 8}, sliding_window=4),
        ConfigError,
        "windowed_context_encoding_size must equal sliding_window",
    ),
    "transposed keys with flash decoding": (
        lambda: NeuronConfig(k_cache_transposed=True, flash_decoding_enabled=True),
        ConfigError,
        "be False when flash_decoding_enabled",
    ),
    "transposed keys with chunked prefill": (
        lambda: NeuronConfig(k_cache_transposed=True, is_chunked_prefill=True),
        ConfigError,
        "be False when is_chunked_prefill",
    ),
    "transposed keys with a block layout": (
        lambda: NeuronConfig(k_cache_transposed=True, is_block_kv_layout=True),
        ConfigError,
        "be False when is_block_kv_layout",
    ),
    "block kernel with flash decoding": (
        lambda: NeuronConfig(flash_decoding_enabled=True, **BLOCK_TKG),
        ConfigError,
        "attn_block_tkg_nki_kernel_enabled must be False when flash_decoding_enabled",
    ),
    "block kernel with chunked prefill": (
        lambda: NeuronConfig(is_chunked_prefill=True, **BLOCK_TKG),
        ConfigError,
        "attn_block_tkg_nki_kernel_enabled must be False when is_chunked_prefill",
    ),
    "block kernel without the QKV kernel": (
        lambda: NeuronConfig(attn_block_tkg_nki_kernel_enabled=True),
        ConfigError,
        "qkv_kernel_enabled must be True",
    ),
    "a cache updated in place without the block kernel": (
        lambda: NeuronConfig(attn_block_tkg_nki_kernel_cache_update=True),
        ConfigError,
        "attn_block_tkg_nki_kernel_enabled must be True when "
        "attn_block_tkg_nki_kernel_cache_update is True",
    ),
    "fused projection that gathers its output": (
        lambda: GroupQueryAttention_QKV(HIDDEN, 8, 4, 2, fused_qkv=True, gather_output=True),
        ConfigError,
        "gather_output must be False when fused_qkv",
    ),
    "RoPE in the QKV kernel after a norm of the flat projection": (
        lambda: layer(
            run={"qkv_cte_nki_kernel_fuse_rope": True}, use_qk_norm=True, rms_norm_eps=1e-6
        ),
        ConfigError,
        "qkv_cte_nki_kernel_fuse_rope must be False",
    ),
}


@pytest.mark.parametrize(("attempt", "error", "words"), CLAUSES.values(), ids=CLAUSES)
def test_it_is_refused(attempt: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as raised:
        attempt()
    assert isinstance(raised.value, ValueError)


def test_several_tokens_of_a_chunked_layer_are_unsupported_rather_than_wrong() -> None:
    with pytest.raises(UnsupportedError):
        chunked_step_of_three()
