"""Rotary position embedding: cosines and sines of positions, for both pairings.

Angles are float32 whatever the model's dtype (float64 for float64 inputs). The half form rounds cos
and sin to the dtype of the input, the interleaved form keeps them in float32. `impl.rotation`
rotates by them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from impl.errors import ShapeError, explain
from impl.precision import compute_dtype
from impl.rope_frequencies import RotaryFrequencies


class _RotaryBase(nn.Module):
    """Angles of positions: shared by both pairings.

    The frequencies are float32 buffers that move with the module but keep their dtype: casting a
    model to bfloat16 must not round them, an error that grows with the position.

    Dynamic NTK and longrope depend on the length of each row, its largest position plus 1 in this
    call: the rows of a batch do not depend on each other, and keys that were cached keep the angles
    they were rotated by.
    """

    inv_freq: Tensor

    def __init__(self, frequencies: RotaryFrequencies) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.rotary_dim = frequencies.rotary_dim
        self.attention_scaling = frequencies.attention_scaling
        for name, values in self._constants().items():
            self.register_buffer(name, _constant(values, torch.float32, None), persistent=False)

    def _constants(self) -> dict[str, tuple[float, ...] | tuple[int, ...]]:
        """Buffers by name: frequencies, exponents of their growth, axes."""
        given = self.frequencies
        constants: dict[str, tuple[float, ...] | tuple[int, ...]] = {"inv_freq": given.inv_freq}
        if given.long_inv_freq is not None:
            constants["long_inv_freq"] = given.long_inv_freq
        if given.growth is not None:
            width = given.rotary_dim
            constants["exponents"] = tuple(-i / (width - 2) for i in range(0, width, 2))
        if given.axes:
            constants["axes"] = given.axes
        return constants

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> _RotaryBase:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.inv_freq.device
        for name, values in self._constants().items():  # Also after `to_empty`.
            setattr(self, name, _constant(values, torch.float32, device))
        return self

    def angles(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """Angles in radians.

        Args:
            x: gives device and dtype.
            position_ids: `(batch, seq_len)`, or `(axes, batch, seq_len)` for multimodal RoPE,
                integer; positions of one axis stand for all of them.

        Returns:
            `(batch, seq_len, rotary_dim / 2)`, float32, or float64 if `x` is.

        Raises:
            ShapeError: the positions have axes that the embedding has not.
        """
        axes = self.frequencies.axis_count
        dims = position_ids.dim()
        if dims != 2 and not (dims == 3 and axes > 1 and position_ids.shape[0] == axes):
            raise ShapeError(
                explain(
                    "position_ids",
                    "have shape (batch, seq_len)"
                    + (f" or ({axes}, batch, seq_len)" if axes > 1 else ""),
                    tuple(position_ids.shape),
                    "multimodal positions need mrope_section in rope_parameters",
                )
            )
        dtype = compute_dtype(x.dtype)
        frequencies = self._row_frequencies(position_ids, dtype)
        positions = position_ids.to(dtype).unsqueeze(-1)
        if dims == 3:
            positions = position_ids.index_select(0, self._buffer("axes")).movedim(0, -1).to(dtype)
        return positions * frequencies

    def _row_frequencies(self, position_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Frequencies `(pairs,)`, or `(batch, 1, pairs)` where the length of a row sets them."""
        given = self.frequencies
        inv_freq = self._constant_as("inv_freq", dtype)
        if not given.by_length:
            return inv_freq
        by_row = position_ids if position_ids.dim() == 2 else position_ids.amax(dim=0)
        lengths = (by_row.amax(dim=-1) + 1).to(dtype)[:, None, None]
        if given.growth is None:
            longer = lengths > given.original_length
            return torch.where(longer, self._constant_as("long_inv_freq", dtype), inv_freq)
        beyond = (lengths - given.original_length).clamp(min=0) / given.original_length
        return inv_freq * (1 + given.growth * beyond) ** self._constant_as("exponents", dtype)

    def _buffer(self, name: str) -> Tensor:
        buffer = getattr(self, name)
        assert isinstance(buffer, Tensor)
        return buffer

    def _constant_as(self, name: str, dtype: torch.dtype) -> Tensor:
        """A buffer, made anew where more than its float32 is wanted."""
        buffer = self._buffer(name)
        if dtype == torch.float32:
            return buffer
        return _constant(self._constants()[name], dtype, buffer.device)


def _constant(
    values: tuple[float, ...] | tuple[int, ...], dtype: torch.dtype, device: torch.device | None
) -> Tensor:
    """A tensor of floats in `dtype`, or of integers in int64."""
    whole = all(isinstance(value, int) for value in values)
    return torch.tensor(values, dtype=torch.int64 if whole else dtype, device=device)


class RotaryEmbedding(_RotaryBase):
    """Cosines and sines for the half pairing.

    Args:
        dim: width of a head.
        max_position_embeddings: longest position the model was made for; yarn, longrope and
            dynamic read it.
        base: rotary base where `rope_parameters` names none.
        rope_parameters: as in a Hugging Face configuration; see `RotaryFrequencies`.
    """

    def __init__(
        self,
        dim: int,
        max_position_embeddings: int | None = None,
        base: float = 10000.0,
        *,
        rope_parameters: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            RotaryFrequencies.from_parameters(
                dim,
                rope_parameters,
                rope_theta=base,
                max_position_embeddings=max_position_embeddings,
            )
        )

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what `apply_rotary_pos_emb` takes.

        Args:
            x: any tensor of the model; gives dtype and device.
            position_ids: as in `angles`.

        Returns:
            cos and sin, each `(batch, seq_len, rotary_dim)`, in the dtype of `x`.
        """
        half = self.angles(x, position_ids)
        both = torch.cat((half, half), dim=-1)
        cos, sin = both.cos() * self.attention_scaling, both.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


class PolarRotaryEmbedding(_RotaryBase):
    """Cosines and sines for the interleaved pairing, one of each per pair, never rounded.

    Args:
        frequencies: what to rotate by.
    """

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what `apply_rotary_polar_compatible` takes.

        Args:
            x: any tensor of the model; gives device and dtype.
            position_ids: as in `angles`.

        Returns:
            cos and sin, each `(batch, seq_len, rotary_dim / 2)`, float32, or float64 if `x` is.
        """
        angles = self.angles(x, position_ids)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
