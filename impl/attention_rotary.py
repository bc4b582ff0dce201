"""A layer's rotation of queries and keys, or its temperature where it has none."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from impl.config import InferenceConfig
from impl.errors import ConfigError, ShapeError, explain
from impl.layer_options import LayerOptions
from impl.rope import PolarRotaryEmbedding
from impl.rope_frequencies import RotaryFrequencies
from impl.rotation import apply_rotary_polar_compatible, apply_rotary_pos_emb
from impl.temperature import scale_queries

Rotary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# What of `rope_parameters` says which channels turn by which positions, whatever the scaling.
_UNSCALED_ROPE = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")


class AttentionRotary(nn.Module):
    """Rotary embedding of a layer in both pairings, and attention temperature.

    Args:
        config: the model's configuration.
        options: the layer's numeric options.
        rotary_emb: `(x, position_ids) -> cos, sin` for the half pairing, or None.
        rope_theta: base of the interleaved pairing, or None.
        use_scaled_rope: scale that pairing as `config.rope_parameters` says; which channels turn
            (`partial_rotary_factor`, `mrope_section`) it says with or without.

    Raises:
        ConfigError: a value or a combination that is not defined.
    """

    def __init__(
        self,
        config: InferenceConfig,
        options: LayerOptions,
        *,
        rotary_emb: Rotary | None,
        rope_theta: float | None,
        use_scaled_rope: bool,
    ) -> None:
        super().__init__()
        if options.attn_temperature_tuning and rotary_emb is not None:
            raise ConfigError(
                explain(
                    "attn_temperature_tuning",
                    "be False when the layer has a rotary_emb",
                    True,
                    "the temperature belongs to layers without RoPE",
                )
            )
        self.config = config
        self.neuron_config = config.neuron_config
        self.options = options
        self.torch_dtype = config.neuron_config.layer_dtype
        self.head_dim = options.width
        self.rotary_emb = rotary_emb
        self.rope_theta = rope_theta
        self.polar_rotary_emb = self._make_polar(rope_theta, use_scaled_rope)

    def _make_polar(
        self, rope_theta: float | None, use_scaled_rope: bool
    ) -> PolarRotaryEmbedding | None:
        given = dict(self.config.rope_parameters or {})
        if use_scaled_rope and (rope_theta is None or not given):
            raise ConfigError(
                explain(
                    "use_scaled_rope",
                    "come with rope_theta and rope_parameters in the configuration",
                    f"{rope_theta} and {self.config.rope_parameters}",
                )
            )
        if rope_theta is None:
            return None
        if not use_scaled_rope:
            kept: tuple[str, ...] = _UNSCALED_ROPE
            if given.get("rope_type") == "proportional":  # There the share is of another kind.
                kept = (*kept, "rope_type")
            given = {name: given[name] for name in kept if name in given}
        return PolarRotaryEmbedding(
            RotaryFrequencies.from_parameters(
                self.head_dim,
                {**given, "rope_theta": rope_theta},
                max_position_embeddings=self.config.max_position_embeddings,
            )
        )

    def apply_rotary_embedding(
        self,
        q: Tensor,
        k: Tensor,
        position_ids: Tensor,
        cos_cache: Tensor | None,
        sin_cache: Tensor | None,
        use_polar_compatible_rope: bool = False,
        rotary_position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Rotate q and k, or apply the temperature of a layer without RoPE.

        Args:
            q: `(batch, num_attention_heads, seq_len, head_dim)`, BHSD.
            k: `(batch, num_key_value_heads, seq_len, head_dim)`, BHSD.
            position_ids: `(batch, seq_len)`.
            cos_cache: as in `forward`, like the rest.
            sin_cache: see `forward`.
            use_polar_compatible_rope: see `forward`.
            rotary_position_ids: see `forward`.

        Returns:
            q, k, and the cos and sin caches: new, or as given; a layer without RoPE passes them on.
        """
        cos_cache, sin_cache = self.rotary_tables(
            k, position_ids, cos_cache, sin_cache, use_polar_compatible_rope, rotary_position_ids
        )
        options = self.options
        if self._rotary(use_polar_compatible_rope) is None:
            if options.attn_temperature_tuning:
                q = scale_queries(q, position_ids, options.floor_scale, options.attn_scale)
            return q, k, cos_cache, sin_cache
        assert cos_cache is not None
        assert sin_cache is not None
        rotate = (
            apply_rotary_polar_compatible if use_polar_compatible_rope else apply_rotary_pos_emb
        )
        q, k = rotate(q, k, cos_cache, sin_cache)
        return q, k, cos_cache, sin_cache

    def rotary_tables(
        self,
        x: Tensor,
        position_ids: Tensor,
        cos_cache: Tensor | None,
        sin_cache: Tensor | None,
        use_polar_compatible_rope: bool,
        rotary_position_ids: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Cosines and sines of a step: as given, or new; a layer without RoPE passes them on.

        Args:
            x: any tensor of the step; gives dtype and device.
            position_ids: `(batch, seq_len)`.
            cos_cache: as in `forward`, like the rest.
            sin_cache: see `forward`.
            use_polar_compatible_rope: see `forward`.
            rotary_position_ids: see `forward`.
        """
        if (cos_cache is None) != (sin_cache is None):
            raise ShapeError(explain("cos_cache and sin_cache", "be given together", "one of them"))
        rotary = self._rotary(use_polar_compatible_rope)
        if rotary is None:
            return cos_cache, sin_cache
        if cos_cache is None or sin_cache is None:
            positions = position_ids if rotary_position_ids is None else rotary_position_ids
            cos_cache, sin_cache = rotary(x, positions)
        batch, seq_len = position_ids.shape
        self._check_rotary_caches(cos_cache, sin_cache, batch, seq_len, use_polar_compatible_rope)
        return cos_cache, sin_cache

    def _rotary(self, polar: bool) -> Rotary | None:
        """What makes the tables of a pairing, None in a layer without RoPE."""
        if not polar:
            return self.rotary_emb
        if self.polar_rotary_emb is None or self.options.attn_temperature_tuning:
            raise ConfigError(
                explain(
                    "use_polar_compatible_rope",
                    "be False in a layer without rope_theta or with attn_temperature_tuning",
                    True,
                )
            )
        return self.polar_rotary_emb

    def _check_rotary_caches(
        self, cos: Tensor, sin: Tensor, batch: int, seq_len: int, polar: bool
    ) -> None:
        owner = self.polar_rotary_emb if polar else self.rotary_emb
        width = getattr(owner, "rotary_dim", cos.shape[-1])
        width = width // 2 if polar else width
        expected = (batch, seq_len, min(width, self.head_dim))
        for name, tensor in (("cos_cache", cos), ("sin_cache", sin)):
            if tuple(tensor.shape) != expected:
                raise ShapeError(
                    explain(
                        name,
                        f"have shape {expected}",
                        tuple(tensor.shape),
                        "is it from a layer of another RoPE?",
                    )
                )
