"""What the model is, under the names NxD Inference users know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from impl.neuron_config import NeuronConfig, require, require_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceConfig:
    """What the model is, and how it is run.

    Attributes:
        neuron_config: how it is run.
        hidden_size: width of the residual stream.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads, which divide the query heads; None is as many.
        head_dim: width of a head; None is `hidden_size // num_attention_heads`.
        num_hidden_layers: layers, which is the number of cache entries.
        rms_norm_eps: epsilon of the model's RMS norms.
        rope_theta: base of the rotary frequencies where `rope_parameters` has none.
        rope_parameters: rotary embedding, as Hugging Face writes it; None is the default kind.
        max_position_embeddings: longest position the model was made for; None if unknown.
        sliding_window: keys a query may see, its own included; None is unbounded.
        attention_chunk_size: positions meet only within one chunk; None is unbounded.
        layer_types: per layer "full_attention", "sliding_attention" or "chunked_attention";
            None if every layer is alike.
        num_cores_per_group: cores that share one KV head under flash decoding.

    Raises:
        ConfigError: a value out of range, or a combination that is not defined.
    """

    neuron_config: NeuronConfig
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    num_hidden_layers: int = 1
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_parameters: Mapping[str, Any] | None = None
    max_position_embeddings: int | None = None
    sliding_window: int | None = None
    attention_chunk_size: int | None = None
    layer_types: Sequence[str] | None = None
    num_cores_per_group: int = 1

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        require_positive(
            self,
            (
                "hidden_size",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "num_hidden_layers",
                "max_position_embeddings",
                "sliding_window",
                "attention_chunk_size",
                "num_cores_per_group",
            ),
        )
        check_head_counts(self.num_attention_heads, self.kv_heads)
        layers = self.layer_types
        if layers is not None:
            require(
                len(layers) == self.num_hidden_layers,
                "layer_types",
                "have num_hidden_layers entries",
                f"{len(layers)} and {self.num_hidden_layers}",
            )
        self._check_decode_sharding()
        if self.attention_chunk_size is not None:
            check_chunked_layer(self.neuron_config, self.attention_chunk_size)
        window, wce = self.sliding_window, self.neuron_config.windowed_context_encoding_size
        if window is not None and wce is not None:
            require(
                window == wce,
                "windowed_context_encoding_size",
                "equal sliding_window when both are set",
                f"{wce} and {window}",
            )

    @property
    def kv_heads(self) -> int:
        """`num_key_value_heads`, as an integer."""
        assert self.num_key_value_heads is not None
        return self.num_key_value_heads

    @property
    def head_width(self) -> int:
        """`head_dim`, as an integer."""
        assert self.head_dim is not None
        return self.head_dim

    def _check_decode_sharding(self) -> None:
        """Refuse degrees whose prefill ranks do not write every KV head that decode reads."""
        run, kv = self.neuron_config, self.kv_heads
        world, cp, dp = run.tp_degree, run.cp_degree, run.attention_dp_degree
        if dp > 1 and cp == 1:
            in_dp, in_tp = max(kv // (world // dp), 1), max(kv // world, 1)
            require(
                in_dp == in_tp,
                "attention_dp_degree",
                "leave as many KV heads on a rank in decode as in prefill",
                f"{in_dp} and {in_tp}",
                "this DP configuration is not supported",
            )
        if cp > 1 and dp == 1:
            require(world >= kv, "num_key_value_heads", "be at most tp_degree", f"{kv} and {world}")
        if cp > 1 and dp > 1 and cp != dp:
            group = world // dp
            require(
                group >= kv,
                "num_key_value_heads",
                "be at most tp_degree / attention_dp_degree",
                f"{kv} and {group}",
            )
            written = max(world // cp // kv, 1) * cp
            read = max(group // kv, 1) * dp
            require(
                written >= read,
                "cp_degree",
                "give at least as many copies of a KV head as decode reads",
                f"{written} and {read}",
            )


def check_head_counts(num_attention_heads: int, num_key_value_heads: int) -> None:
    """Refuse query heads that do not split evenly over the key/value heads.

    Raises:
        ConfigError: `num_attention_heads` is no multiple of `num_key_value_heads`.
    """
    require(
        num_attention_heads % num_key_value_heads == 0,
        "num_attention_heads",
        "be a multiple of num_key_value_heads",
        f"{num_attention_heads} and {num_key_value_heads}",
    )


def check_chunked_layer(neuron_config: NeuronConfig, attention_chunk_size: int) -> None:
    """Refuse what a chunked layer cannot be combined with.

    Raises:
        ConfigError: flash decoding, prefix caching, chunked prefill, left padding or data
            parallelism is on, or context parallelism does not cut each chunk evenly.
    """
    run, chunk = neuron_config, attention_chunk_size
    for name in ("flash_decoding_enabled", "is_prefix_caching", "is_chunked_prefill"):
        require(not getattr(run, name), name, "be False when attention_chunk_size is set", True)
    require(
        run.padding_side == "right",
        "padding_side",
        'be "right" when attention_chunk_size is set',
        run.padding_side,
    )
    dp, cp = run.attention_dp_degree, run.cp_degree
    require(dp == 1, "attention_dp_degree", "be 1 when attention_chunk_size is set", dp)
    require(
        chunk % cp == 0, "attention_chunk_size", "be a multiple of cp_degree", f"{chunk} and {cp}"
    )
    rest = run.seq_len % chunk
    require(
        rest % cp == 0,
        "seq_len % attention_chunk_size",
        "be a multiple of cp_degree",
        f"{rest} and {cp}",
    )
