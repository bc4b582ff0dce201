"""What a layer and a workload must keep to be spread over ranks: the documented refusals."""

from __future__ import annotations

from golden.checks import require
from golden.config import AttentionConfig
from golden.sharding.head_layout import REPLICATE_TO_TP_DEGREE, sharding_strategy
from golden.sharding.parallelism import Parallelism


def check_layer(config: AttentionConfig, parallelism: Parallelism) -> None:
    """Require that a layer can be spread so.

    D10: key/value heads that decode needs on a rank must have been computed there by prefill.

    Raises:
        ConfigError: a documented combination that cannot be.

    Source: neuronx-distributed-inference, `validate_tp_prefill_to_dp_decode`,
    `get_kv_head_indices_context_parallel_dp_decode`, `NeuronConfig` and `LearnedSink`.
    """
    _check_transition(config.num_key_value_heads, parallelism)
    for mesh in (parallelism.prefill_mesh, parallelism.decode_mesh):
        require(
            config.learned_sinks_size is None or config.num_attention_heads % mesh.tp_degree == 0,
            "num_attention_heads must be a multiple of the ranks of a row when a layer has learned "
            f"sinks, got {config.num_attention_heads} and {mesh.tp_degree}; padded heads have none",
        )
    require(
        not parallelism.strided or config.sliding_window is None,
        f"strided requires a layer without sliding_window, got {config.sliding_window}",
    )
    _check_chunks(config, parallelism)
    _check_flash_decoding(config.num_key_value_heads, parallelism)


def _check_transition(kv_heads: int, parallelism: Parallelism) -> None:
    world, cp, dp = (
        parallelism.tp_degree,
        parallelism.cp_degree,
        parallelism.attention_dp_degree,
    )
    decode_width = world // dp
    if cp == 1 and dp > 1:
        before, after = max(kv_heads // world, 1), max(kv_heads // decode_width, 1)
        require(
            before == after,
            "DP configuration is not supported: a rank must have as many key/value heads in "
            f"prefill as in decode, got {before} and {after} of {kv_heads}",
        )
    if cp > 1 and dp == 1:
        require(
            world >= kv_heads,
            "tp_degree must be at least num_key_value_heads for decode after a context-parallel "
            f"prefill, got {world} and {kv_heads}",
        )
    if cp > 1 and dp > 1 and cp != dp:
        require(
            decode_width >= kv_heads,
            "tp_degree / attention_dp_degree must be at least num_key_value_heads after a "
            f"context-parallel prefill of another degree, got {decode_width} and {kv_heads}",
        )
        held = cp * max(world // cp // kv_heads, 1)
        needed = dp * max(decode_width // kv_heads, 1)
        require(
            held >= needed,
            "prefill must leave as many copies of a key/value head as decode needs, got "
            f"{held} and {needed} with cp_degree {cp} and attention_dp_degree {dp}",
        )


def _check_chunks(config: AttentionConfig, parallelism: Parallelism) -> None:
    chunk, cp = config.attention_chunk_size, parallelism.cp_degree
    require(
        parallelism.interleave == "none" or (chunk is not None and cp > 1),
        f"interleave {parallelism.interleave!r} requires attention_chunk_size and cp_degree above "
        f"1, got {chunk} and {cp}",
    )
    if chunk is None:
        return
    require(
        parallelism.attention_dp_degree == 1,
        "attention_dp_degree must be 1 for a layer with attention_chunk_size, got "
        f"{parallelism.attention_dp_degree}",
    )
    require(
        parallelism.cores_per_group == 1,
        "cores_per_group must be 1 (no flash decoding) for a layer with attention_chunk_size, got "
        f"{parallelism.cores_per_group}",
    )
    require(
        not parallelism.strided,
        "strided requires a layer without attention_chunk_size: chunks are cut one by one",
    )
    require(
        chunk % cp == 0,
        f"attention_chunk_size must be a multiple of cp_degree, got {chunk} and {cp}",
    )


def _check_flash_decoding(kv_heads: int, parallelism: Parallelism) -> None:
    cores, tp = parallelism.cores_per_group, parallelism.tp_degree
    if cores == 1:
        return
    require(
        sharding_strategy(tp, kv_heads, parallelism.strategy) == REPLICATE_TO_TP_DEGREE,
        f"flash decoding requires strategy {REPLICATE_TO_TP_DEGREE!r}: tp_degree must be a "
        f"multiple of num_key_value_heads, got {tp} and {kv_heads}",
    )
    require(
        tp // kv_heads % cores == 0,
        "cores_per_group must divide the ranks that share a key/value head, got "
        f"{cores} and {tp // kv_heads}",
    )


def check_prefill(
    config: AttentionConfig, parallelism: Parallelism, *, batch: int | None, q_len: int
) -> None:
    """Require that a prompt can be cut: nothing is rounded down and no token left out.

    Args:
        config: the layer.
        parallelism: how it is spread.
        batch: rows to cache in order; None where sequence ids say who caches what.
        q_len: tokens of the call.

    Raises:
        ConfigError: it cannot.
    """
    cp, world = parallelism.cp_degree, parallelism.tp_degree
    if batch is not None:
        check_batch(batch, parallelism)
    chunk = config.attention_chunk_size
    last = q_len if chunk is None else q_len % chunk
    require(
        last % cp == 0,
        f"q_len{'' if chunk is None else ' % attention_chunk_size'} must be a multiple of "
        f"cp_degree, got {last} and {cp}; pad the prompt",
    )
    require(
        not parallelism.sequence_parallel or q_len % world == 0,
        "q_len must be a multiple of tp_degree for sequence_parallel, got "
        f"{q_len} and {world}; pad the prompt",
    )


def check_decode(parallelism: Parallelism, *, batch: int) -> None:
    """Require that a decode batch can be cut.

    Raises:
        ConfigError: it cannot.
    """
    check_batch(batch, parallelism)
    require(
        parallelism.attention_dp_degree == 1
        or parallelism.ep_dispatch != "RS_AG"
        or batch % parallelism.tp_degree == 0,
        "ep_dispatch RS_AG requires a batch that is a multiple of tp_degree, got "
        f"{batch} and {parallelism.tp_degree}",
    )


def check_batch(batch: int, parallelism: Parallelism) -> None:
    """Require that data-parallel ranks get equally many rows.

    Raises:
        ConfigError: they do not.
    """
    dp = parallelism.attention_dp_degree
    require(
        batch % dp == 0,
        f"the batch must be a multiple of attention_dp_degree, got {batch} and {dp}",
    )
