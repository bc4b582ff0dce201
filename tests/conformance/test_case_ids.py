"""An id rebuilds its case, and whatever is no id is refused in one sentence."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance import presets
from conformance.case_ids import parse, render
from conformance.cases import DTYPES, REGIMES, Case, Workload
from conformance.errors import UsageError
from conformance.extras import NO_EXTRAS, Extras
from conformance.matrix import cases_for
from conformance.schedules import CODES, IDLE, LAYOUTS, CacheKind, Part, Schedule
from conformance.selection import SUITES
from conformance.tiers import TIERS
from golden import (
    AttentionConfig,
    DynamicNTKScaling,
    Eagle3AttentionConfig,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    QKNorm,
    RopeConfig,
    TemperatureTuning,
    YarnScaling,
)

PLAIN = "h256-hq8-hkv2-d32/cte-bf16-b2-q97-gaussian-seed0"

positive = st.floats(min_value=1e-12, max_value=1e12)
context = st.integers(1, 10**6)
regimes = st.sampled_from(REGIMES)

scalings = st.one_of(
    st.none(),
    st.builds(LinearScaling, factor=positive),
    st.builds(
        lambda factor, low, more, length: Llama3Scaling(
            factor=factor,
            low_freq_factor=low,
            high_freq_factor=low + more,
            original_max_position_embeddings=length,
        ),
        positive,
        positive,
        st.floats(0, 100),
        context,
    ),
    st.builds(
        lambda factor, length, slow, more, truncate, attention: YarnScaling(
            factor=factor,
            original_max_position_embeddings=length,
            beta_slow=slow,
            beta_fast=2 * slow + more,
            truncate=truncate,
            attention_factor=attention,
        ),
        st.floats(1, 1e6),
        context,
        positive,
        st.floats(0, 100),
        st.booleans(),
        st.floats(0, 10),
    ),
    st.builds(
        DynamicNTKScaling,
        factor=positive,
        original_max_position_embeddings=context.map(lambda length: length + 1),
        seq_len=st.integers(0, 10**6),
    ),
    st.builds(
        lambda divisors, factor, length, attention, reach: LongRopeScaling(
            short_factor=tuple(divisors),
            long_factor=tuple(reversed(divisors)),
            factor=factor,
            original_max_position_embeddings=length + 1,
            attention_factor=attention,
            seq_len=reach,
        ),
        st.lists(positive, min_size=1, max_size=4),
        positive,
        context,
        st.floats(0, 10),
        st.integers(0, 10**6),
    ),
    st.builds(
        ProportionalScaling,
        proportion=st.floats(0, 1, exclude_min=True),
        factor=positive,
    ),
)


@st.composite
def norms(draw: st.DrawFn) -> QKNorm:
    scope = draw(st.sampled_from(("head", "projection")))
    weighted = draw(st.booleans())
    placements = ("pre_rope", "post_rope") if scope == "head" else ("pre_rope",)
    return QKNorm(
        kind=draw(st.sampled_from(("rms", "layer"))),
        placement=draw(st.sampled_from(placements)),
        scope=scope,
        weighted=weighted,
        eps=draw(st.floats(0, 1)),
        weight_offset=draw(st.floats(-8, 8)) if weighted else 0.0,
    )


@st.composite
def configs(draw: st.DrawFn) -> AttentionConfig:
    kv_heads = draw(st.integers(1, 64))
    head_dim = 2 * draw(st.integers(1, 256))
    limit = draw(st.sampled_from(("none", "window", "chunk")))
    length = draw(context)
    rope = st.builds(
        RopeConfig,
        theta=st.floats(1, 1e9, exclude_min=True),
        pairing=st.sampled_from(("half", "interleaved")),
        rotary_dim=st.integers(0, head_dim // 2).map(lambda half: 2 * half),
        scaling=scalings,
    ) | st.builds(
        RopeConfig,
        mrope_section=st.integers(0, head_dim // 2).map(lambda n: (head_dim // 2 - n, n)),
        mrope_interleaved=st.booleans(),
    )
    tuning = st.builds(TemperatureTuning, floor_scale=positive, attn_scale=st.floats(-10, 10))
    kind = draw(st.sampled_from((AttentionConfig, Eagle3AttentionConfig)))
    return kind(
        hidden_size=draw(st.integers(1, 10**5)),
        num_attention_heads=kv_heads * draw(st.integers(1, 16)),
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        qkv_bias=draw(st.booleans()),
        o_bias=draw(st.booleans()),
        fused_qkv=draw(st.booleans()),
        clip_qkv=draw(st.none() | positive),
        qk_norm=draw(st.none() | norms()),
        rope=draw(st.none() | rope),
        softmax_scale=draw(st.just(0.0) | positive),
        softcap=draw(st.none() | positive),
        sliding_window=length if limit == "window" else None,
        attention_chunk_size=length if limit == "chunk" else None,
        learned_sinks_size=draw(st.sampled_from((None, 1))),
        temperature_tuning=draw(st.none() | tuning),
    )


@st.composite
def workloads(draw: st.DrawFn, scope: str) -> Workload:
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, 10**5), min_size=1, max_size=5))
        return Workload(phase="tkg", lengths=tuple(lengths), steps=draw(st.integers(1, 50)))
    lengths = draw(st.lists(st.integers(1, 10**5), min_size=1, max_size=5))
    prior = draw(st.integers(0, 1000)) if scope == "core" else 0
    start = 0 if prior else draw(st.integers(0, 10**6))
    return Workload(phase="cte", lengths=tuple(lengths), start=start, prior=prior)


extras = st.builds(
    Extras, adapters=st.just(0), input_norm=st.just(True), residual=st.booleans()
) | st.builds(Extras, adapters=st.integers(1, 9), rank=st.integers(1, 64))


@st.composite
def caches(draw: st.DrawFn, config: AttentionConfig) -> CacheKind:
    layouts = [name for name in LAYOUTS if name not in ("rolling", "chunk")]
    layouts += ["rolling"] * (config.sliding_window is not None)
    layouts += ["chunk"] * (config.attention_chunk_size is not None)
    layout = draw(st.sampled_from(layouts))
    code = draw(st.sampled_from(("", *CODES.values())))
    scales = draw(st.sampled_from(("none", "tensor", "head", "channel"))) if code else "none"
    return CacheKind(
        layout=layout,  # type: ignore[arg-type]
        size=draw(st.integers(1, 512)) if layout in ("paged", "sharded") else 0,
        code=code,
        scales="head" if code == "int8" and scales == "none" else scales,  # type: ignore[arg-type]
    )


@st.composite
def parts(draw: st.DrawFn, cache_rows: int) -> Part:
    kind = draw(st.sampled_from(("prompt", "left", "pieces", "decode", "draft", "tree")))
    order = draw(st.permutations(range(cache_rows)))
    rows = tuple(order[: draw(st.integers(1, cache_rows))])
    rows = draw(st.sampled_from((rows, tuple(range(cache_rows)), (*rows, IDLE))))
    parents: tuple[int, ...] = ()
    if kind == "draft":
        parents = tuple(range(-1, draw(st.integers(1, 9)) - 1))
    elif kind == "tree":
        nodes = draw(st.integers(3, 9))
        drawn = [draw(st.integers(0, node - 1)) for node in range(2, nodes)]
        parents = (-1, 0, *drawn[:-1], 0)  # the last is no child of the one before
    same = draw(st.integers(1, 50)) if not parents else len(parents)
    tokens = (same,) * len(rows)
    if kind in ("prompt", "left", "pieces"):
        tokens = tuple(draw(st.integers(1, 99)) for _ in rows)
    return Part(
        kind=kind,  # type: ignore[arg-type]
        tokens=tokens,
        rows=rows,
        piece=draw(st.integers(1, 64)) if kind == "pieces" else 0,
        parents=parents,
        accepted=tuple(draw(st.integers(0, same - 1)) for _ in rows) if parents else (),
        fresh=kind in ("prompt", "left", "pieces") and draw(st.booleans()),
    )


@st.composite
def served_workloads(draw: st.DrawFn, config: AttentionConfig) -> Workload:
    cached = tuple(draw(st.lists(st.integers(0, 100), min_size=1, max_size=4)))
    drawn = draw(st.lists(parts(len(cached)), min_size=1, max_size=4))
    schedule = Schedule(cache=draw(caches(config)), parts=tuple(drawn))
    return Workload(phase="serve", lengths=cached, schedule=schedule)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    scope = draw(st.sampled_from(("layer", "core")))
    served = scope == "layer" and draw(st.integers(0, 3)) == 0
    if served:
        config = draw(configs())
        return Case(
            config=config,
            workload=draw(served_workloads(config)),
            dtype=draw(st.sampled_from(DTYPES)),
            regime=draw(regimes),
            extras=draw(st.just(NO_EXTRAS) | extras),
        )
    common = {
        "workload": draw(workloads(scope)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "regime": draw(regimes),
        "seed": draw(st.integers(0, 2**63)),
        "scope": scope,
    }
    if draw(st.booleans()):
        return Case(config=draw(configs()), **common)
    name = draw(st.sampled_from(sorted(presets.PRESETS)))
    kind = draw(st.sampled_from(sorted(presets.PRESETS[name].layers)))
    config = presets.layer(name, kind)
    hidden = draw(st.just(config.hidden_size) | st.integers(1, 10**5))
    return Case(config=replace(config, hidden_size=hidden), model=name, layer=kind, **common)


@given(cases())
@settings(max_examples=300, deadline=None)
def test_any_case_is_rebuilt_from_its_id_alone(case: Case) -> None:
    assert parse(render(case)) == case


@given(cases(), cases())
@settings(deadline=None)
def test_different_cases_have_different_ids(one: Case, other: Case) -> None:
    assert (one == other) == (one.id == other.id)


@pytest.mark.parametrize("tier", TIERS)
def test_every_case_of_a_tier_is_rebuilt_from_its_own_id(tier: str) -> None:
    found = list(chain.from_iterable(cases_for(tier, suite) for suite in SUITES))
    ids = [case.id for case in found]
    assert len(set(ids)) == len(ids)
    assert [parse(text) for text in ids] == found


def test_layers_of_the_real_model_are_rebuilt_without_its_weights() -> None:
    text = "smollm2.layer07/cte-bf16-b1-q42-prompt-seed0"
    case = parse(text)
    assert (case.model, case.layer, case.regime, case.suite) == (
        "smollm2",
        "layer07",
        "prompt",
        "model",
    )
    assert case.id == text


def test_ids_read_as_documented() -> None:
    case = Case(
        config=AttentionConfig(
            hidden_size=256,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=32,
            learned_sinks_size=1,
            sliding_window=16,
            rope=RopeConfig(),
        ),
        workload=Workload(phase="cte", lengths=(96, 57)),
        dtype="bfloat16",
    )
    assert case.id == (
        "h256-hq8-hkv2-d32-sinks-window16-rope10000/cte-bf16-b2-q96_57-gaussian-seed0"
    )


SERVED = "h256-hq8-hkv2-d32/serve-bf16-b2-kv0-contiguous-decode3-gaussian-seed0"

MALFORMED = {
    "no slash": ("gpt-oss-20b.sliding", "must be '<layer>/<workload>'"),
    "nothing": ("", "must be '<layer>/<workload>'"),
    "unknown model": (
        "gpt-oss-21b.sliding/cte-bf16-b1-q9-gaussian-seed0",
        "did you mean 'gpt-oss-20b'",
    ),
    "unknown kind": (
        "gpt-oss-20b.chunked/cte-bf16-b1-q9-gaussian-seed0",
        "known are 'sliding', 'global'",
    ),
    "no kind": ("gpt-oss-20b/cte-bf16-b1-q9-gaussian-seed0", "'<model>.<layer kind>'"),
    "unknown real layer": ("smollm2.layer30/cte-bf16-b1-q9-prompt-seed0", "layer00 to layer29"),
    "heads do not divide": (
        PLAIN.replace("hkv2", "hkv3"),
        "num_attention_heads must be a multiple of num_key_value_heads, got 8 and 3",
    ),
    "unknown token": (PLAIN.replace("d32", "d32-banana"), "token 'banana'"),
    "token twice": (PLAIN.replace("d32", "d32-sinks-sinks"), "token 'sinks'"),
    "no number": (PLAIN.replace("d32", "d32-window"), "cannot be rebuilt"),
    "endless window": (PLAIN.replace("d32", "d32-window1e999"), "cannot be rebuilt"),
    "window and chunk": (PLAIN.replace("d32", "d32-window4-chunk8"), "exclude each other"),
    "half a norm": (PLAIN.replace("d32", "d32-norm_rms"), "cannot be rebuilt"),
    "unknown norm": (
        PLAIN.replace("d32", "d32-norm_max_pre_head_w_1em06_0"),
        "kind must be 'rms' or 'layer'",
    ),
    "unknown dtype": (PLAIN.replace("bf16", "fp64"), "must read like"),
    "unknown phase": (PLAIN.replace("cte", "xyz"), "must read like"),
    "unknown regime": (PLAIN.replace("gaussian", "uniform"), "regime must be one of"),
    "lengths do not fit the batch": (PLAIN.replace("q97", "q1_2_3"), "must come with one length"),
    "empty prompt": (PLAIN.replace("q97", "q0"), "lengths must be at least 1"),
    "steps of a prompt": (PLAIN.replace("q97", "q97-steps2"), "steps belongs to token generation"),
    "prior keys of a layer": (PLAIN.replace("q97", "q97-prior4"), "prior needs scope 'core'"),
    "scaling without a rotation": (PLAIN.replace("d32", "d32-linear_8"), "must come with rope"),
    "two scalings": (
        PLAIN.replace("d32", "d32-rope10000-linear_8-proportional_0.5_1"),
        "exclude each other",
    ),
    "adapters without a rank": (PLAIN.replace("d32", "d32-lora2"), "cannot be rebuilt"),
    "residual without a norm": (PLAIN.replace("d32", "d32-residual"), "needs input_norm"),
    "schedule of a prompt": (
        PLAIN.replace("q97", "q97-contiguous-decode1"),
        "a schedule belongs to serve",
    ),
    "serving without a schedule": (
        PLAIN.replace("cte", "serve").replace("q97", "kv0"),
        "serve to a schedule",
    ),
    "unknown cache": (SERVED.replace("contiguous", "linked"), "cache 'linked' must be one of"),
    "blocks of no size": (SERVED.replace("contiguous", "paged"), "a paged cache has a block size"),
    "int8 without scales": (SERVED.replace("contiguous", "contiguous_int8"), "must have scales"),
    "window without one": (SERVED.replace("contiguous", "rolling"), "needs a layer with sliding"),
    "unknown part": (SERVED.replace("decode3", "encode3"), "part 'encode3' must read like"),
    "row beyond the cache": (SERVED.replace("decode3", "decode3at0_2"), "below b2, got 2"),
    "row twice": (SERVED.replace("decode3", "decode3at0_0"), "name each cache row once"),
    "drafts that keep none": (SERVED.replace("decode3", "draft3"), "must say what is kept"),
    "drafts that keep too many": (SERVED.replace("decode3", "draft3keep4"), "drafts below 3"),
    "tree that is a chain": (SERVED.replace("decode3", "tree0_1to1"), "another tree of one root"),
    "child before its parent": (SERVED.replace("decode3", "tree2_0to1"), "come before their"),
    "decode that starts anew": (SERVED.replace("decode3", "decode3new"), "only a prompt starts"),
    "pieces of no size": (SERVED.replace("decode3", "pieces9"), "piece must be positive"),
    "no seed": (PLAIN.removesuffix("-seed0"), "must read like"),
    "not canonical": (PLAIN.replace("q97", "q97_97"), f"write it '{PLAIN}'"),
    "another order": (
        PLAIN.replace("d32", "d32-window16-sinks"),
        "sinks-window16",
    ),
}


@pytest.mark.parametrize(("text", "says"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_id_is_refused_in_one_sentence_that_says_why(text: str, says: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(text)
    message = str(error.value)
    assert says in message
    assert "\n" not in message
    if text:
        assert text in message


class Wider(AttentionConfig):
    """A layer of a kind that ids do not know."""


def test_what_no_token_carries_is_refused_and_never_dropped() -> None:
    config = Wider(hidden_size=64, num_attention_heads=2, num_key_value_heads=2, head_dim=32)
    case = Case(config=config, workload=Workload(phase="cte", lengths=(4,)), dtype="float32")
    with pytest.raises(UsageError, match="no token of a case's id carries"):
        _ = case.id


@given(cases(), st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_id_is_refused_or_is_another_id(case: Case, data: st.DataObject) -> None:
    text = case.id
    place = data.draw(st.integers(0, len(text) - 1))
    damaged = text[:place] + data.draw(st.sampled_from(("", "-", "_", "/", "9", "e9", "x", ".")))
    damaged += text[place + 1 :]
    try:
        found = parse(damaged)
    except UsageError:
        return
    assert found.id == damaged
