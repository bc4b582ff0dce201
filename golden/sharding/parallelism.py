"""How a layer is spread over ranks, and the combinations that no module can run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from golden.checks import require, require_count
from golden.formats import format_named
from golden.sharding.head_layout import GQAStrategy
from golden.sharding.mesh import EIGHT_BY_EIGHT, EightByEight, Mesh, stage_mesh

EPDispatch = Literal["AR_AG", "RS_AG", "AG_AR"]
"""How a data-parallel decode joins its outputs."""

Interleave = Literal["none", "after_global", "between", "before_global"]
"""Where a chunked layer stands among global ones, if gathers between neighbours are left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallelism:
    """Degrees and collectives of prefill (context encoding) and decode (token generation).

    Prefill runs on `cp_degree` rows of `tp_degree / cp_degree` ranks, decode on
    `attention_dp_degree` rows of `tp_degree / attention_dp_degree`.

    Attributes:
        tp_degree: ranks in all; the module's name for the world size.
        cp_degree: parts of the sequence in prefill.
        attention_dp_degree: parts of the batch in decode.
        eight_by_eight: wiring that eight rows of eight follow.
        strategy: how key/value heads meet the ranks; None is replication where it comes out even.
        sequence_parallel: whether hidden states between layers of a prefill are cut over all ranks.
        strided: whether a context-parallel rank has every `cp_degree`-th token instead of a run.
        kv_exchange: whether context-parallel ranks gather all keys, or pass them round a ring and
            join the partial results through their logsumexp.
        interleave: place of a chunked, context-parallel layer among global ones.
        reduce_dtype: format in which the output projection's partial sums are added; None is
            float64.
        ep_dispatch: how decode joins outputs: `AR_AG` sums over a row, then gathers the batch;
            `RS_AG` leaves each rank of a row some batch rows of the sum, then gathers all;
            `AG_AR` gathers first.
        cores_per_group: ranks among which flash decoding spreads a key/value head's tokens; 1 is
            without.

    Raises:
        ConfigError: a combination that the documented module refuses whatever the layer.

    Source: neuronx-distributed-inference, `NeuronConfig` and `NeuronAttentionBase`.
    """

    tp_degree: int = 1
    cp_degree: int = 1
    attention_dp_degree: int = 1
    eight_by_eight: EightByEight = "trn2"
    strategy: GQAStrategy | None = None
    sequence_parallel: bool = False
    strided: bool = False
    kv_exchange: Literal["all_gather", "ring"] = "all_gather"
    interleave: Interleave = "none"
    reduce_dtype: str | None = None
    ep_dispatch: EPDispatch = "AR_AG"
    cores_per_group: int = 1

    def __post_init__(self) -> None:
        tp, cp, dp = self.tp_degree, self.cp_degree, self.attention_dp_degree
        for name in ("tp_degree", "cp_degree", "attention_dp_degree", "cores_per_group"):
            require_count(name, getattr(self, name))
        for name in ("cp_degree", "attention_dp_degree"):
            require(
                tp % getattr(self, name) == 0,
                f"tp_degree must be a multiple of {name}, got {tp} and {getattr(self, name)}",
            )
        require(
            cp == 1 or dp == 1 or (cp >= dp and cp % dp == 0),
            f"cp_degree must be a multiple of attention_dp_degree when both exceed 1, got {cp} "
            f"and {dp}",
        )
        require(
            cp > 1 or not self.strided,
            "strided requires cp_degree above 1, got 1; there is nothing to stride over",
        )
        require(
            self.cores_per_group == 1 or cp == dp == 1,
            f"cores_per_group above 1 (flash decoding) requires cp_degree and attention_dp_degree "
            f"of 1, got {cp} and {dp}",
        )
        choices = {
            "eight_by_eight": tuple(EIGHT_BY_EIGHT),
            "kv_exchange": ("all_gather", "ring"),
            "interleave": ("none", "after_global", "between", "before_global"),
            "ep_dispatch": ("AR_AG", "RS_AG", "AG_AR"),
        }
        for name, known in choices.items():
            given = getattr(self, name)
            require(given in known, f"{name} must be one of {', '.join(known)}, got {given!r}")
        if self.reduce_dtype is not None:
            format_named(self.reduce_dtype)

    @property
    def prefill_mesh(self) -> Mesh:
        """Rows of a context-parallel rank each."""
        return stage_mesh(self.tp_degree, self.cp_degree, eight_by_eight=self.eight_by_eight)

    @property
    def decode_mesh(self) -> Mesh:
        """Rows of a data-parallel rank each."""
        return stage_mesh(
            self.tp_degree, self.attention_dp_degree, eight_by_eight=self.eight_by_eight
        )
