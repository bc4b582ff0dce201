"""Layers on meshes, drawn so that every two factors meet, and the bound their ranks keep."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from golden import (
    Array,
    AttentionConfig,
    AttentionWeights,
    Capture,
    ConfigError,
    Lora,
    Positions,
    QKNorm,
    RopeConfig,
    TemperatureTuning,
    context_encoding,
    make_lora,
    weight_shapes,
)
from golden.sharding import (
    Parallelism,
    RankObserver,
    ShardedLayer,
    encode_packed_sharded,
    encode_sharded,
    generate_sharded,
    place_ranks,
    shard,
    unobserved_ranks,
)
from golden.sharding.rules import check_decode, check_layer, check_prefill
from tests.golden.layers import assert_within, gamma, integer_weights, small_integers
from tests.golden.sharding.bounds import LOW_RANK, few_ulps, worst_case

HIDDEN, HEAD_DIM, ADAPTERS = 8, 4, 3

FACTORS: dict[str, tuple[Any, ...]] = {
    "mesh": (
        (1, 1, 1),
        (2, 1, 1),
        (3, 1, 1),
        (4, 1, 1),
        (8, 1, 1),
        (2, 2, 1),
        (4, 2, 1),
        (4, 4, 1),
        (6, 3, 1),
        (8, 4, 1),
        (8, 8, 1),
        (2, 1, 2),
        (4, 1, 2),
        (8, 1, 4),
        (2, 2, 2),
        (4, 2, 2),
        (8, 4, 4),
        (4, 4, 2),
        (8, 4, 2),
        (16, 4, 2),
        (64, 8, 1),
        (64, 8, 8),
        (16, 8, 4),
    ),
    "heads": ((1, 1), (4, 4), (4, 1), (4, 2), (8, 2), (6, 2), (6, 3), (7, 1), (14, 2), (12, 4)),
    "strategy": (None, "convert-to-mha"),
    "sequence_parallel": (False, True),
    "strided": (False, True),
    "kv_exchange": ("all_gather", "ring"),
    "ep_dispatch": ("AR_AG", "RS_AG", "AG_AR"),
    "cores": (1, 2),
    "interleave": ("none", "after_global", "between", "before_global"),
    "mask": ("causal", "window1", "window3", "chunk"),
    "sinks": (False, True),
    "bias": ("none", "qkv", "o", "both"),
    "norm": ("none", "head", "post", "flat-rms", "flat-layer", "flat-weightless"),
    "rope": ("half", "interleaved", "none"),
    "range": ("free", "clip", "cap"),
    "lora": (False, True),
    "padding": ("none", "right", "left"),
    "draft": (1, 2),
    "size": (1, 2),
    "prompt": ("whole", "pieces", "packed"),
}
"""What a case is made of; degrees are (tp, cp, dp)."""

NORMS: dict[str, QKNorm | None] = {
    "none": None,
    "head": QKNorm(weight_offset=1.0),
    "post": QKNorm(placement="post_rope", weighted=False),
    "flat-rms": QKNorm(scope="projection"),
    "flat-layer": QKNorm(kind="layer", scope="projection"),
    "flat-weightless": QKNorm(scope="projection", weighted=False),
}

Choice = dict[str, Any]


@dataclass(frozen=True)
class Drawn:
    """One case: a layer, how it is spread, and a prompt followed by decode steps."""

    config: AttentionConfig
    parallelism: Parallelism
    batch: int
    q_len: int
    steps: int
    draft: int
    padding: str
    lora: bool
    seed: int
    prompt: str = "whole"

    @property
    def unit(self) -> int:
        """What the tokens of a prefill must be a multiple of."""
        spread = self.parallelism
        return spread.tp_degree if spread.sequence_parallel else spread.cp_degree

    @property
    def total(self) -> int:
        """Tokens of the longest row."""
        return self.q_len + self.steps * self.draft

    @property
    def lengths(self) -> Positions:
        """Tokens of each prompt."""
        short = np.arange(self.batch) % max(self.q_len - 1, 1)
        return self.q_len - (short if self.padding != "none" else np.zeros_like(short))


def drawn(choice: Choice, seed: int, *, steps: int = 2) -> Drawn:
    """Make a case of a choice of factors.

    Raises:
        ConfigError: the choice breaks a documented rule.
    """
    tp, cp, dp = choice["mesh"]
    mask, norm = choice["mask"], NORMS[choice["norm"]]
    per_head = norm is not None and norm.scope == "head"
    config = AttentionConfig(
        hidden_size=HIDDEN,
        num_attention_heads=choice["heads"][0],
        num_key_value_heads=choice["heads"][1],
        head_dim=HEAD_DIM,
        qkv_bias=choice["bias"] in ("qkv", "both"),
        o_bias=choice["bias"] in ("o", "both"),
        clip_qkv=3.0 if choice["range"] == "clip" else None,
        softcap=5.0 if choice["range"] == "cap" else None,
        qk_norm=norm,
        rope=None if choice["rope"] == "none" else RopeConfig(pairing=choice["rope"]),
        softmax_scale=2.0**-3 if per_head else 2.0**-7,
        sliding_window={"window1": 1, "window3": 3}.get(mask),
        attention_chunk_size=2 * cp if mask == "chunk" else None,
        learned_sinks_size=1 if choice["sinks"] else None,
        temperature_tuning=TemperatureTuning(floor_scale=2.0, attn_scale=0.5)
        if choice["rope"] == "none"
        else None,
    )
    parallelism = Parallelism(
        tp_degree=tp,
        cp_degree=cp,
        attention_dp_degree=dp,
        strategy=choice["strategy"],
        sequence_parallel=choice["sequence_parallel"],
        strided=choice["strided"],
        kv_exchange=choice["kv_exchange"],
        ep_dispatch=choice["ep_dispatch"],
        cores_per_group=choice["cores"],
        interleave=choice["interleave"],
    )
    unit = tp if choice["sequence_parallel"] else cp
    pieces = 2 if choice["prompt"] == "pieces" else 1
    q_len = unit * max(choice["size"] * pieces, -(-4 // unit))
    batch = tp if dp > 1 and choice["ep_dispatch"] == "RS_AG" else dp * choice["size"]
    case = Drawn(
        config,
        parallelism,
        batch,
        q_len,
        steps,
        choice["draft"],
        choice["padding"],
        choice["lora"],
        seed,
        choice["prompt"],
    )
    if case.lora and case.prompt == "packed":
        raise ConfigError("adapters are per row, and a packed row holds several sequences")
    check_layer(config, parallelism)
    place_ranks(config, parallelism)
    check_prefill(config, parallelism, batch=batch, q_len=q_len)
    check_decode(parallelism, batch=batch)
    return case


Pair = tuple[str, Any, str, Any]


def pairs_of(choice: Choice) -> Iterator[Pair]:
    """Yield every two factors with their values."""
    for (a, x), (b, y) in itertools.combinations(choice.items(), 2):
        yield a, x, b, y


@cache
def choices(count: int) -> tuple[tuple[Choice, ...], frozenset[Pair]]:
    """Draw valid choices until every pair that can meet has met, and on to `count`.

    Returns:
        The choices, and the pairs that never met, in 200 draws each and all others.
    """
    rng = random.Random(6)

    def sample(**fixed: Any) -> Choice:
        free = {name: rng.choice(values) for name, values in FACTORS.items()}
        # rare features are off by default, or they would rule each other out
        for name in ("strided", "cores", "interleave", "strategy"):
            if rng.random() < 0.6:
                free[name] = FACTORS[name][0]
        if fixed.get("cores") == 2:  # flash decoding: off with most others
            for name in ("strategy", "strided", "interleave", "mask"):
                free[name] = FACTORS[name][0]
            free["mesh"] = rng.choice(((2, 1, 1), (4, 1, 1), (8, 1, 1)))
        return free | fixed

    def valid(choice: Choice) -> bool:
        try:
            drawn(choice, 0)
        except ConfigError:
            return False
        return True

    found: list[Choice] = []
    met: set[Pair] = set()
    never: set[Pair] = set()
    every = [
        (a, x, b, y)
        for a, b in itertools.combinations(FACTORS, 2)
        for x, y in itertools.product(FACTORS[a], FACTORS[b])
    ]
    for pair in every:
        a, x, b, y = pair
        if pair in met:
            continue
        tried = (sample(**{a: x, b: y}) for _ in range(200))
        choice = next(filter(valid, tried), None)
        if choice is None:
            never.add(pair)
        else:
            found.append(choice)
            met.update(pairs_of(choice))
    rng.shuffle(found)
    small = [mesh for mesh in FACTORS["mesh"] if mesh[0] <= 8]
    while len(found) < count:
        choice = sample(mesh=rng.choice(small))
        if valid(choice):
            found.append(choice)
            met.update(pairs_of(choice))
    return tuple(found), frozenset(never - met)


@dataclass(frozen=True)
class Problem:
    """A case's arrays, and the exact layer's outputs by position with their bound."""

    weights: AttentionWeights
    lora: Lora | None
    hidden: Array
    output: Array
    bound: Array


def problem(case: Drawn) -> Problem:
    """Encode each row's whole sequence, prompt and decoded tokens, on one rank."""
    config, weights = case.config, integer_weights(case.config, case.seed)
    hidden = small_integers(case.seed, case.batch, case.total, HIDDEN)
    lora = integer_lora(config, case.batch, case.seed) if case.lora else None
    ring = case.parallelism.kv_exchange == "ring"
    parts = case.parallelism.cp_degree if ring else case.parallelism.cores_per_group
    output, bound = encoded(config, weights, hidden, lora=lora, parts=parts)
    return Problem(weights, lora, hidden, output, bound)


def encoded(
    config: AttentionConfig,
    weights: AttentionWeights,
    hidden: Array,
    *,
    parts: int,
    lora: Lora | None = None,
    rotary_position_ids: Any = None,
    few: bool = True,
) -> tuple[Array, Array]:
    """Encode sequences of small integers on one rank, and bound what ranks may differ by.

    Args:
        config: the layer.
        weights: small integers.
        hidden: `(batch, length, hidden_size)`, small integers.
        parts: partial softmaxes that ranks join.
        lora: adapters of small integers.
        rotary_position_ids: positions for RoPE alone.
        few: whether to bound by a few ulps; not where ranks see fewer keys than here.
    """
    positions = np.tile(np.arange(hidden.shape[1]), (hidden.shape[0], 1))
    capture = Capture()
    output = context_encoding(
        config,
        weights,
        hidden,
        position_ids=positions,
        rotary_position_ids=rotary_position_ids,
        lora=lora,
        observe=capture,
    ).output
    values = capture.values
    bound = worst_case(config, weights, lora, values, positions, parts=parts)
    if few:
        bound = np.minimum(bound, few_ulps(config, weights, lora, values, parts=parts))
    return output, bound


def integer_lora(config: AttentionConfig, batch: int, seed: int) -> Lora:
    """Return adapters of small integers on all projections, another one per row."""
    shapes = weight_shapes(config)
    down, up = {}, {}
    for index, target in enumerate("qkvo"):
        out, width = shapes[f"{target}_proj"]
        down[target] = small_integers(seed + index, ADAPTERS, LOW_RANK, width, largest=1)
        up[target] = small_integers(seed + index + 50, ADAPTERS, out, LOW_RANK, largest=1)
    ids = np.arange(batch) % (ADAPTERS + 1) - 1
    return make_lora(config, adapter_ids=ids, down=down, up=up, scaling=0.5)


def serve(
    case: Drawn,
    layer: ShardedLayer,
    problem: Problem,
    *,
    decode_layer: ShardedLayer | None = None,
    observe: RankObserver = unobserved_ranks,
) -> Iterator[tuple[int, Array, Array, Array]]:
    """Run a prompt and its decode steps on all ranks.

    Args:
        case: the case.
        layer: cut for the ranks.
        problem: arrays and exact outputs.
        decode_layer: the layer in decode, if it is another.
        observe: gives each rank an observer.

    Yields:
        Per rank and call: the rank, its output, the exact one at the same tokens, and the bound;
        rows of padding left out by a bound of infinity.
    """
    lengths, rows = case.lengths[:, None], np.arange(case.batch)[:, None]
    caches: Any = layer.empty_caches(batch=case.batch, max_length=case.total)
    prompts = packed_calls(case, problem) if case.prompt == "packed" else calls(case, problem)
    for prompt, sequences, places, arguments in prompts:
        encode = encode_packed_sharded if case.prompt == "packed" else encode_sharded
        prefill = encode(layer, prompt, caches=caches, observe=observe, **arguments)
        caches = prefill.caches
        residual = np.zeros_like(prompt)
        if case.parallelism.interleave == "before_global":
            residual = prompt
        for rank, (output, tokens) in enumerate(zip(prefill.outputs, prefill.tokens, strict=True)):
            at, of = places[:, tokens], sequences[:, tokens]
            want = problem.output[of, np.maximum(at, 0)] + residual[:, tokens]
            limit = problem.bound[of, np.maximum(at, 0)] + gamma(1) * np.abs(want)
            yield rank, output, want, np.where(at[..., None] < 0, np.inf, limit)
    for step in range(case.steps):
        at = lengths + step * case.draft + np.arange(case.draft)
        result = generate_sharded(
            decode_layer or layer,
            problem.hidden[rows, at],
            position_ids=at,
            caches=caches,
            lora=problem.lora,
            observe=observe,
        )
        caches = result.caches
        for rank, output in enumerate(result.outputs):
            yield rank, output, problem.output[rows, at], problem.bound[rows, at]


Call = tuple[Array, Positions, Positions, dict[str, Any]]
"""Hidden states, whose tokens they are and at which position (-1 for padding), and arguments."""


def calls(case: Drawn, problem: Problem) -> Iterator[Call]:
    """Yield the calls of a prompt: one, or two pieces, the second over what the first cached."""
    lengths, rows = case.lengths[:, None], np.arange(case.batch)[:, None]
    slots = np.arange(case.q_len)[None]
    offsets = case.q_len - lengths if case.padding == "left" else np.zeros_like(lengths)
    places = np.where((slots >= offsets) & (slots < offsets + lengths), slots - offsets, -1)
    first = case.q_len
    if case.prompt == "pieces":
        first = case.unit * (case.q_len // case.unit // 2)
    for piece in (slice(0, first), slice(first, case.q_len)):
        at = places[:, piece]
        if at.size:
            hidden = problem.hidden[rows, np.maximum(at, 0)]
            yield (
                hidden,
                np.broadcast_to(rows, at.shape),
                at,
                {"position_ids": at, "lora": problem.lora},
            )


def packed_calls(case: Drawn, problem: Problem) -> Iterator[Call]:
    """Yield two packed rows with a part of each prompt, and padding behind."""
    done = np.zeros_like(case.lengths)
    for until in (case.lengths // 2, case.lengths):
        new = until - done
        at = np.concatenate([np.arange(a, b) for a, b in zip(done, until, strict=True)])
        of = np.repeat(np.arange(case.batch), new)
        padding = -at.size % case.unit
        at = np.pad(at, (0, padding), constant_values=-1)[None]
        of = np.pad(of, (0, padding))[None]
        if at.size:
            hidden = problem.hidden[of, np.maximum(at, 0)]
            yield hidden, of, at, {"query_lens": new.tolist(), "key_lens": until.tolist()}
        done = until


def check(case: Drawn) -> None:
    """Assert that every rank returns the whole layer's output."""
    exact = problem(case)
    layer = shard(case.config, exact.weights, case.parallelism)
    for rank, got, want, bound in serve(case, layer, exact):
        try:
            assert_within(got, want, bound)
        except AssertionError as error:
            raise AssertionError(f"rank {rank} of {case}: {error}") from error


def plain(heads: tuple[int, int], degrees: tuple[int, int, int], **changes: Any) -> Choice:
    """Return a choice with every factor at its first value but these."""
    first = {name: values[0] for name, values in FACTORS.items()}
    assert changes.keys() <= first.keys()
    return first | {"heads": heads, "mesh": degrees, "bias": "both"} | changes
