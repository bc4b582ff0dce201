"""What a kernel in NumPy is given: one case's arrays, mask and softmax, ready to be changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import golden
from conformance.cases import Case
from conformance.inputs import CoreInputs
from golden import AttentionConfig, Positions
from golden.tiles import BoolArray

Values: TypeAlias = NDArray[Any]

_STORED: dict[str, Any] = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
}


def rounded(values: Values, dtype: str) -> Values:
    """Round to nearest in a dtype and return in the dtype it came in."""
    with np.errstate(over="ignore"):
        kept: Values = values.astype(_STORED[dtype]).astype(values.dtype)
    return kept


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Problem:
    """One case of the attention core.

    Floating arrays are float32, or float64 where `dtype` is float64: what the kernel computes in.

    Attributes:
        q: `(batch, num_attention_heads, q_len, head_dim)`, BHSD.
        k: keys as each query head reads them, `(batch, num_attention_heads, kv_len, head_dim)`.
        v: like `k`.
        visible: `(batch, 1, q_len, kv_len)`, bool, True = attend.
        q_positions: `(batch, q_len)`, int64, -1 for padding.
        kv_positions: `(batch, kv_len)`, int64, -1 for padding.
        softmax_scale: factor on the dot products.
        softcap: `c` in `c * tanh(score / c)`, None for none.
        sinks: broadcastable to `(batch, num_attention_heads, q_len, 1)`, None for none.
        config: the layer, for its heads and mask.
        dtype: what weights and output are stored in; float64 stands for no rounding at all.
        seed: for defects that strike at one place.
    """

    q: Values
    k: Values
    v: Values
    visible: BoolArray
    q_positions: Positions
    kv_positions: Positions
    softmax_scale: float
    softcap: float | None
    sinks: Values | None
    config: AttentionConfig
    dtype: str
    seed: int

    @property
    def kv_len(self) -> int:
        """Keys per batch row, padding included."""
        return int(self.k.shape[2])

    @property
    def last_query(self) -> tuple[int, int]:
        """Index of batch row 0's last query that is no padding."""
        return 0, int(np.flatnonzero(self.q_positions[0] >= 0)[-1])

    @property
    def seen_keys(self) -> NDArray[np.intp]:
        """Keys that the last query sees."""
        row, query = self.last_query
        return np.flatnonzero(self.visible[row, 0, query])

    def rng(self) -> np.random.Generator:
        """Return the generator that picks where a local defect strikes."""
        return np.random.default_rng([self.seed, self.kv_len, self.q.shape[-1]])


def problem_of(case: Case, inputs: CoreInputs, *, dtype: str = "") -> Problem:
    """Set up a case for a kernel in NumPy.

    Args:
        case: of scope `core`.
        inputs: its inputs.
        dtype: what to store in; the case's own if empty, float64 for the golden's own arithmetic.
    """
    dtype = dtype or case.dtype
    config = case.config
    working = np.float64 if dtype == "float64" else np.float32

    def cast(values: Values) -> Values:
        return values.astype(working)

    return Problem(
        q=cast(inputs.q),
        k=cast(inputs.k).repeat(config.group_size, axis=1),
        v=cast(inputs.v).repeat(config.group_size, axis=1),
        visible=golden.visible_keys(
            golden.layer_mask(config), inputs.q_positions, inputs.kv_positions
        ),
        q_positions=inputs.q_positions,
        kv_positions=inputs.kv_positions,
        softmax_scale=config.softmax_scale,
        softcap=config.softcap,
        sinks=None if inputs.sinks is None else cast(inputs.sinks)[None, :, None, None],
        config=config,
        dtype=dtype,
        seed=case.seed,
    )
