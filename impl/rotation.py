"""Rotation of queries and keys by cosines and sines, in both pairings.

* half: channel `i` turns with channel `i + rotary_dim / 2` (`apply_rotary_pos_emb`);
* interleaved ("polar"): channel `2 i` turns with `2 i + 1` (`apply_rotary_polar_compatible`).

Both rotate in float32, or float64, and round the result to the model's dtype once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from impl.errors import ShapeError, explain
from impl.precision import compute_dtype
from impl.training import trains

PIECE = 1 << 18
"""Elements that are rotated at a time: with their float32 copies they fit a core's cache."""


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
    tokens = _token_axis(unsqueeze_dim)
    return _rotate_half(q, cos, sin, tokens), _rotate_half(k, cos, sin, tokens)


def _token_axis(heads: int) -> int:
    """Axis of the tokens in four, given that of the heads."""
    return 2 if heads in (1, -3) else 1


def _rotate_half(x: Tensor, cos: Tensor, sin: Tensor, tokens: int) -> Tensor:
    dtype, rotary_dim = compute_dtype(x.dtype), cos.shape[-1]
    tables = (half for t in (cos, sin) for half in t.to(dtype).chunk(2, dim=-1))
    turn = _Turn(*tables)

    def parts(y: Tensor) -> tuple[Tensor, ...]:
        return y[..., :rotary_dim].chunk(2, dim=-1)

    if _goes_by_pieces(x):
        return _in_pieces(x, turn, parts, rotary_dim, tokens)
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
    tokens = _token_axis(unsqueeze_dim)
    return _rotate_pairs(q, cos, sin, tokens), _rotate_pairs(k, cos, sin, tokens)


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, tokens: int) -> Tensor:
    rotary_dim, turn = 2 * cos.shape[-1], _Turn(cos, cos, sin, sin)

    def parts(y: Tensor) -> tuple[Tensor, ...]:
        return y[..., :rotary_dim].reshape(*y.shape[:-1], rotary_dim // 2, 2).unbind(dim=-1)

    if _goes_by_pieces(x):
        return _in_pieces(x, turn, parts, rotary_dim, tokens)
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
    eager = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return x.numel() > PIECE and eager and not trains(x)


def _in_pieces(
    x: Tensor,
    turn: _Turn,
    parts: Callable[[Tensor], tuple[Tensor, ...]],
    rotary_dim: int,
    tokens: int,
) -> Tensor:
    """Rotate some tokens at a time, to the bits of all at once: an element rests on one token.

    Args:
        x: four axes, the last one of channels.
        turn: the rotation, of tables broadcastable to the parts.
        parts: views of the first channels of pairs, and of the second.
        rotary_dim: channels from here on do not turn.
        tokens: axis of the tokens.
    """
    length = x.shape[tokens]
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
