"""The arrays of a Llama model, and how a GGUF file names, orders and sizes them."""

from __future__ import annotations

from dataclasses import dataclass

from conformance.models.gguf_file import GgufFile, ModelUnavailable
from golden import (
    Array,
    AttentionConfig,
    AttentionWeights,
    RopeConfig,
    ShapeError,
    make_weights,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaConfig:
    """Sizes of a Llama model whose layers are all alike and whose head is tied to its embedding.

    Attributes:
        attention: every layer's attention.
        num_layers: decoder layers.
        context_length: positions the model was trained for.
        rms_norm_eps: added to the mean square under the root of each norm.
    """

    attention: AttentionConfig
    num_layers: int
    context_length: int
    rms_norm_eps: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LlamaLayer:
    """One decoder layer, float64, matrices as `(out, in)`.

    Attributes:
        input_norm: weight of the norm before attention, `(hidden_size,)`.
        attention: the attention layer's arrays.
        post_attention_norm: weight of the norm before the MLP, `(hidden_size,)`.
        gate_proj: `(intermediate_size, hidden_size)`.
        up_proj: like `gate_proj`.
        down_proj: `(hidden_size, intermediate_size)`.
    """

    input_norm: Array
    attention: AttentionWeights
    post_attention_norm: Array
    gate_proj: Array
    up_proj: Array
    down_proj: Array


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LlamaWeights:
    """A whole model, float64.

    Attributes:
        embedding: `(vocab_size, hidden_size)`; also the matrix of the tied language-model head.
        layers: the decoder layers in order.
        final_norm: weight of the norm before the head, `(hidden_size,)`.
    """

    embedding: Array
    layers: tuple[LlamaLayer, ...]
    final_norm: Array


def unpermute_rotary_rows(stored: Array, num_heads: int) -> Array:
    """Return the rows of a query or key projection in the order of the published model.

    P1: with `d = head_dim`, GGUF stores as row `h d + 2 i + j` the published row
        `h d + j d/2 + i`, for head `h`, channel pair `i < d/2` and `j` in {0, 1}. Its readers turn
        neighbouring channels (`interleaved` RoPE); the published model turns channel `i` with
        `i + d/2` (`half`). This undoes the reordering.

    Args:
        stored: `(num_heads * head_dim, hidden_size)`, float64.
        num_heads: heads of this projection: key/value heads for keys.

    Returns:
        The same rows in published order, shaped like `stored`.

    Raises:
        ShapeError: the rows do not split into heads of an even width.

    Source: `LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py, which this inverts.
    """
    rows, columns = stored.shape
    if rows % (2 * num_heads):
        raise ShapeError(
            f"stored must have a multiple of 2 * num_heads rows, got {rows} and {num_heads}"
        )
    pairs = rows // (2 * num_heads)
    by_pair = stored.reshape(num_heads, pairs, 2, columns)
    published: Array = by_pair.swapaxes(1, 2).reshape(rows, columns)
    return published


def read_config(file: GgufFile) -> LlamaConfig:
    """Read the sizes of a Llama model from a GGUF file's metadata.

    Raises:
        ModelUnavailable: the file holds another architecture.
    """
    architecture = file.text("general.architecture")
    if architecture != "llama":
        raise ModelUnavailable(
            f"general.architecture must be 'llama', got {architecture!r} in {file.path.name}"
        )
    return LlamaConfig(
        attention=AttentionConfig(
            hidden_size=int(file.number("llama.embedding_length")),
            num_attention_heads=int(file.number("llama.attention.head_count")),
            num_key_value_heads=int(file.number("llama.attention.head_count_kv")),
            rope=RopeConfig(
                theta=file.number("llama.rope.freq_base"),
                rotary_dim=int(file.number("llama.rope.dimension_count")),
            ),
        ),
        num_layers=int(file.number("llama.block_count")),
        context_length=int(file.number("llama.context_length")),
        rms_norm_eps=file.number("llama.attention.layer_norm_rms_epsilon"),
    )


def read_attention(file: GgufFile, config: LlamaConfig, layer: int) -> AttentionWeights:
    """Read one layer's attention, its query and key rows in published order (P1)."""
    attention, block = config.attention, f"blk.{layer}"
    return make_weights(
        attention,
        q_proj=unpermute_rotary_rows(
            file.tensor(f"{block}.attn_q.weight"), attention.num_attention_heads
        ),
        k_proj=unpermute_rotary_rows(
            file.tensor(f"{block}.attn_k.weight"), attention.num_key_value_heads
        ),
        v_proj=file.tensor(f"{block}.attn_v.weight"),
        o_proj=file.tensor(f"{block}.attn_output.weight"),
    )


def read_weights(file: GgufFile, config: LlamaConfig) -> LlamaWeights:
    """Read the whole model."""
    return LlamaWeights(
        embedding=file.tensor("token_embd.weight"),
        layers=tuple(_read_layer(file, config, layer) for layer in range(config.num_layers)),
        final_norm=file.tensor("output_norm.weight"),
    )


def _read_layer(file: GgufFile, config: LlamaConfig, layer: int) -> LlamaLayer:
    block = f"blk.{layer}"
    return LlamaLayer(
        input_norm=file.tensor(f"{block}.attn_norm.weight"),
        attention=read_attention(file, config, layer),
        post_attention_norm=file.tensor(f"{block}.ffn_norm.weight"),
        gate_proj=file.tensor(f"{block}.ffn_gate.weight"),
        up_proj=file.tensor(f"{block}.ffn_up.weight"),
        down_proj=file.tensor(f"{block}.ffn_down.weight"),
    )
