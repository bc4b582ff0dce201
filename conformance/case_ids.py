"""The id of a case: written for people, complete enough to rebuild the case from it alone.

An id is `<layer>/<workload>`. The layer is a published one, `gpt-oss-20b.sliding` or
`smollm2.layer07`, or spelt out, `h256-hq8-hkv2-d32-rope10000-window16`; scope `core` starts with
`core-`. The workload is `<phase>-<dtype>[-h<hidden>]-b<batch>-<lengths>-<regime>-seed<n>`, with
the cache and the calls of a schedule (`conformance.schedules`) after the lengths, or `backward`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import cast

from conformance import presets
from conformance.cases import Case, Phase, Scope, Workload
from conformance.errors import UsageError
from conformance.extras import NO_EXTRAS, Extras
from conformance.layer_ids import EXPLICIT, parse_layer, render_layer
from conformance.real_models import REAL_MODELS, real_model_layer
from conformance.schedule_ids import parse_cache, parse_parts, render_cache, render_parts
from conformance.schedules import Schedule
from golden import AttentionConfig

_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_LONG = {short: name for name, short in _SHORT.items()}


def render(case: Case) -> str:
    """Return the id of a case."""
    work = case.workload
    tokens = [work.phase, _SHORT[case.dtype]]
    if case.model:
        layer = f"{case.model}.{case.layer}"
        if case.config.hidden_size != published_layer(case.model, case.layer).hidden_size:
            tokens.append(f"h{case.config.hidden_size}")
    else:
        layer = render_layer(case.config, case.extras)
    if case.scope == "core":
        layer = f"core-{layer}"
    lengths = work.lengths[:1] if len(set(work.lengths)) == 1 else work.lengths
    tokens += [
        f"b{work.batch}",
        ("q" if work.phase == "cte" else "kv") + "_".join(map(str, lengths)),
    ]
    if work.start:
        tokens.append(f"start{work.start}")
    if work.prior:
        tokens.append(f"prior{work.prior}")
    if work.steps > 1:
        tokens.append(f"steps{work.steps}")
    if work.backward:
        tokens.append("backward")
    if work.schedule is not None:
        tokens += [render_cache(work.schedule.cache), render_parts(work.schedule.parts, work.batch)]
    return f"{layer}/{'-'.join([*tokens, case.regime, f'seed{case.seed}'])}"


def parse(text: str) -> Case:
    """Rebuild a case from its id.

    Raises:
        UsageError: `text` is no id; the message says which part.
    """
    layer, slash, work = text.partition("/")
    if not slash:
        raise UsageError(f"case must be '<layer>/<workload>', got {text!r}; see `list` for ids")
    scope: Scope = "core" if layer.startswith("core-") else "layer"
    layer = layer.removeprefix("core-")
    try:
        found = _WORKLOAD.fullmatch(work)
        if found is None:
            raise UsageError(f"{work!r} must read like 'cte-bf16-b2-q96_57-gaussian-seed0'")
        model, kind, config, extras = _layer(layer)
        if found["hidden"]:
            config = replace(config, hidden_size=int(found["hidden"]))
        case = Case(
            config=config,
            workload=_workload(found),
            dtype=_LONG[found["dtype"]],
            regime=found["regime"],
            seed=int(found["seed"]),
            scope=scope,
            model=model,
            layer=kind,
            extras=extras,
        )
    except (ValueError, OverflowError) as error:
        raise UsageError(f"case {text!r} cannot be rebuilt: {error}") from error
    if case.id != text:
        raise UsageError(f"case must be a canonical id, got {text!r}; write it {case.id!r}")
    return case


_WORKLOAD = re.compile(
    r"(?P<phase>cte|tkg|serve)-(?P<dtype>fp32|bf16|fp16)(-h(?P<hidden>\d+))?-b(?P<batch>\d+)"
    r"-(q|kv)(?P<lengths>\d+(_\d+)*)(-start(?P<start>\d+))?(-prior(?P<prior>\d+))?"
    r"(-steps(?P<steps>\d+))?(?P<backward>-backward)?(-(?P<cache>[a-z]+[0-9a-z_]*)-(?P<parts>[0-9a-z_.]+))?"
    r"-(?P<regime>[a-z]+)-seed(?P<seed>\d+)"
)


def _workload(found: re.Match[str]) -> Workload:
    lengths = tuple(int(length) for length in found["lengths"].split("_"))
    batch = int(found["batch"])
    if len(lengths) == 1:
        lengths *= batch
    if len(lengths) != batch:
        raise UsageError(f"b{batch} must come with one length or {batch}, got {len(lengths)}")
    schedule = None
    if found["cache"]:
        parts = parse_parts(found["parts"], batch)
        schedule = Schedule(cache=parse_cache(found["cache"]), parts=parts)
    return Workload(
        phase=cast(Phase, found["phase"]),
        lengths=lengths,
        start=int(found["start"] or 0),
        prior=int(found["prior"] or 0),
        steps=int(found["steps"] or 1),
        schedule=schedule,
        backward=found["backward"] is not None,
    )


def published_layer(model: str, kind: str) -> AttentionConfig:
    """Return the configuration of one kind of layer of a preset, or of a real model's layer.

    Raises:
        UsageError: there is no such model or layer.
        PresetError: likewise, for presets.
    """
    if model in REAL_MODELS:
        return real_model_layer(model, kind)
    return presets.layer(model, kind)


def _layer(text: str) -> tuple[str, str, AttentionConfig, Extras]:
    if EXPLICIT.match(text):
        return "", "", *parse_layer(text)
    model, dot, kind = text.rpartition(".")
    if not dot:
        raise UsageError(f"{text!r} must be '<model>.<layer kind>' or start with 'h<hidden>-hq...'")
    return model, kind, published_layer(model, kind), NO_EXTRAS
