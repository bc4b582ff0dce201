"""One attention layer of a model in transformers, run in true float64, and golden's name for it.

torch and transformers are imported when a layer is built, so that a test module can skip itself
first. Nothing is downloaded: configurations are small and weights random.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

import golden

Array: TypeAlias = NDArray[np.float64]

WEIGHT_NAMES = {
    "q_proj.weight": "q_proj",
    "k_proj.weight": "k_proj",
    "v_proj.weight": "v_proj",
    "o_proj.weight": "o_proj",
    "dense.weight": "o_proj",
    "q_proj.bias": "q_bias",
    "k_proj.bias": "k_bias",
    "v_proj.bias": "v_bias",
    "o_proj.bias": "o_bias",
    "dense.bias": "o_bias",
    "q_norm.weight": "q_norm",
    "k_norm.weight": "k_norm",
    "query_layernorm.weight": "q_norm",
    "key_layernorm.weight": "k_norm",
    "q_layernorm.weight": "q_norm",
    "k_layernorm.weight": "k_norm",
    "q_layernorm.bias": "q_norm_bias",
    "k_layernorm.bias": "k_norm_bias",
    "sinks": "sinks",
}
"""Parameters of transformers' attention modules, by golden's names."""

SMALL = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 32,
    "num_hidden_layers": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Settings every model shares unless it says otherwise; three query heads a key/value head."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One attention layer: how transformers builds it, and what golden calls it.

    Attributes:
        name: for test ids.
        family: folder of `transformers.models`.
        prefix: of the classes `{prefix}Attention` and `{prefix}RotaryEmbedding`.
        config_class: its configuration.
        settings: of the configuration, over `SMALL`.
        layer: index of the layer.
        kind: which of the model's masks the layer takes.
        rope_per_kind: whether the rotary module is asked for the layer's kind.
        config: golden's configuration.
    """

    name: str
    family: str
    prefix: str
    config_class: str
    settings: Mapping[str, Any]
    config: golden.AttentionConfig
    layer: int = 0
    kind: str = "full_attention"
    rope_per_kind: bool = False


@contextmanager
def float32_means_float64() -> Iterator[None]:
    """Turn every request for float32 into one for float64.

    The models write float32 out by name for softmax, norms and angles, so a module converted to
    float64 still computes those in float32. Here the names mean float64, and factories that are
    given no dtype at all make float64 too.

    Yields:
        Nothing; on leaving, names and the default dtype mean what they did.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    def widened(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    class Widen(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if function is torch.Tensor.float:
                return args[0].double()
            named = {key: widened(value) for key, value in (kwargs or {}).items()}
            return function(*(widened(value) for value in args), **named)

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Widen():
            yield
    finally:
        torch.set_default_dtype(default)


@dataclass(kw_only=True)
class Oracle:
    """A layer of transformers with random weights, eager attention and its model's own masks.

    Masks and caches come from transformers, so what a window or chunk admits is not restated here.

    Attributes:
        layer: which one.
        exact: whether float32 requests become float64; False leaves the model as it is written.
        seed: of the weights.
        weights: golden's, the same numbers.
    """

    layer: Layer
    exact: bool = True
    seed: int = 0
    weights: golden.AttentionWeights = field(init=False)

    def __post_init__(self) -> None:
        import torch

        self.config = self._class("configuration", self.layer.config_class)(
            **SMALL | dict(self.layer.settings)
        )
        self.config._attn_implementation = "eager"
        with self._precision():
            attention = self._class("modeling", f"{self.layer.prefix}Attention")
            rotary = self._class("modeling", f"{self.layer.prefix}RotaryEmbedding")
            self.attention = attention(self.config, self.layer.layer).eval().to(torch.float64)
            self.rotary = rotary(config=self.config)
        rng = np.random.default_rng(self.seed)
        arrays = {}
        for name, parameter in sorted(self.attention.named_parameters()):
            array = _random_weight(rng, name, tuple(parameter.shape))
            parameter.data = torch.from_numpy(array)
            arrays[WEIGHT_NAMES[name]] = array
        self.weights = golden.make_weights(self.layer.config, **arrays)

    def _class(self, module: str, name: str) -> Any:
        family = self.layer.family
        return getattr(
            importlib.import_module(f"transformers.models.{family}.{module}_{family}"), name
        )

    def _precision(self) -> Any:
        return float32_means_float64() if self.exact else nullcontext()

    def new_cache(self) -> Any:
        """Return the cache `generate` would make for this model."""
        from transformers.cache_utils import DynamicCache

        return DynamicCache(config=self.config)

    def run(
        self,
        hidden: Array,
        positions: NDArray[np.int64],
        cache: Any = None,
        *,
        occupied: NDArray[np.bool_] | None = None,
    ) -> tuple[Array, Array]:
        """Run the layer.

        Args:
            hidden: `(batch, length, hidden_size)`.
            positions: `(batch, length)`; what padding holds does not matter.
            cache: from `new_cache`; takes this call's keys and values.
            occupied: `(batch, length)`, True for tokens, False for padding; None for no padding.

        Returns:
            Output `(batch, length, hidden_size)` and softmax weights, BHSD with keys last.
        """
        import torch

        states = torch.from_numpy(hidden)
        position_ids = torch.from_numpy(positions)
        kind = {"layer_type": self.layer.kind} if self.layer.rope_per_kind else {}
        with torch.no_grad(), self._precision():
            mask = self._mask(states, cache, occupied)
            output, weights = self.attention(
                hidden_states=states,
                position_embeddings=self.rotary(states, position_ids, **kind),
                attention_mask=mask,
                past_key_values=cache,
            )
        assert output.dtype == weights.dtype == torch.float64
        return output.numpy(), weights.numpy()

    def _mask(self, states: Any, cache: Any, occupied: NDArray[np.bool_] | None) -> Any:
        """Return the additive mask the model's forward would make for the layer's kind.

        It is asked for as booleans and turned into numbers here: the eager form overflows, since
        it mixes a float32 scalar with float64's lowest number.
        """
        import torch
        from transformers import masking_utils

        make: Callable[..., Any] = {
            "full_attention": masking_utils.create_causal_mask,
            "sliding_attention": masking_utils.create_sliding_window_causal_mask,
            "chunked_attention": masking_utils.create_chunked_causal_mask,
        }[self.layer.kind]
        self.config._attn_implementation = "sdpa"
        try:
            allowed = make(
                config=self.config,
                inputs_embeds=states,
                attention_mask=None if occupied is None else torch.from_numpy(occupied),
                past_key_values=cache,
                allow_is_causal_skip=False,
            )
        finally:
            self.config._attn_implementation = "eager"
        lowest = torch.finfo(torch.float64).min
        return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, lowest)


def _random_weight(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Array:
    """Return a weight that keeps scores moderate and leaves no part of the layer idle."""
    draw = rng.normal(size=shape)
    if len(shape) == 2:
        return draw / np.sqrt(shape[1])
    if "norm" in name and name.endswith("weight"):
        return 1.0 + 0.2 * draw
    return draw if name == "sinks" else 0.5 * draw


def _rope(kind: str = "default", theta: float = 10000.0, **settings: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **settings}


def _golden(**fields: Any) -> golden.AttentionConfig:
    sizes = {
        "hidden_size": SMALL["hidden_size"],
        "num_attention_heads": SMALL["num_attention_heads"],
        "num_key_value_heads": SMALL["num_key_value_heads"],
    }
    return golden.AttentionConfig(**sizes | fields)


WINDOW = 7
CHUNK = 8
_KINDS = ["sliding_attention", "full_attention"] * 2


def _gpt_oss(kind: str) -> Layer:
    return Layer(
        name=f"gpt_oss-{kind.removesuffix('_attention')}",
        family="gpt_oss",
        prefix="GptOss",
        config_class="GptOssConfig",
        settings={
            "num_attention_heads": 8,
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": _KINDS,
            "attention_bias": True,
            "num_local_experts": 2,
            "rope_parameters": _rope(
                "yarn",
                150000.0,
                factor=32.0,
                beta_fast=32.0,
                beta_slow=1.0,
                truncate=False,
                original_max_position_embeddings=4096,
            ),
        },
        layer=_KINDS.index(kind),
        kind=kind,
        config=_golden(
            num_attention_heads=8,
            head_dim=16,
            qkv_bias=True,
            o_bias=True,
            learned_sinks_size=1,
            sliding_window=WINDOW if kind == "sliding_attention" else None,
            rope=golden.RopeConfig(
                theta=150000.0,
                scaling=golden.YarnScaling(
                    factor=32.0, original_max_position_embeddings=4096, truncate=False
                ),
            ),
        ),
    )


def _llama(
    name: str, rope: Mapping[str, Any], scaling: Any, *, theta: float, context: int
) -> Layer:
    return Layer(
        name=name,
        family="llama",
        prefix="Llama",
        config_class="LlamaConfig",
        settings={"max_position_embeddings": context, "rope_parameters": dict(rope)},
        config=_golden(rope=golden.RopeConfig(theta=theta, scaling=scaling)),
    )


def _llama4(layer: int, *, qk_norm: bool = True, temperature: bool = True) -> Layer:
    rotates = layer != 3
    suffix = "" if qk_norm and temperature else "-plain"
    return Layer(
        name=("llama4-rope-chunked" if rotates else "llama4-nope-temperature") + suffix,
        family="llama4",
        prefix="Llama4Text",
        config_class="Llama4TextConfig",
        settings={
            "head_dim": 8,
            "no_rope_layers": [1, 1, 1, 0],
            "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
            "attention_chunk_size": CHUNK,
            "use_qk_norm": qk_norm,
            "attn_temperature_tuning": temperature,
            "floor_scale": 4,
            "attn_scale": 0.1,
            "rms_norm_eps": 1e-5,
            "intermediate_size_mlp": 32,
            "rope_parameters": _rope(theta=500000.0),
        },
        layer=layer,
        kind="chunked_attention" if rotates else "full_attention",
        config=_golden(
            head_dim=8,
            attention_chunk_size=CHUNK if rotates else None,
            qk_norm=golden.QKNorm(placement="post_rope", weighted=False, eps=1e-5)
            if rotates and qk_norm
            else None,
            rope=golden.RopeConfig(theta=500000.0, pairing="interleaved") if rotates else None,
            temperature_tuning=golden.TemperatureTuning(floor_scale=4, attn_scale=0.1)
            if temperature and not rotates
            else None,
        ),
    )


def _phi(*, qk_layernorm: bool) -> Layer:
    return Layer(
        name="phi-qk-layernorm" if qk_layernorm else "phi",
        family="phi",
        prefix="Phi",
        config_class="PhiConfig",
        settings={
            "qk_layernorm": qk_layernorm,
            "layer_norm_eps": 1e-5,
            "rope_parameters": _rope(partial_rotary_factor=0.5),
        },
        config=_golden(
            qkv_bias=True,
            o_bias=True,
            qk_norm=golden.QKNorm(kind="layer", eps=1e-5) if qk_layernorm else None,
            rope=golden.RopeConfig(rotary_dim=4),
        ),
    )


def _gemma3(kind: str) -> Layer:
    sliding = kind == "sliding_attention"
    return Layer(
        name=f"gemma3-{kind.removesuffix('_attention')}",
        family="gemma3",
        prefix="Gemma3",
        config_class="Gemma3TextConfig",
        settings={
            "head_dim": 16,
            "query_pre_attn_scalar": 20,
            "sliding_window": WINDOW,
            "layer_types": _KINDS,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "sliding_attention": _rope(theta=10000.0),
                "full_attention": _rope("linear", 1e6, factor=8.0),
            },
        },
        layer=_KINDS.index(kind),
        kind=kind,
        rope_per_kind=True,
        config=_golden(
            head_dim=16,
            softmax_scale=20**-0.5,
            sliding_window=WINDOW if sliding else None,
            qk_norm=golden.QKNorm(eps=1e-6, weight_offset=1.0),
            rope=golden.RopeConfig(theta=10000.0)
            if sliding
            else golden.RopeConfig(theta=1e6, scaling=golden.LinearScaling(factor=8.0)),
        ),
    )


LAYERS = {
    layer.name: layer
    for layer in (
        _gpt_oss("sliding_attention"),
        _gpt_oss("full_attention"),
        _llama(
            "llama-llama3",
            # Head 8 wide: of the four frequencies, two are kept, one is blended, one divided.
            _rope(
                "llama3",
                500000.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            ),
            golden.Llama3Scaling(
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            ),
            theta=500000.0,
            context=65536,
        ),
        _llama(
            "llama-yarn-truncated",
            # The ramp ends beyond the last pair of channels: high is 4, and there are 4 pairs.
            _rope("yarn", factor=4.0, original_max_position_embeddings=32768, attention_factor=0.9),
            golden.YarnScaling(
                factor=4.0, original_max_position_embeddings=32768, attention_factor=0.9
            ),
            theta=10000.0,
            context=131072,
        ),
        _llama4(0),
        _llama4(0, qk_norm=False),
        _llama4(3),
        _llama4(3, temperature=False),
        Layer(
            name="mistral-window",
            family="mistral",
            prefix="Mistral",
            config_class="MistralConfig",
            settings={"sliding_window": WINDOW, "rope_parameters": _rope()},
            kind="sliding_attention",
            config=_golden(sliding_window=WINDOW, rope=golden.RopeConfig()),
        ),
        Layer(
            name="qwen2-qkv-bias",
            family="qwen2",
            prefix="Qwen2",
            config_class="Qwen2Config",
            settings={"rope_parameters": _rope(theta=1e6), "use_sliding_window": False},
            config=_golden(qkv_bias=True, rope=golden.RopeConfig(theta=1e6)),
        ),
        Layer(
            name="qwen3-qk-rmsnorm",
            family="qwen3",
            prefix="Qwen3",
            config_class="Qwen3Config",
            settings={
                "head_dim": 16,
                "rms_norm_eps": 1e-6,
                "rope_parameters": _rope(theta=1e6),
                "use_sliding_window": False,
            },
            config=_golden(
                head_dim=16, qk_norm=golden.QKNorm(eps=1e-6), rope=golden.RopeConfig(theta=1e6)
            ),
        ),
        _phi(qk_layernorm=False),
        _phi(qk_layernorm=True),
        _gemma3("sliding_attention"),
        _gemma3("full_attention"),
        Layer(
            name="gemma2-softcap",
            family="gemma2",
            prefix="Gemma2",
            config_class="Gemma2Config",
            settings={
                "head_dim": 8,
                "query_pre_attn_scalar": 8,
                "attn_logit_softcapping": 1.5,
                "sliding_window": WINDOW,
                "layer_types": _KINDS,
                "rope_parameters": _rope(),
            },
            kind="sliding_attention",
            config=_golden(softcap=1.5, sliding_window=WINDOW, rope=golden.RopeConfig()),
        ),
        Layer(
            name="olmo-clip-qkv",
            family="olmo",
            prefix="Olmo",
            config_class="OlmoConfig",
            settings={"clip_qkv": 0.75, "rope_parameters": _rope()},
            config=_golden(clip_qkv=0.75, rope=golden.RopeConfig()),
        ),
        Layer(
            name="olmo2-projection-norm",
            family="olmo2",
            prefix="Olmo2",
            config_class="Olmo2Config",
            settings={"rms_norm_eps": 1e-5, "rope_parameters": _rope()},
            config=_golden(
                qk_norm=golden.QKNorm(scope="projection", eps=1e-5), rope=golden.RopeConfig()
            ),
        ),
        Layer(
            name="hunyuan-norm-after-rope",
            family="hunyuan_v1_dense",
            prefix="HunYuanDenseV1",
            config_class="HunYuanDenseV1Config",
            settings={"head_dim": 8, "rms_norm_eps": 1e-5, "rope_parameters": _rope()},
            config=_golden(
                qk_norm=golden.QKNorm(placement="post_rope", eps=1e-5), rope=golden.RopeConfig()
            ),
        ),
        Layer(
            name="glm-partial-interleaved",
            family="glm",
            prefix="Glm",
            config_class="GlmConfig",
            settings={
                "head_dim": 8,
                "attention_bias": True,
                "rope_parameters": _rope(partial_rotary_factor=0.5),
            },
            config=_golden(
                qkv_bias=True, rope=golden.RopeConfig(pairing="interleaved", rotary_dim=4)
            ),
        ),
    )
}
"""Layers by name; together they switch on every field of golden's configuration but fused_qkv."""
