"""Features that meet the cut of heads, tokens or rows: norms, masks, orders of collectives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from impl_layers import HIDDEN, ROUNDOFF, WIDTH, positions, relative_error, tokens
from parallel_layers import BATCH, SEQ, build, checkpoint, encode
from thread_ranks import on_ranks
from torch import Tensor

from impl import (
    GQA,
    ConfigError,
    L2Norm,
    LoraServingConfig,
    QKNormPlacement,
    QKNormScope,
    RMSNorm,
)
from impl.parallel import strided

HEADS, KV = 6, 2
FLAT_NORM = {
    "qk_layernorm_scope": QKNormScope.PROJECTION,
}


def norms() -> dict[str, Any]:
    made = {"q_layernorm": RMSNorm(HEADS * WIDTH), "k_layernorm": RMSNorm(KV * WIDTH)}
    for norm in made.values():
        norm.to(torch.float64).weight.data.copy_(torch.linspace(0.5, 2.0, len(norm.weight)))
    return made


FEATURES: dict[str, Callable[[], dict[str, Any]]] = {
    "window": lambda: {"sliding_window": 3},
    "chunk": lambda: {"attention_chunk_size": 4},
    "chunk-with-a-rest": lambda: {"attention_chunk_size": 16},
    "clip": lambda: {"clip_qkv": 0.5},
    "flat-norm": lambda: {**FLAT_NORM, **norms()},
    "flat-weightless-norm": lambda: {
        "use_qk_norm": True,
        "rms_norm_eps": 1e-6,
        "qk_norm_placement": QKNormPlacement.PRE_ROPE,
    },
    "head-norm": lambda: {"q_layernorm": L2Norm(), "k_layernorm": L2Norm()},
    "softcap": lambda: {"attn_logit_softcapping": 5.0},
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("mesh", [(4, 1), (4, 2), (8, 4), (2, 2)], ids=str)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_prefill_on_ranks_equals_that_on_one(
    feature: str, mesh: tuple[int, int], sequence_parallel: bool
) -> None:
    world, cp = mesh
    state = checkpoint(HEADS, KV, bias=True)
    alone = encode(build(HEADS, KV, {}, state, **FEATURES[feature]()))
    run = {
        "tp_degree": world,
        "cp_degree": cp,
        "sequence_parallel_enabled": sequence_parallel,
    }
    piece = SEQ // world if sequence_parallel else SEQ

    def prefill(rank: int) -> Tensor:
        made = build(HEADS, KV, run, state, **FEATURES[feature]())
        own = tokens(SEQ, BATCH).narrow(1, rank * piece if sequence_parallel else 0, piece)
        return made(own, real(), positions(SEQ, batch=BATCH)).hidden_states

    for rank, got in enumerate(on_ranks(world, prefill)):
        start = rank * piece if sequence_parallel else 0
        expected = alone.hidden_states[:, start : start + piece]
        assert relative_error(got, expected) < ROUNDOFF


@pytest.mark.parametrize("mesh", [(4, 1), (4, 2), (8, 2)], ids=str)
def test_kv_heads_may_be_copied_to_every_query_head(mesh: tuple[int, int]) -> None:
    world, cp = mesh
    state = checkpoint(8, KV, bias=True, sinks=True)
    alone = encode(build(8, KV, {}, state))

    def prefill(_: int) -> tuple[Tensor, int]:
        run = {"tp_degree": world, "cp_degree": cp}
        made = build(8, KV, run, state, desired_sharding_strategy=GQA.CONVERT_TO_MHA)
        output = encode(made)
        return output.hidden_states, output.present_key_value[0].shape[1]

    for got, kv_heads in on_ranks(world, prefill):
        assert relative_error(got, alone.hidden_states) < ROUNDOFF
        assert kv_heads == 8 // world


def test_copies_that_do_not_come_out_even_in_both_stages_are_refused() -> None:
    state = checkpoint(HEADS, KV)
    run = {"tp_degree": 4, "cp_degree": 2}
    with pytest.raises(ConfigError, match="only KV heads that it has in prefill"):
        on_ranks(
            4,
            lambda _: build(HEADS, KV, run, state, desired_sharding_strategy=GQA.CONVERT_TO_MHA),
        )


def real() -> Tensor:
    return torch.ones(BATCH, SEQ, dtype=torch.bool)


# the strided kernel has no window
@pytest.mark.parametrize(
    ("window", "order"), [(None, "contiguous"), (5, "contiguous"), (None, "strided")]
)
@pytest.mark.parametrize("given", ["padding", "square", "one row", "nothing"])
def test_masks_are_cut_as_the_queries_are(window: int | None, given: str, order: str) -> None:
    generator = torch.Generator().manual_seed(3)
    seen = torch.rand(BATCH, 1, SEQ, SEQ, generator=generator) < 0.6
    seen[:, :, :, 0] = True
    masks = {
        "padding": torch.arange(SEQ)[None] < torch.tensor([SEQ, 9, 1, 12])[:, None],
        "square": seen,
        "one row": seen[:, :, :1],
        "nothing": None,
    }
    mask = masks[given]
    state = checkpoint(HEADS, KV)
    hidden, at = tokens(SEQ, BATCH), positions(SEQ, batch=BATCH)
    alone = build(HEADS, KV, {}, state, sliding_window=window)(hidden, mask, at)
    is_strided = order == "strided"
    run = {"tp_degree": 4, "cp_degree": 2}
    if is_strided:
        run |= {"strided_context_parallel_kernel_enabled": True, "logical_nc_config": 2}

    def put(x: Tensor, dim: int) -> Tensor:
        return strided(x, dim, 2) if is_strided and x.shape[dim] > 1 else x

    def prefill(rank: int) -> tuple[Tensor, ...]:
        made = build(HEADS, KV, run, state, sliding_window=window)
        theirs = mask
        if theirs is not None:
            theirs = put(
                put(theirs, theirs.dim() - 1), theirs.dim() - 2 if theirs.dim() == 4 else 0
            )
        if theirs is not None and theirs.dim() == 2:
            theirs = put(mask, 1)
        output = made(put(hidden, 1), theirs, put(at, 1) if is_strided else at)
        return output.hidden_states, *output.present_key_value

    # what a kernel leaves in rows of padding is not defined
    rows = put(masks["padding"] if given == "padding" else real(), 1)
    for got, k, _ in on_ranks(4, prefill):
        assert relative_error(got[rows], put(alone.hidden_states, 1)[rows]) < ROUNDOFF
        assert any(
            relative_error(k[:, 0], alone.present_key_value[0][:, head]) < ROUNDOFF
            for head in range(KV)
        )


@pytest.mark.parametrize("dispatch", ["AR_AG", "RS_AG", "AG_AR"])
@pytest.mark.parametrize("mesh", [(8, 2, 2), (4, 1, 2), (4, 4, 4), (4, 1, 1)], ids=str)
def test_orders_of_dispatch_agree(dispatch: str, mesh: tuple[int, int, int]) -> None:
    world, cp, dp = mesh
    batch, kv = 8, 2
    state = checkpoint(8, kv, bias=True, sinks=True)
    step, at = tokens(3, batch, seed=9), positions(3, 6, batch)
    generator = torch.Generator().manual_seed(2)
    past = [
        torch.randn(batch, kv, 8, WIDTH, generator=generator, dtype=torch.float64) for _ in "kv"
    ]
    tree = torch.ones(3, 3).tril().bool().expand(batch, 1, 3, 3).clone()
    tree[1::2, :, 2, 1] = False
    sizes = {"batch_size": batch}
    alone = build(8, kv, sizes, state)(step, None, at, past_key_value=tuple(past), active_mask=tree)
    run = {
        **sizes,
        "tp_degree": world,
        "cp_degree": cp,
        "attention_dp_degree": dp,
        "ep_dispatch_cc_option": dispatch,
    }

    def decode(rank: int) -> Tensor:
        made = build(8, kv, run, state)
        rows = slice(
            *(made.parallel.decode.stage.split.rank * batch // dp + n for n in (0, batch // dp))
        )
        heads = list(made.parallel.decode_heads.key_value)
        own = tuple(cache[rows, heads] for cache in past)
        return made(step, None, at, past_key_value=own, active_mask=tree).hidden_states

    for got in on_ranks(world, decode):
        assert relative_error(got, alone.hidden_states) < ROUNDOFF


def test_chunked_layers_hand_their_tokens_on() -> None:
    states = [checkpoint(HEADS, KV), checkpoint(HEADS, KV, bias=True)]
    hidden, at = tokens(SEQ, BATCH), positions(SEQ, batch=BATCH)

    def stack(run: dict[str, Any], optimized: bool) -> Tensor:
        x = hidden
        for i, state in enumerate(states):
            made = build(
                HEADS,
                KV,
                run,
                state,
                attention_chunk_size=4,
                optimize_interleave_attn=optimized,
                is_post_global_attn_layer=i == 0,
                is_pre_global_attn_layer=i == 1,
            )
            # what the first layer hands on is the residual of the second as well
            output = made(x, None, at, residual=x if optimized else None)
            added = optimized and i == 1
            assert (output.residual is None) == (added or not optimized)
            x = output.hidden_states if i == 0 or added else x + output.hidden_states
        return x

    expected = stack({}, False)
    for optimized in (False, True):
        for got in on_ranks(4, lambda _: stack({"tp_degree": 4, "cp_degree": 2}, optimized)):  # noqa: B023
            assert relative_error(got, expected) < ROUNDOFF


def test_a_lone_chunked_layer_between_full_ones_takes_and_returns_the_sequence() -> None:
    state = checkpoint(HEADS, KV)
    flags = {"is_post_global_attn_layer": True, "is_pre_global_attn_layer": True}

    def shape(_: int) -> tuple[int, ...]:
        made = build(
            HEADS,
            KV,
            {"tp_degree": 2, "cp_degree": 2},
            state,
            attention_chunk_size=4,
            optimize_interleave_attn=True,
            **flags,
        )
        assert not made.is_pre_global_attn_layer
        return tuple(encode(made).hidden_states.shape)

    assert on_ranks(2, shape) == [(BATCH, SEQ, HIDDEN)] * 2


@pytest.mark.parametrize("reduce_dtype", [None, torch.float32])
def test_sums_over_ranks_are_rounded_as_configured(reduce_dtype: torch.dtype | None) -> None:
    state = checkpoint(8, 2, bias=True)
    dtype = torch.bfloat16
    run = {"tp_degree": 4, "rpl_reduce_dtype": reduce_dtype, "torch_dtype": dtype}
    heads = tokens(3, 2, dtype)[..., : 8 * WIDTH // 4]

    def sums(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        made = build(8, 2, run, state).o_proj.o_proj
        own = heads * (rank + 1)
        return made(own), torch.nn.functional.linear(own, made.weight), made.bias

    results = on_ranks(4, sums)
    total = sum(product.to(reduce_dtype or dtype) for _, product, _ in results)
    expected = (total + results[0][2].to(total.dtype)).to(dtype)
    for got, _, _ in results:
        if reduce_dtype is None:
            # the order in which four bfloat16 numbers are added is the backend's: 3 roundings of
            # partial sums, each by at most u of at most the sum of sizes
            bound = sum(p.abs() for _, p, _ in results).float() * 3 * 2.0**-8
            assert (
                (got.float() - expected.float()).abs() <= bound + 2.0**-8 * got.float().abs()
            ).all()
        else:
            assert torch.equal(got, expected)


def test_the_output_bias_is_added_once() -> None:
    state = checkpoint(8, 2, bias=True)
    state["o_proj.weight"] = torch.zeros_like(state["o_proj.weight"])
    for got in on_ranks(4, lambda _: encode(build(8, 2, {"tp_degree": 4}, state)).hidden_states):
        assert torch.equal(got, state["o_proj.bias"].expand_as(got))


@pytest.mark.parametrize("decodes", [False, True])
@pytest.mark.parametrize("degrees", [{}, {"cp_degree": 2}, {"attention_dp_degree": 2}], ids=str)
def test_a_fused_residual_and_norm_meet_the_cut_of_tokens_and_rows(
    degrees: dict[str, Any], decodes: bool
) -> None:
    state = checkpoint(4, 1, bias=True)
    norm = RMSNorm(HIDDEN)
    norm.to(torch.float64).weight.data.copy_(torch.linspace(0.5, 2.0, HIDDEN))
    seq_len = 1 if decodes else SEQ
    residual = tokens(seq_len, BATCH, seed=7)
    cache = tuple(tokens(5, BATCH, seed=s)[:, None, :, :WIDTH].contiguous() for s in (8, 9))

    def step(rank: int, run: dict[str, Any]) -> Any:
        made = build(4, 1, {"qkv_kernel_enabled": True, **run}, state)
        call: dict[str, Any] = {"residual": residual, "rmsnorm": norm}
        at = positions(seq_len, 5 if decodes else 0, batch=BATCH)
        if decodes:
            share = BATCH // run.get("attention_dp_degree", 1)
            own = slice(0, BATCH) if share == BATCH else slice(rank * share, (rank + 1) * share)
            call["past_key_value"] = tuple(t[own] for t in cache)
        else:
            call["attention_mask"] = at >= 0
        return made(tokens(seq_len, BATCH), position_ids=at, **call)

    expected = step(0, {})
    assert torch.equal(expected.residual, tokens(seq_len, BATCH) + residual)
    for got in on_ranks(2, lambda rank: step(rank, {"tp_degree": 2, **degrees})):
        assert relative_error(got.hidden_states, expected.hidden_states) <= ROUNDOFF
        assert torch.equal(got.residual, expected.residual)


def adapter(heads: int, kv: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"q_proj": (HIDDEN, heads * WIDTH), "o_proj": (heads * WIDTH, HIDDEN)}
    sizes |= dict.fromkeys(("k_proj", "v_proj"), (HIDDEN, kv * WIDTH))
    state = {}
    for name, (width, out) in sizes.items():
        for letter, shape in (("A", (3, width)), ("B", (out, 3))):
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            state[f"{name}.lora_{letter}.weight"] = 0.3 * values
    return state


@pytest.mark.parametrize("decodes", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv", "run"),
    [
        (6, 2, {"tp_degree": 2}),
        (6, 2, {"tp_degree": 4, "fused_qkv": True}),
        (4, 1, {"tp_degree": 2, "cp_degree": 2, "attention_dp_degree": 2}),
        (6, 2, {"tp_degree": 4, "cp_degree": 2, "attention_dp_degree": 2}),
        (4, 4, {"tp_degree": 4, "cp_degree": 2}),
        (6, 2, {"tp_degree": 4, "cp_degree": 4, "sequence_parallel_enabled": True}),
        (4, 1, {"tp_degree": 4, "attention_dp_degree": 2, "fused_qkv": True}),
        (6, 2, {"tp_degree": 8, "cp_degree": 4, "attention_dp_degree": 2}),
    ],
)
def test_adapters_on_ranks_are_those_of_one_rank(
    heads: int, kv: int, run: dict[str, Any], decodes: bool
) -> None:
    state = checkpoint(heads, kv, bias=True)
    ids = torch.tensor([1, -1, 0, 1])
    lora = LoraServingConfig(max_loras=2, max_lora_rank=4)
    past = build(heads, kv, {}, state)(tokens(5, BATCH), positions(5, batch=BATCH) >= 0)

    def step(rank: int, run: dict[str, Any]) -> Any:
        made = build(heads, kv, {"lora_config": lora, **run}, state)
        for index in range(2):
            made.lora.load_adapter(index, adapter(heads, kv, index), lora_alpha=2.0)
        if not decodes:
            at = positions(SEQ, batch=BATCH)
            pieces = run.get("tp_degree", 1) if run.get("sequence_parallel_enabled") else 1
            own = tokens(SEQ, BATCH).chunk(pieces, 1)[rank % pieces]
            got = made(own, at >= 0, at, adapter_ids=ids).hidden_states
            return got, slice(rank % pieces * own.shape[1], (rank % pieces + 1) * own.shape[1])
        dp = run.get("attention_dp_degree", 1)
        own = slice((rank // (run.get("tp_degree", 1) // dp)) * BATCH // dp, None)
        own = slice(own.start, own.start + BATCH // dp)
        cache = tuple(
            torch.cat([t[own, head : head + 1] for head in made.parallel.decode_heads.key_value], 1)
            for t in past.present_key_value
        )
        call = {"past_key_value": cache, "adapter_ids": ids}
        at = positions(1, 5, batch=BATCH)
        return made(tokens(1, BATCH), position_ids=at, **call).hidden_states, slice(None)

    expected, _ = step(0, {})
    for got, piece in on_ranks(run["tp_degree"], lambda rank: step(rank, run)):
        assert relative_error(got, expected[:, piece]) <= ROUNDOFF


def test_each_phase_has_its_own_part_of_the_adapters() -> None:
    """Without decode's own part the heads that prefill holds would add another head's term."""
    state, run = checkpoint(4, 4), {"tp_degree": 4, "cp_degree": 2}
    lora = LoraServingConfig(max_loras=1, max_lora_rank=4)

    def parts(_: int) -> tuple[dict[str, Tensor], tuple[int, ...], tuple[int, ...]]:
        made = build(4, 4, {"lora_config": lora, **run}, state)
        made.lora.load_adapter(0, adapter(4, 4, 0), lora_alpha=2.0)
        heads = made.parallel.prefill_heads.query, made.parallel.decode_heads.query
        return {name: value.clone() for name, value in made.lora.state_dict().items()}, *heads

    whole = adapter(4, 4, 0)["q_proj.lora_B.weight"].unflatten(0, (4, WIDTH))
    prefills, decodes = set(), set()
    for own, prefill, decode in on_ranks(4, parts):
        for prefix, heads in (("cte_", prefill), ("tkg_", decode)):
            held = own[f"{prefix}q_proj.lora_B"][0, :, :3]
            assert torch.equal(held, whole[list(heads)].flatten(0, 1))
        prefills.add(prefill)
        decodes.add(decode)
    assert prefills == {(0, 1), (2, 3)}
    assert decodes == {(0,), (1,), (2,), (3,)}
