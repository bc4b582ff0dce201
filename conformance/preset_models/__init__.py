"""The published models, a module per family."""

from __future__ import annotations

from conformance.preset_models import dbrx, gemma, gpt_oss, llama, mistral, phi, qwen
from conformance.preset_models.record import Preset

MODELS: tuple[Preset, ...] = (
    *llama.PRESETS,
    *gpt_oss.PRESETS,
    *mistral.PRESETS,
    *qwen.PRESETS,
    *gemma.PRESETS,
    *dbrx.PRESETS,
    *phi.PRESETS,
)
