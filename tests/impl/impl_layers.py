"""Small layers, inputs and a plain definition of attention for the tests of `impl`."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from impl import InferenceConfig, NeuronAttentionBase, NeuronConfig

HIDDEN, HEADS, KV_HEADS, WIDTH = 48, 6, 2, 8

# Two float64 ways to one result. Contractions are below 100 long and at most four follow each
# other, each off by at most 100 u = 1.1e-14 of its largest partial sum; exp multiplies an error of
# the scores by their size, below 20 here.
ROUNDOFF = 1e-12


def model(
    dtype: torch.dtype = torch.float64, run: dict[str, Any] | None = None, **fields: Any
) -> InferenceConfig:
    """Configuration of a tiny model; `run` goes to `NeuronConfig`."""
    neuron_config = NeuronConfig(
        **{"torch_dtype": dtype, "batch_size": 2, "seq_len": 32, **(run or {})}
    )
    sizes = {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": WIDTH,
    }
    return InferenceConfig(neuron_config=neuron_config, **{**sizes, **fields})


def layer(
    dtype: torch.dtype = torch.float64,
    run: dict[str, Any] | None = None,
    config: InferenceConfig | None = None,
    seed: int = 0,
    **features: Any,
) -> NeuronAttentionBase:
    """A tiny layer with seeded signed weights, sinks included."""
    config = config or model(dtype, run)
    made = NeuronAttentionBase(
        config,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        **features,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(made.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
            parameter.copy_(1 + values if "norm" in name and name.endswith("weight") else values)
    return made.eval().requires_grad_(False)


def tokens(
    seq_len: int, batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 1
) -> Tensor:
    """Signed hidden states `(batch, seq_len, HIDDEN)`."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(batch, seq_len, HIDDEN, generator=generator, dtype=torch.float64)
    return states.to(dtype)


def positions(seq_len: int, start: int = 0, batch: int = 2) -> Tensor:
    return (torch.arange(seq_len) + start).expand(batch, seq_len)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


def attend_plainly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sees: Callable[[int, int, int], bool],
    *,
    divisor: float,
    sink: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention one row at a time: `sees(b, i, j)` says whether query i may see key j."""
    batch, heads, q_len, _ = q.shape
    group = heads // k.shape[1]
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(q_len):
                keys = [j for j in range(k.shape[2]) if sees(b, i, j)]
                if not keys:
                    continue
                scores = [float(q[b, h, i] @ k[b, h // group, j]) / divisor for j in keys]
                if softcap is not None:
                    scores = [softcap * math.tanh(s / softcap) for s in scores]
                exps = [math.exp(s) for s in scores]
                total = sum(exps) + (math.exp(float(sink[h])) if sink is not None else 0.0)
                for j, e in zip(keys, exps, strict=True):
                    out[b, h, i] += e / total * v[b, h // group, j]
    return out
