"""`ParallelWorkload`: one layer on one mesh of ranks, a prompt and the tokens after it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conformance.cases import Case, Workload
from conformance.errors import UsageError
from conformance.extras import NO_EXTRAS, Extras
from conformance.inputs import draw_layer
from conformance.parallel.stages import check_stages
from golden import Array, AttentionConfig, AttentionWeights, GoldenError, Lora
from golden.packing import Packing
from golden.sharding import Parallelism
from golden.sharding.rules import check_decode, check_layer, check_prefill


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelWorkload:
    """One thing to judge many ranks on: a prompt in one call or several, then a token a call.

    Attributes:
        config: the whole layer.
        parallelism: how it is spread. A reduction dtype is part of what a subject claims, not of
            what is right: golden adds in float64.
        lengths: tokens of each row's prompt; shorter rows are padded on the right.
        steps: tokens generated one after the other behind the prompt.
        piece: tokens of a call of the prompt, each over what those before it have cached; 0 is the
            prompt at once.
        packed: rows that the prompts come in, a share of each prompt side by side in a row; 0 is a
            row for each prompt.
        dtype: of the ranks' tensors; inputs are exact in it.
        regime: how inputs are drawn.
        seed: of the draw.
        stages: intermediates to judge on every rank, of `conformance.parallel.stages.OBSERVABLE`.
        extras: adapters that the rows use; nothing else comes with a layer on ranks.

    Raises:
        UsageError: the layer cannot be spread so, or a field is none.
    """

    config: AttentionConfig
    parallelism: Parallelism
    lengths: tuple[int, ...]
    steps: int = 0
    piece: int = 0
    packed: int = 0
    dtype: str = "float32"
    regime: str = "gaussian"
    seed: int = 0
    stages: tuple[str, ...] = field(default=())
    extras: Extras = NO_EXTRAS

    def __post_init__(self) -> None:
        if self.extras.input_norm:
            raise UsageError("extras must be adapters alone, got the input's norm")
        if self.steps < 0:
            raise UsageError(f"steps must not be negative, got {self.steps}")
        if self.piece < 0 or self.packed < 0 or (self.piece and self.packed):
            raise UsageError(
                "piece and packed must not be negative, nor both be given, got "
                f"{self.piece} and {self.packed}"
            )
        if self.packed and self.extras.adapters:
            raise UsageError(
                "extras must be none for packed rows, got adapters; sequences of a row share one"
            )
        check_stages(self.stages)
        whole = self.whole  # checks lengths, dtype, regime and seed
        try:
            check_layer(self.config, self.parallelism)
            for length in self.prompt_lengths:
                check_prefill(
                    self.config, self.parallelism, batch=whole.workload.batch, q_len=length
                )
            if self.steps:
                check_decode(self.parallelism, batch=whole.workload.batch)
        except GoldenError as error:
            raise UsageError(str(error)) from error

    @property
    def whole(self) -> Case:
        """The same layer and tokens as one prompt on one rank: what inputs are drawn for."""
        return Case(
            config=self.config,
            workload=Workload(
                phase="cte", lengths=tuple(length + self.steps for length in self.lengths)
            ),
            dtype=self.dtype,
            regime=self.regime,
            seed=self.seed,
            extras=self.extras,
        )

    @property
    def q_len(self) -> int:
        """Tokens of the prompt call, padding included."""
        return max(self.lengths)

    @property
    def packings(self) -> tuple[Packing, ...]:
        """How the prompts stand in each packed row; empty unless they are packed."""
        rows = self.packed
        ends = [
            tuple(length * row // rows for length in self.lengths)
            for row in range(rows + 1)
            if rows
        ]
        return tuple(
            Packing(tuple(b - a for a, b in zip(before, after, strict=True)), after)
            for before, after in pairwise(ends)
        )

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """Tokens of each call of the prompt, padding included: packed rows can be cut by ranks."""
        if not self.packed:
            whole, piece = self.q_len, self.piece or self.q_len
            return tuple(min(piece, whole - start) for start in range(0, whole, piece))
        spread = self.parallelism
        unit = spread.tp_degree if spread.sequence_parallel else spread.cp_degree
        return tuple(-(-sum(row.query_lens) // unit) * unit for row in self.packings)

    @property
    def prompts(self) -> int:
        """Calls that the prompt comes in."""
        return len(self.prompt_lengths)

    @property
    def calls(self) -> int:
        """Those of the prompt and the steps."""
        return self.prompts + self.steps

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.parallelism.tp_degree

    @property
    def id(self) -> str:
        """Readable name, `<layer>/<mesh>/<workload>`."""
        layer, workload = self.whole.id.split("/")
        behind = f"-behind{self.steps}" if self.steps else ""
        cut = f"-pieces{self.piece}" if self.piece else f"-packed{self.packed}" * bool(self.packed)
        return f"{layer}/{mesh_id(self.parallelism)}/{workload}{cut}{behind}"


def mesh_id(parallelism: Parallelism) -> str:
    """Spell out what differs from one rank: `tp8-cp4-dp2-sp-strided`."""
    given: dict[str, Any] = {
        "cp": parallelism.cp_degree,
        "dp": parallelism.attention_dp_degree,
        "cores": parallelism.cores_per_group,
    }
    tokens = [f"tp{parallelism.tp_degree}"]
    tokens += [f"{name}{degree}" for name, degree in given.items() if degree > 1]
    tokens += [
        name
        for name, on in {
            "sp": parallelism.sequence_parallel,
            "strided": parallelism.strided,
            "ring": parallelism.kv_exchange == "ring",
            "mha": parallelism.strategy == "convert-to-mha",
        }.items()
        if on
    ]
    if parallelism.ep_dispatch != "AR_AG":
        tokens.append(parallelism.ep_dispatch.replace("_", "").lower())
    if parallelism.interleave != "none":
        tokens.append(parallelism.interleave.replace("_", ""))
    if parallelism.eight_by_eight != "trn2":
        tokens.append(parallelism.eight_by_eight)
    if parallelism.reduce_dtype is not None:
        tokens.append(re.sub(r"[^a-z0-9]", "", f"reduce{parallelism.reduce_dtype}"))
    return "-".join(tokens)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WorkloadInputs:
    """Inputs of a parallel case, float64, exact in its dtype.

    Attributes:
        weights: of the whole layer.
        hidden_states: per call, `(batch, tokens of the call, hidden_size)`, whole and in order; of
            a packed row `(1, tokens, hidden_size)`.
        position_ids: per call, `(batch, tokens of the call)`, int64, -1 for padding; likewise.
        lora: adapters, and which of them each row uses; None without.
    """

    weights: AttentionWeights
    hidden_states: tuple[Array, ...]
    position_ids: tuple[NDArray[np.int64], ...]
    lora: Lora | None = None


def draw_workload(workload: ParallelWorkload) -> WorkloadInputs:
    """Draw the inputs of a parallel case: a row's tokens are those of one longer prompt."""
    drawn = draw_layer(workload.whole)
    lengths, slots = np.array(workload.lengths)[:, None], np.arange(workload.q_len)
    each = np.arange(len(workload.lengths))[:, None]
    whole = np.where(slots < lengths, slots, -1)
    places, rows = [], []
    for length, packing in zip_longest(workload.prompt_lengths, workload.packings):
        if packing is not None:
            at, of = packing.in_row(packing.rows, length)
            places.append(at)
            rows.append(np.maximum(of, 0))
        else:
            start = sum(before.shape[1] for before in places)
            places.append(whole[:, start : start + length])
            rows.append(each)
    places += [lengths + step for step in range(workload.steps)]
    rows += [each] * workload.steps
    hidden = tuple(
        drawn.hidden_states[of, np.maximum(at, 0)] for of, at in zip(rows, places, strict=True)
    )
    return WorkloadInputs(
        weights=drawn.weights, hidden_states=hidden, position_ids=tuple(places), lora=drawn.lora
    )
