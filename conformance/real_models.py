"""Cases from a real model: its own weights, and the hidden states its layers truly read."""

from __future__ import annotations

import re

import numpy as np

import golden
from conformance import presets
from conformance.cases import Case, Workload
from conformance.errors import UsageError
from conformance.inputs import LayerInputs
from conformance.models import smollm2
from golden import FORMATS, Array, AttentionConfig, AttentionWeights

REAL_MODELS = ("smollm2",)
"""Models that ship with real weights."""

DECODE_STEPS = 16
"""Tokens generated after the prompt."""

DTYPES = ("float32", "bfloat16")
"""Dtypes in which a real model's layers are judged."""

_PRESET = "smollm2-135m"


def real_model_layer(model: str, layer: str) -> AttentionConfig:
    """Return the configuration of a layer such as `layer07`, without the weights at hand.

    Raises:
        UsageError: there is no such layer.
    """
    layers = presets.preset(_PRESET).num_hidden_layers
    if layer not in {f"layer{index:02}" for index in range(layers)}:
        raise UsageError(f"{model} has layers layer00 to layer{layers - 1:02}, got {layer!r}")
    return presets.layer(_PRESET, "global")


def real_model_cases(model: str) -> list[Case]:
    """Return every case of a real model: each layer, prefill and decode, in each dtype.

    Raises:
        UsageError: there is no such model, or its weights are not installed.
    """
    if model not in REAL_MODELS:
        raise UsageError(f"model must be one of {', '.join(REAL_MODELS)}, got {model!r}")
    try:
        smollm2.load()
    except smollm2.ModelUnavailable as error:
        raise UsageError(str(error)) from error
    prompt = (len(smollm2.PROMPT_IDS),)
    workloads = (
        Workload(phase="cte", lengths=prompt),
        Workload(phase="tkg", lengths=prompt, steps=DECODE_STEPS),
    )
    layers = presets.preset(_PRESET).num_hidden_layers
    return [
        Case(
            config=presets.layer(_PRESET, "global"),
            workload=workload,
            dtype=dtype,
            regime="prompt",
            model=model,
            layer=f"layer{index:02}",
        )
        for dtype in DTYPES
        for workload in workloads
        for index in range(layers)
    ]


def real_layer_inputs(case: Case) -> LayerInputs:
    """Return a layer's weights and what it reads in the conversation, exact in the case's dtype.

    Raises:
        UsageError: the lengths are not those of the conversation, or the weights are missing.
    """
    work, prompt = case.workload, len(smollm2.PROMPT_IDS)
    if work.lengths != (prompt,) or work.start or work.steps > DECODE_STEPS:
        raise UsageError(
            f"{case.model} has one conversation: lengths must be ({prompt},), start 0 and steps "
            f"at most {DECODE_STEPS}, got {work.lengths}, {work.start} and {work.steps}"
        )
    form = FORMATS[case.dtype]
    index = int(re.sub(r"\D", "", case.layer))
    try:
        model = smollm2.load()
    except smollm2.ModelUnavailable as error:
        raise UsageError(str(error)) from error
    hidden = form.nearest(model.trace(DECODE_STEPS).attention_inputs[index])
    weights = _rounded(case.config, model.attention_weights(index), case.dtype)
    if work.phase == "cte":
        positions = np.arange(prompt, dtype=np.int64)[None]
        return LayerInputs(
            weights=weights, hidden_states=hidden[:, :prompt], position_ids=positions
        )
    k, v = _prompt_cache(case, weights, hidden[:, :prompt])
    end = prompt + work.steps
    return LayerInputs(
        weights=weights,
        hidden_states=hidden[:, prompt:end],
        position_ids=np.arange(prompt, end, dtype=np.int64)[None],
        k_cache=form.nearest(k),
        v_cache=form.nearest(v),
        cache_lengths=np.array([prompt]),
    )


def _rounded(config: AttentionConfig, weights: AttentionWeights, dtype: str) -> AttentionWeights:
    form = FORMATS[dtype]
    names = golden.weight_shapes(config)
    return golden.make_weights(config, **{n: form.nearest(getattr(weights, n)) for n in names})


def _prompt_cache(case: Case, weights: AttentionWeights, prompt: Array) -> tuple[Array, Array]:
    """Return the exact cache after the prompt, with room for the decoded tokens."""
    length = prompt.shape[1]
    room = golden.empty_cache(case.config, batch=1, max_length=length + case.workload.steps)
    filled = golden.context_encoding(
        case.config, weights, prompt, position_ids=np.arange(length), cache=room
    ).cache
    return filled.k, filled.v
