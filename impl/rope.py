"""Rotary position embedding, in both pairings.

* half: channel `i` turns with channel `i + rotary_dim / 2` (`apply_rotary_pos_emb`);
* interleaved ("polar"): channel `2 i` turns with `2 i + 1` (`apply_rotary_polar_compatible`).

Precision. Angles are float32 whatever the model's dtype (float64 for float64 inputs). The half
form rounds cos and sin to the dtype of `x`, the interleaved form keeps them in float32. Both
rotate in float32 and round the result to the model's dtype once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from impl.errors import ShapeError, explain
from impl.precision import compute_dtype
from impl.rope_frequencies import RotaryFrequencies

PIECE = 1 << 18
"""Elements that are rotated at a time: with their float32 copies they fit a core's cache."""


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


def apply_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Rotate q and k in the half pairing.

    Args:
        q: `(batch, num_attention_heads, seq_len, head_dim)`, BHSD.
        k: `(batch, num_key_value_heads, seq_len, head_dim)`, BHSD.
        cos: `(batch, seq_len, rotary_dim)`; channels from `rotary_dim` on do not turn.
        sin: like `cos`.
        unsqueeze_dim: axis of the heads, 1 for BHSD.

    Returns:
        The rotated q and k, in the dtypes they came in.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _rotate_half(q, cos, sin), _rotate_half(k, cos, sin)


def _rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dtype, rotary_dim = compute_dtype(x.dtype), cos.shape[-1]
    tables = (half for t in (cos, sin) for half in t.to(dtype).chunk(2, dim=-1))
    turn = _Turn(*tables)

    def parts(y: Tensor) -> tuple[Tensor, ...]:
        return y[..., :rotary_dim].chunk(2, dim=-1)

    if _goes_by_pieces(x):
        return _in_pieces(x, turn, parts, rotary_dim)
    turned = torch.cat(turn(*parts(x[..., :rotary_dim].to(dtype))), dim=-1)
    return _with_rest(turned.to(x.dtype), x, rotary_dim)


def apply_rotary_polar_compatible(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Rotate q and k in the interleaved pairing.

    Args:
        q: `(batch, num_attention_heads, seq_len, head_dim)`, BHSD.
        k: `(batch, num_key_value_heads, seq_len, head_dim)`, BHSD.
        cos: `(batch, seq_len, rotary_dim / 2)`, float32 or float64.
        sin: like `cos`.
        unsqueeze_dim: axis of the heads, 1 for BHSD.

    Returns:
        The rotated q and k, in the dtypes they came in.

    Raises:
        ShapeError: cos or sin is of lower precision than float32.
    """
    for name, value in (("cos", cos), ("sin", sin)):
        if value.dtype not in (torch.float32, torch.float64):
            raise ShapeError(explain(name, "be float32 for the interleaved form", value.dtype))
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _rotate_pairs(q, cos, sin), _rotate_pairs(k, cos, sin)


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary_dim, turn = 2 * cos.shape[-1], _Turn(cos, cos, sin, sin)

    def parts(y: Tensor) -> tuple[Tensor, ...]:
        return y[..., :rotary_dim].reshape(*y.shape[:-1], rotary_dim // 2, 2).unbind(dim=-1)

    if _goes_by_pieces(x):
        return _in_pieces(x, turn, parts, rotary_dim)
    turned = torch.stack(turn(*parts(x[..., :rotary_dim].to(cos.dtype))), dim=-1).flatten(-2)
    return _with_rest(turned.to(x.dtype), x, rotary_dim)


class _Turn(NamedTuple):
    """Rotates channels that turn together; one cosine and sine a pair, or each channel its own."""

    first_cos: Tensor
    second_cos: Tensor
    first_sin: Tensor
    second_sin: Tensor

    def __call__(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return (
            first * self.first_cos - second * self.first_sin,
            second * self.second_cos + first * self.second_sin,
        )

    def of_tokens(self, axis: int, start: int, size: int) -> _Turn:
        return _Turn(*(table.narrow(axis, start, size) for table in self))


def _goes_by_pieces(x: Tensor) -> bool:
    """Whether to rotate `PIECE` elements at a time: eagerly on cpu, without gradient.

    Each operator goes through all of its operands, so a long sequence would travel through memory
    six times, while pieces stay in the cache; compilers fuse the operators instead.
    """
    trained = torch.is_grad_enabled() and x.requires_grad
    eager = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return x.numel() > PIECE and eager and not trained


def _in_pieces(
    x: Tensor, turn: _Turn, parts: Callable[[Tensor], tuple[Tensor, ...]], rotary_dim: int
) -> Tensor:
    """Rotate some tokens at a time, to the bits of all at once: an element rests on one token.

    Args:
        x: four axes, the last one of channels.
        turn: the rotation, of tables broadcastable to the parts.
        parts: views of the first channels of pairs, and of the second.
        rotary_dim: channels from here on do not turn.
    """
    tokens = 2 if turn.first_cos.shape[2] > 1 else 1
    length = turn.first_cos.shape[tokens]
    step = max(1, PIECE * length // x.numel())
    out = torch.empty_like(x)
    out[..., rotary_dim:] = x[..., rotary_dim:]
    for start in range(0, length, step):
        at = (tokens, start, min(step, length - start))
        piece = parts(x.narrow(*at).to(turn.first_cos.dtype))
        for to, turned in zip(parts(out.narrow(*at)), turn.of_tokens(*at)(*piece), strict=True):
            to.copy_(turned)
    return out


def _with_rest(turned: Tensor, x: Tensor, rotary_dim: int) -> Tensor:
    """Append the channels of `x` that do not turn."""
    if rotary_dim == x.shape[-1]:
        return turned
    return torch.cat((turned, x[..., rotary_dim:]), dim=-1)
