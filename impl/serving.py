"""What this version does not serve, and the keywords of `forward`.

A legal request that is not served is refused with one sentence, at construction if the
configuration asks for it and at the call if an argument does. Nothing is approximated.
"""

from __future__ import annotations

from typing import Any

from impl.errors import AttentionError, ConfigError, UnsupportedError, explain
from impl.layer_options import LayerOptions
from impl.lora import LoraServingConfig
from impl.neuron_config import NeuronConfig, require
from impl.packing import PACKING_KEYWORDS

# Keyword arguments of the cache manager that pass through `forward`.
CACHE_KEYWORDS = frozenset(
    {
        "idx",
        "seq_len",
        "seq_ids",
        "kvcache_buffer",
        "scatter_index",
        "is_for_context_encoding",
        "active_block_table",
    }
)
# Those with a row for each of the batch.
ROW_KEYWORDS = ("seq_ids", "active_block_table", "scatter_index")
FORWARD_KEYWORDS = CACHE_KEYWORDS | {"use_polar_compatible_rope", *PACKING_KEYWORDS}


def _refuse(argument: str, rule: str, got: object, hint: str) -> None:
    raise UnsupportedError(explain(argument, rule, got, hint))


def check_layer_config(neuron_config: NeuronConfig) -> None:
    """Refuse adapters that are not described.

    Raises:
        ConfigError: `lora_config` is of another kind.
    """
    lora = neuron_config.lora_config
    if lora is not None and not isinstance(lora, LoraServingConfig):
        raise ConfigError(
            explain("lora_config", "be a LoraServingConfig or None", type(lora).__name__)
        )


def check_group(group: Any, tp_degree: int) -> None:
    """Refuse a process group of other ranks than the run's.

    Raises:
        UnsupportedError: it has another size.
    """
    if group is not None and group.size() != tp_degree:
        _refuse(
            "tensor_model_parallel_group",
            "have tp_degree ranks",
            f"{group.size()} and {tp_degree}",
            "a layer runs on all ranks",
        )


def check_cores(run: NeuronConfig, cores: int, options: LayerOptions) -> None:
    """Refuse flash decoding over cores that do not share one KV head each group.

    Args:
        run: how the layer is run.
        cores: `num_cores_per_group`.
        options: the layer's numeric options.

    Raises:
        ConfigError: flash decoding is off, heads and ranks do not fit, the layer is limited, or
            ranks split tokens or rows besides.
    """
    if cores == 1:
        return
    heads = options.num_key_value_heads
    require(
        run.flash_decoding_enabled,
        "flash_decoding_enabled",
        f"be True when num_cores_per_group is {cores}",
        False,
    )
    require(
        heads * cores == run.tp_degree and heads < options.num_attention_heads,
        "num_cores_per_group",
        "be tp_degree / num_key_value_heads, in a layer whose query heads share KV heads",
        f"{cores} for {run.tp_degree} and {heads}",
        "the cores of a group keep one KV head together",
    )
    require(
        run.cp_degree == 1 and run.attention_dp_degree == 1,
        "cp_degree and attention_dp_degree",
        f"be 1 when num_cores_per_group is {cores}",
        f"{run.cp_degree} and {run.attention_dp_degree}",
    )
    require(
        options.sliding_window is None,
        "sliding_window",
        f"be None when num_cores_per_group is {cores}",
        options.sliding_window,
        "a rolling cache is short enough for one core",
    )


def check_keywords(keywords: dict[str, Any]) -> None:
    """Refuse keywords of `forward` that nobody reads.

    Raises:
        AttentionError: there is one.
    """
    unknown = sorted(set(keywords) - FORWARD_KEYWORDS)
    if unknown:
        raise AttentionError(
            explain("keyword arguments", f"be among {sorted(FORWARD_KEYWORDS)}", unknown)
        )
