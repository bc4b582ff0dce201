"""One attention layer, computed by `impl` and by its peers from the same weights.

All take hidden states and rotary tables that are made beforehand, as one set serves all layers of
a model, and write a decode step's key and value into a cache in place.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import impl

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
THETA = 500000.0
HIDDEN_OF_DECODE, HIDDEN_OF_PREFILL = 4096, 1024
"""Width of the residual stream: that of a model with such heads, and in prefill a quarter of it,
which takes a share of its time from the projections, where contenders differ in nothing."""

Call = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What a layer is asked to do: attend to `prior` cached tokens and to `tokens` new ones."""

    prior: int
    tokens: int
    dtype: torch.dtype

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return HIDDEN_OF_DECODE if self.prior else HIDDEN_OF_PREFILL

    def hidden_states(self) -> Tensor:
        """Signed values, `(1, tokens, hidden_size)`."""
        return _drawn(1, self.tokens, self.hidden_size).to(self.dtype)

    def positions(self) -> Tensor:
        """`(1, tokens)`."""
        return (torch.arange(self.tokens) + self.prior)[None]

    def caches(self) -> tuple[Tensor, Tensor]:
        """K and V, `(1, KV_HEADS, prior + tokens, HEAD_DIM)`; the step writes the last slots."""
        length = self.prior + self.tokens
        k, v = (_drawn(1, KV_HEADS, length, HEAD_DIM, seed=seed).to(self.dtype) for seed in (1, 2))
        return k, v


def contenders(step: Step, *, dense: bool = True, flex: bool = True) -> dict[str, Call]:
    """Return a call of each contender, by name.

    Args:
        step: prefill, with no prior tokens, or decode of one token.
        dense: whether to include the one that holds all scores at once.
        flex: whether to include flex attention, compiled; prefill only.
    """
    layer = _impl_layer(step)
    calls = {"impl": _impl(layer, step), "torch-sdpa": _torch(layer, step, _sdpa)}
    if flex and not step.prior:
        calls["flex-compiled"] = _torch(layer, step, _flex(step.tokens))
    if importlib.util.find_spec("transformers") is not None:
        if dense:
            calls["transformers-eager"] = _transformers(layer, step, "eager")
        calls["transformers-sdpa"] = _transformers(layer, step, "sdpa")
    return calls


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


IN_PLACE = {
    "fused_qkv": True,
    "qkv_kernel_enabled": True,
    "attn_block_tkg_nki_kernel_enabled": True,
    "attn_block_tkg_nki_kernel_cache_update": True,
}
"""A decode step as one function that writes its tokens into the cache, as the peers' do."""


def _impl_layer(step: Step, **features: Any) -> impl.NeuronAttentionBase:
    length = step.prior + step.tokens
    run: dict[str, Any] = IN_PLACE if step.prior else {}
    config = impl.InferenceConfig(
        neuron_config=impl.NeuronConfig(
            torch_dtype=step.dtype, batch_size=1, seq_len=length, **run
        ),
        hidden_size=step.hidden_size,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
    )
    torch.manual_seed(0)
    made = impl.NeuronAttentionBase(
        config,
        hidden_size=step.hidden_size,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        rotary_emb=impl.RotaryEmbedding(HEAD_DIM, max_position_embeddings=length, base=THETA),
        **features,
    )
    return made.eval().requires_grad_(False)


def prefill_layer(dtype: torch.dtype, tokens: int, **features: Any) -> Call:
    """Return a prefill of `impl` alone, with more features than the peers have."""
    step = Step(prior=0, tokens=tokens, dtype=dtype)
    return _impl(_impl_layer(step, **features), step)


def _impl(layer: impl.NeuronAttentionBase, step: Step) -> Call:
    hidden, positions = step.hidden_states(), step.positions()
    assert layer.rotary_emb is not None
    cos, sin = layer.rotary_emb(hidden, positions)
    arguments: dict[str, Any] = {"position_ids": positions, "cos_cache": cos, "sin_cache": sin}
    if not step.prior:
        arguments["attention_mask"] = torch.ones_like(positions, dtype=torch.bool)
        return lambda: layer(hidden, **arguments).hidden_states
    manager = impl.KVCacheManager(layer.config)
    manager.store(0, step.caches())
    arguments |= {"kv_mgr": manager, "idx": 0}
    arguments |= {"get_kv_per_layer": True, "update_kv_per_layer": True}
    return lambda: layer(hidden, **arguments).hidden_states


def _projections(layer: impl.NeuronAttentionBase, step: Step) -> dict[str, Tensor]:
    """Weights of q, k and v by Transformers' names."""
    names = ("q_proj", "k_proj", "v_proj")
    if not step.prior:
        return {name: getattr(layer.qkv_proj, name).weight for name in names}
    rows = [heads * HEAD_DIM for heads in (HEADS, KV_HEADS, KV_HEADS)]
    parts = torch.split(layer.qkv_proj.Wqkv.weight, rows)
    return dict(zip(names, (part.clone() for part in parts), strict=True))


Attend = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, enable_gqa=True
    )


def _flex(tokens: int) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(
        lambda b, h, q, k: q >= k, None, None, tokens, tokens, device="cpu", _compile=False
    )
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return compiled(q, k, v, block_mask=mask, enable_gqa=True)

    return attend


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def _torch(layer: impl.NeuronAttentionBase, step: Step, attend: Attend) -> Call:
    """Plain functions around an attention of PyTorch's own."""
    linear = torch.nn.functional.linear
    hidden = step.hidden_states()
    assert layer.rotary_emb is not None
    cos, sin = layer.rotary_emb(hidden, step.positions())
    weights = list(_projections(layer, step).values())
    output = layer.o_proj.o_proj.weight
    caches = step.caches() if step.prior else None

    def call() -> Tensor:
        q, k, v = (
            linear(hidden, weight).view(1, step.tokens, -1, HEAD_DIM).transpose(1, 2)
            for weight in weights
        )
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        if caches is not None:
            for cache, new in zip(caches, (k, v), strict=True):
                cache[:, :, step.prior :] = new
            k, v = caches
        heads = attend(q, k, v, caches is None)
        return linear(heads.transpose(1, 2).flatten(2), output)

    return call


@dataclass(frozen=True, slots=True)
class _Slots:
    """What Transformers needs of a cache: write in place, give all of it back."""

    caches: tuple[Tensor, Tensor]
    prior: int

    def update(self, k: Tensor, v: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        for cache, new in zip(self.caches, (k, v), strict=True):
            cache[:, :, self.prior :] = new
        return self.caches


def _transformers(layer: impl.NeuronAttentionBase, step: Step, kind: str) -> Call:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention

    config = LlamaConfig(
        hidden_size=step.hidden_size,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
    )
    config._attn_implementation = kind
    module: nn.Module = LlamaAttention(config, layer_idx=0).to(step.dtype).eval()
    state = {f"{name}.weight": weight for name, weight in _projections(layer, step).items()}
    module.load_state_dict({**state, "o_proj.weight": layer.o_proj.o_proj.weight})
    module.requires_grad_(False)
    hidden = step.hidden_states()
    assert layer.rotary_emb is not None
    tables = layer.rotary_emb(hidden, step.positions())
    mask = None
    if kind == "eager" and not step.prior:
        allowed = torch.ones(step.tokens, step.tokens, dtype=torch.bool).tril()
        lowest = torch.finfo(step.dtype).min
        mask = torch.zeros(1, 1, *allowed.shape, dtype=step.dtype).masked_fill(~allowed, lowest)
    slots = _Slots(step.caches(), step.prior) if step.prior else None

    def call() -> Tensor:
        out: Tensor = module(
            hidden, position_embeddings=tables, attention_mask=mask, past_key_values=slots
        )[0]
        return out

    return call
