from typing import Any

import pytest
import torch

from impl import GQA, ConfigError, GroupQueryAttention_O, GroupQueryAttention_QKV, LearnedSink
from impl.parallel.sharding_strategy import determine_sharding_strategy, get_shardable_head_counts


@pytest.mark.parametrize(
    ("tp", "heads", "kv", "expected"),
    [
        (32, 56, 8, (64, 32)),
        (4, 6, 2, (8, 4)),
        (64, 40, 8, (64, 64)),
        (2, 32, 8, (32, 8)),
        (3, 8, 2, (9, 9)),
        (16, 40, 10, (48, 48)),
        (1, 8, 2, (8, 2)),
        (4, 6, 6, (8, 8)),
    ],
)
def test_heads_are_padded_and_replicated_as_documented(
    tp: int, heads: int, kv: int, expected: Any
) -> None:
    strategy = determine_sharding_strategy(tp, kv)
    assert get_shardable_head_counts(tp, heads, kv, strategy) == expected


@pytest.mark.parametrize(
    ("tp", "kv", "expected"),
    [
        (32, 8, GQA.REPLICATE_TO_TP_DEGREE),
        (3, 2, GQA.CONVERT_TO_MHA),
        (2, 8, GQA.CONVERT_TO_MHA),
    ],
)
def test_replication_needs_an_even_number_of_ranks(tp: int, kv: int, expected: Any) -> None:
    assert determine_sharding_strategy(tp, kv) is expected
    assert determine_sharding_strategy(tp, kv, GQA.CONVERT_TO_MHA) is GQA.CONVERT_TO_MHA


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_projection_has_the_documented_parameters(fused: bool, bias: bool) -> None:
    made = GroupQueryAttention_QKV(48, 8, 6, 2, bias=bias, fused_qkv=fused)
    shapes = {name: tuple(p.shape) for name, p in made.named_parameters()}
    rows = {"Wqkv": 80} if fused else {"q_proj": 48, "k_proj": 16, "v_proj": 16}
    expected = {f"{name}.weight": (count, 48) for name, count in rows.items()}
    if bias:
        expected |= {f"{name}.bias": (count,) for name, count in rows.items()}
    assert shapes == expected
    q, k, v = made(torch.zeros(2, 3, 48))
    assert (q.shape, k.shape, v.shape) == ((2, 3, 48), (2, 3, 16), (2, 3, 16))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"fused_qkv": True, "gather_output": True}, "gather_output must be False"),
        ({"clip_qkv": 0.0}, "clip_qkv must be positive"),
        ({"num_key_value_heads": 4}, "got 6 and 4"),
    ],
)
def test_projection_refuses(fields: dict[str, Any], words: str) -> None:
    sizes = {"hidden_size": 48, "head_dim": 8, "num_attention_heads": 6, "num_key_value_heads": 2}
    with pytest.raises(ConfigError, match=words):
        GroupQueryAttention_QKV(**{**sizes, **fields})


def test_output_projection_adds_its_bias_once() -> None:
    made = GroupQueryAttention_O(5, 2, 3, bias=True)
    assert torch.equal(made(torch.zeros(1, 1, 6))[0, 0], made.o_proj.bias)


def test_sinks_are_split_over_ranks() -> None:
    assert LearnedSink(1, 8, torch.bfloat16, 4).get_sink().shape == (2,)
    with pytest.raises(ConfigError, match="got 6 and 4"):
        LearnedSink(1, 6, torch.bfloat16, 4)
