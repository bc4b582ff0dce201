"""A Llama model in float64: golden's attention layers between plain norms and MLPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import expit

from conformance.models.llama_weights import LlamaConfig, LlamaLayer, LlamaWeights
from golden import Array, ContiguousCache, context_encoding, empty_cache, token_generation


class TraceError(ValueError):
    """A model was asked to run a sequence that it cannot."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trace:
    """What a model computed for a prompt and its greedy continuation; arrays are read-only.

    Token `t` sits at position `t`. The first `prompt_length` positions come from one context
    encoding (prefill), each later one from its own token generation (decode) step.

    Attributes:
        token_ids: the prompt, then the generated tokens.
        prompt_length: tokens of the prompt.
        attention_inputs: per layer the hidden states after its input norm, which its attention
            reads, `(1, len(token_ids), hidden_size)`, float64.
        logits: `(len(token_ids), vocab_size)`, float64; row `t` predicts token `t + 1`, so the last
            row predicts a token that was not run.
    """

    token_ids: tuple[int, ...]
    prompt_length: int
    attention_inputs: tuple[Array, ...]
    logits: Array

    @property
    def generated_ids(self) -> tuple[int, ...]:
        """The greedy continuation; it does not stop at an end-of-turn token."""
        return self.token_ids[self.prompt_length :]


class Pass(NamedTuple):
    """What one pass over some tokens computed.

    Attributes:
        logits: `(tokens, vocab_size)`, float64.
        attention_inputs: per layer `(1, tokens, hidden_size)`, float64.
        caches: per layer the keys and values of these and all earlier tokens.
    """

    logits: Array
    attention_inputs: tuple[Array, ...]
    caches: tuple[ContiguousCache, ...]


def generate(
    config: LlamaConfig, weights: LlamaWeights, prompt_ids: Sequence[int], decode_steps: int
) -> Trace:
    """Encode a prompt, then generate greedily, one token a step.

    Args:
        config: the model's sizes.
        weights: its arrays.
        prompt_ids: token ids, at least one.
        decode_steps: tokens to generate and run.

    Returns:
        The trace of all `len(prompt_ids) + decode_steps` tokens.

    Raises:
        TraceError: no prompt, a negative number of steps, or more tokens than the context holds.
    """
    length = len(prompt_ids) + decode_steps
    if not prompt_ids or decode_steps < 0 or length > config.context_length:
        raise TraceError(
            "prompt_ids and decode_steps must be at least one token and no negative number of "
            f"steps, together at most {config.context_length}, got {len(prompt_ids)} tokens and "
            f"{decode_steps} steps"
        )
    token_ids = list(prompt_ids)
    passes = [encode(config, weights, token_ids, max_length=length)]
    for _ in range(decode_steps):
        token_ids.append(int(np.argmax(passes[-1].logits[-1])))
        passes.append(decode(config, weights, token_ids[-1:], passes[-1].caches))
    return Trace(
        token_ids=tuple(token_ids),
        prompt_length=len(prompt_ids),
        attention_inputs=tuple(
            _frozen(np.concatenate([one.attention_inputs[layer] for one in passes], axis=1))
            for layer in range(config.num_layers)
        ),
        logits=_frozen(np.concatenate([one.logits for one in passes])),
    )


def encode(
    config: LlamaConfig,
    weights: LlamaWeights,
    token_ids: Sequence[int],
    *,
    max_length: int | None = None,
) -> Pass:
    """Run a whole sequence at once from position 0 (context encoding, prefill).

    Args:
        config: the model's sizes.
        weights: its arrays.
        token_ids: the tokens at positions 0, 1, ...
        max_length: slots of the caches it returns; None makes them just long enough.
    """
    slots = len(token_ids) if max_length is None else max_length
    empty = empty_cache(config.attention, batch=1, max_length=slots)
    return _run(config, weights, token_ids, (empty,) * config.num_layers, first_position=0)


def decode(
    config: LlamaConfig,
    weights: LlamaWeights,
    token_ids: Sequence[int],
    caches: tuple[ContiguousCache, ...],
) -> Pass:
    """Run the tokens that follow those in the caches (token generation, decode).

    Args:
        config: the model's sizes.
        weights: its arrays.
        token_ids: the new tokens.
        caches: per layer, as an earlier pass left them; not changed.
    """
    held = int(caches[0].positions.max()) + 1
    return _run(config, weights, token_ids, caches, first_position=held)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Return `weight * x / sqrt(mean(x**2) + eps)` along the last axis, shaped like `x`."""
    power = np.square(x).mean(axis=-1, keepdims=True)
    normed: Array = weight * (x / np.sqrt(power + eps))
    return normed


def swiglu(layer: LlamaLayer, x: Array) -> Array:
    """Return `down(silu(gate(x)) * up(x))`, with `silu(y) = y / (1 + exp(-y))`.

    Args:
        layer: holds the three projections.
        x: `(batch, length, hidden_size)`, float64.

    Returns:
        Shaped like `x`.

    Source: Shazeer (2020), arXiv 2002.05202.
    """
    gate = x @ layer.gate_proj.T
    product: Array = (gate * expit(gate) * (x @ layer.up_proj.T)) @ layer.down_proj.T
    return product


def _run(
    config: LlamaConfig,
    weights: LlamaWeights,
    token_ids: Sequence[int],
    caches: tuple[ContiguousCache, ...],
    *,
    first_position: int,
) -> Pass:
    attend = context_encoding if first_position == 0 else token_generation
    positions = first_position + np.arange(len(token_ids))[None]
    eps = config.rms_norm_eps
    hidden = weights.embedding[list(token_ids)][None]
    attention_inputs: list[Array] = []
    written: list[ContiguousCache] = []
    for layer, cache in zip(weights.layers, caches, strict=True):
        normed = rms_norm(hidden, layer.input_norm, eps)
        attended = attend(
            config.attention, layer.attention, normed, position_ids=positions, cache=cache
        )
        hidden = hidden + attended.output
        hidden = hidden + swiglu(layer, rms_norm(hidden, layer.post_attention_norm, eps))
        attention_inputs.append(normed)
        written.append(attended.cache)
    logits = rms_norm(hidden[0], weights.final_norm, eps) @ weights.embedding.T
    return Pass(logits, tuple(attention_inputs), tuple(written))


def _frozen(array: Array) -> Array:
    array.setflags(write=False)
    return array
