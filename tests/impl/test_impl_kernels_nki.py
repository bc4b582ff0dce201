"""What nki-library's `attention_cte` is called with, and when. No kernel runs here.

`Standin` stands in for the kernel: it has the documented parameters and no others, records what it
is called with, and answers with the documented formula in plain torch, so that a wrong layout,
order of heads, scale or offset shows in numbers. That pins the contract of the arguments as the
documentation gives it. It says nothing of the kernel itself, of which no part was run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from impl_layers import ROUNDOFF, layer, model, relative_error
from nki_packages import Recorder, forget_operators, install_packages, module
from torch import Tensor

from impl import (
    ConfigError,
    DeviceError,
    FlashAttentionStrategy,
    ShapeError,
    UnsupportedError,
    attention_setup,
)
from impl.kernels import PrefillRule, PriorKeys, native, nki, prefill
from impl.kernels.native import ScoreRule
from impl.masks import visible
from impl.strategy import Implementation, resolve_kernel

BATCH, HEADS, KV_HEADS, WIDTH, LENGTH = 2, 4, 2, 8, 12
DIVISOR = 2.5
BF16 = torch.bfloat16


class Standin(Recorder):
    """`attention_cte` as documented: its parameters, its formula, and a record of its calls."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float = 1.0,
        causal_mask: bool = True,
        k_prior: Tensor | None = None,
        v_prior: Tensor | None = None,
        prior_used_len: Tensor | None = None,
        sink: Tensor | None = None,
        sliding_window: int | None = None,
        tp_q: bool = True,
        tp_k: bool = False,
        tp_out: bool = False,
        cache_softmax: bool = False,
        softmax_dtype: Any = None,
        cp_offset: Tensor | None = None,
        global_cp_deg: int | None = None,
        cp_strided_q_slicing: bool = False,
    ) -> Tensor:
        self.calls.append({name: value for name, value in locals().items() if name != "self"})
        assert (tp_q, tp_k, tp_out, cache_softmax) == (True, True, False, False)
        if sliding_window or global_cp_deg is not None or k_prior is not None:
            assert scale == 1.0, "no other is documented there"
        if sliding_window or global_cp_deg is not None:
            assert causal_mask
        used = 0
        if k_prior is not None:
            assert prior_used_len is not None
            assert v_prior is not None
            assert (prior_used_len.shape, prior_used_len.dtype) == ((1,), torch.int32)
            used = int(prior_used_len)
            k, v = (
                torch.cat([old[:, :used], new], dim=1) for old, new in ((k_prior, k), (v_prior, v))
            )
        first = 0
        if global_cp_deg is not None:
            assert cp_offset is not None
            assert (cp_offset.shape, cp_offset.dtype) == ((1, 1), torch.int32)
            assert 1 <= global_cp_deg <= 32
            first = int(cp_offset)
        stride = global_cp_deg if cp_strided_q_slicing and global_cp_deg else 1
        ahead = (torch.arange(k.shape[1]) - used)[None, :] - (
            first + stride * torch.arange(q.shape[1])
        )[:, None]
        hidden = (ahead > 0) & causal_mask
        if sliding_window:
            hidden = hidden | (ahead <= -sliding_window)
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], dim=0).double() for x in (k, v))
        scores = (scale * q.double() @ k.mT).masked_fill(hidden, float("-inf"))
        if sink is not None:
            assert sink.shape == (q.shape[0], 1)
            column = sink[:, None].expand(-1, q.shape[1], -1).double()
            weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        return (weights @ v).to(q.dtype)


Install = Callable[..., Standin]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put stand-ins of the packages, and of the kernel, where imports look."""

    def put(device: bool = False) -> Standin:
        kernel = Standin()
        install_packages(monkeypatch, "attention_cte", kernel, device=device)
        return kernel

    forget_operators()
    yield put
    forget_operators()


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def step(
    q_len: int = LENGTH, kv_heads: int = KV_HEADS, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        drawn(BATCH, HEADS, q_len, WIDTH, dtype=dtype),
        drawn(BATCH, kv_heads, LENGTH, WIDTH, dtype=dtype),
        drawn(BATCH, kv_heads, LENGTH + 1, WIDTH, dtype=dtype)[:, :, 1:],
    )


def expected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    at: Tensor,
    keys_at: Tensor,
    window: int | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """The plain form, over explicit positions `(batch, length)`."""
    mask = visible(at, keys_at, sliding_window=window, attention_chunk_size=None)
    return native.context_encoding(q, k, v, mask, sink, ScoreRule(divisor=DIVISOR))


@pytest.mark.parametrize("window", [None, 1, 5, LENGTH, LENGTH + 1])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, HEADS])
def test_heads_are_the_kernels_batch_and_windows_and_sinks_keep_their_meaning(
    install: Install, window: int | None, sink: bool, kv_heads: int
) -> None:
    kernel = install()
    q, k, v = step(kv_heads=kv_heads)
    sinks = drawn(HEADS) if sink else None
    got = nki.attention_cte(q, k, v, divisor=DIVISOR, sink=sinks, sliding_window=window)
    at = torch.arange(LENGTH).expand(BATCH, -1)
    assert relative_error(got, expected(q, k, v, at, at, window, sinks)) < ROUNDOFF
    (call,) = kernel.calls
    assert call["q"].shape == (BATCH * HEADS, LENGTH, WIDTH)
    assert call["k"].shape == call["v"].shape == (BATCH * kv_heads, LENGTH, WIDTH)
    assert call["sliding_window"] == window
    assert call["scale"] == (1.0 if window else 1 / DIVISOR)
    assert torch.equal(call["q"].view_as(q), q / DIVISOR if window else q)
    assert call["cp_offset"] is call["global_cp_deg"] is call["k_prior"] is None


def test_full_attention_is_asked_for_without_causality(install: Install) -> None:
    kernel = install()
    q, k, v = step(q_len=3)
    got = nki.attention_cte(q, k, v, divisor=DIVISOR, causal=False, q_offset=3)
    rule = ScoreRule(divisor=DIVISOR)
    assert relative_error(got, native.context_encoding(q, k, v, None, None, rule)) < ROUNDOFF
    assert (kernel.calls[0]["causal_mask"], kernel.calls[0]["cp_offset"]) == (False, None)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    ("offset", "stride", "degree"), [(0, 1, 4), (6, 1, 4), (9, 1, 4), (0, 4, 4), (3, 4, 4)]
)
def test_a_rank_says_where_its_queries_stand(
    install: Install, offset: int, stride: int, degree: int, window: int | None
) -> None:
    kernel = install()
    q, k, v = step(q_len=LENGTH // 4)
    got = nki.attention_cte(
        q, k, v, divisor=DIVISOR, sliding_window=window, q_offset=offset, q_stride=stride
    )
    at = (offset + stride * torch.arange(LENGTH // 4)).expand(BATCH, -1)
    keys_at = torch.arange(LENGTH).expand(BATCH, -1)
    assert relative_error(got, expected(q, k, v, at, keys_at, window)) < ROUNDOFF
    (call,) = kernel.calls
    assert call["cp_offset"].tolist() == [[offset]]
    assert (call["global_cp_deg"], call["cp_strided_q_slicing"]) == (degree, stride != 1)


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("lengths", [(5, 7), (0, 7)])
def test_each_row_has_its_own_call_with_the_slots_it_uses(
    install: Install, lengths: tuple[int, int], window: int | None
) -> None:
    kernel = install()
    q, k, v = step()
    k_prior, v_prior = drawn(BATCH, KV_HEADS, 7, WIDTH), drawn(BATCH, KV_HEADS, 7, WIDTH) + 1
    used = torch.tensor(lengths)
    got = nki.attention_cte(
        q,
        k,
        v,
        divisor=DIVISOR,
        sliding_window=window,
        k_prior=k_prior,
        v_prior=v_prior,
        prior_lengths=used,
    )
    at = used[:, None] + torch.arange(LENGTH)
    slots = torch.arange(7)
    held = torch.where(slots < used[:, None], slots, -1)
    keys = (torch.cat([k_prior, k], dim=2), torch.cat([v_prior, v], dim=2))
    want = expected(q, *keys, at, torch.cat([held, at], dim=1), window)
    assert relative_error(got, want) < ROUNDOFF
    assert [call["prior_used_len"].tolist() for call in kernel.calls] == [[n] for n in lengths]
    assert kernel.calls[0]["k_prior"].shape == (KV_HEADS, 7, WIDTH)


def prefilled(rule: PrefillRule, **changed: Any) -> Tensor:
    q, k, v = step(dtype=changed.pop("dtype", BF16))
    at = torch.arange(LENGTH).expand(BATCH, -1)
    call: dict[str, Any] = {"sink": None, "attention_mask": at >= 0, "position_ids": at, **changed}
    return prefill(q, k, v, implementation=Implementation.NKI, rule=rule, **call)


def test_a_prefill_hands_over_its_rule_and_zeroes_padding(install: Install) -> None:
    kernel = install()
    at = torch.arange(LENGTH).repeat(BATCH, 1)
    at[1, 7:] = -1
    rule = PrefillRule(score=ScoreRule(divisor=DIVISOR), sliding_window=4, logical_nc_config=2)
    out = prefilled(rule, position_ids=at, attention_mask=at >= 0)
    (call,) = kernel.calls
    assert (call["sliding_window"], call["causal_mask"]) == (4, True)
    assert kernel.route == [("grid", 2), "simulate"]
    assert not call["k"][KV_HEADS:, 7:].any()
    assert not out[1, :, 7:].any()
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("held", "start", "broken"),
    [
        ([0, 1, 2, -1], 3, False),
        ([-1, -1, -1, -1], 0, False),
        ([0, 1, 3, -1], 3, True),
        ([1, 0, 2, -1], 3, True),
        ([0, -1, 1, -1], 2, True),
        ([0, 1, 2, -1], 4, True),
    ],
)
def test_cached_keys_that_are_not_one_run_before_the_step_give_nan(
    install: Install, held: list[int], start: int, broken: bool
) -> None:
    install()
    cache = drawn(BATCH, KV_HEADS, 4, WIDTH, dtype=BF16)
    prior = PriorKeys(k=cache, v=cache, positions=torch.tensor([held, [0, 1, 2, 3]]))
    at = torch.tensor([[start], [4]]) + torch.arange(LENGTH)
    out = prefilled(
        PrefillRule(score=ScoreRule(divisor=DIVISOR)), position_ids=at, prior=prior
    ).isnan()
    assert out[0].all() if broken else not out[0].any()
    assert not out[1].any()


@pytest.mark.parametrize(
    ("rule", "changed", "reason"),
    [
        ({"score": ScoreRule(divisor=1.0, softcap=5.0)}, {}, "no softcap"),
        ({"attention_chunk_size": 4}, {}, "no attention chunks"),
        ({"padding_side": "left"}, {}, "padding on the left"),
        ({}, {"attention_mask": torch.ones(BATCH, 1, LENGTH, LENGTH).bool()}, "takes no mask"),
        ({}, {"dtype": torch.float32}, r"multiplies in bfloat16.*torch\.float32"),
    ],
)
def test_what_the_kernel_cannot_express_is_refused(
    install: Install, rule: dict[str, Any], changed: dict[str, Any], reason: str
) -> None:
    kernel = install()
    with pytest.raises(ConfigError, match=reason):
        prefilled(PrefillRule(**{"score": ScoreRule(divisor=1.0), **rule}), **changed)
    assert not kernel.calls


@pytest.mark.parametrize(
    ("shape", "given", "error", "match"),
    [
        ((1, 1, 4, 129), {}, UnsupportedError, "head_dim must be at most 128.*got 129"),
        ((1, 513, 1, 8), {}, UnsupportedError, "num_attention_heads must be at most 512"),
        ((1, 1, 131073, 1), {}, UnsupportedError, "q_len must be at most 131072"),
        ((1, 1, 4, 8), {"q_stride": 33}, UnsupportedError, "context-parallel degree"),
        ((1, 1, 4, 8), {"causal": False, "sliding_window": 2}, ShapeError, "None unless causal"),
        ((1, 1, 4, 8), {"prior_lengths": torch.ones(1)}, ShapeError, "given together"),
        ((1, 1, 4, 8), {"k_prior": torch.ones(1, 1, 4, 8)}, ShapeError, "given together"),
    ],
)
def test_what_the_kernel_does_not_serve_is_refused(
    install: Install, shape: tuple[int, ...], given: dict[str, Any], error: Any, match: str
) -> None:
    install()
    one = torch.zeros(shape)
    with pytest.raises(error, match=match):
        nki.attention_cte(one, one, one, divisor=1.0, **given)


def test_without_the_packages_one_sentence_says_which_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(DeviceError, match="nki must be importable to run an NKI kernel"):
        nki.attention_cte(*step(), divisor=1.0)
    monkeypatch.setitem(sys.modules, "nki", module("nki"))
    with pytest.raises(DeviceError, match="nkilib must be importable to run an NKI kernel"):
        nki.attention_cte(*step(), divisor=1.0)
    assert "nkilib must be importable" in (nki.device_obstacle() or "")


def test_a_library_without_the_kernel_is_reported(install: Install) -> None:
    install()
    del sys.modules[nki.MODULES["attention_cte"]].attention_cte
    with pytest.raises(DeviceError, match=r"nkilib must hold .*attention_cte\.attention_cte"):
        nki.attention_cte(*step(), divisor=1.0)


def test_a_kernel_that_is_not_bound_is_refused(install: Install) -> None:
    install()
    with pytest.raises(UnsupportedError, match=r"bound: attention_cte, .*, got attention_bwd"):
        nki.load("attention_bwd")


@pytest.mark.parametrize("lnc", [1, 2])
def test_the_simulator_runs_it_only_where_there_is_no_device(install: Install, lnc: int) -> None:
    grid = [("grid", 2)] if lnc == 2 else []
    kernel = install()
    nki.attention_cte(*step(), divisor=1.0, logical_nc_config=lnc)
    assert kernel.route == [*grid, "simulate"]
    assert nki.device_obstacle() is not None
    kernel = install(device=True)
    nki.attention_cte(*step(), divisor=1.0, logical_nc_config=lnc)
    assert kernel.route == [("nki_op", nki.OPERATOR), "wrap_nki", *grid]
    assert nki.device_obstacle() is None


class Attention(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return 1 + nki.attention_cte(q * 2, k, v, divisor=DIVISOR, sliding_window=4)


@pytest.mark.parametrize("device", [False, True])
def test_it_stays_one_node_when_compiled_and_when_exported(install: Install, device: bool) -> None:
    kernel = install(device)
    inputs = step()
    want = Attention()(*inputs)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    forget_operators()
    compiled = torch.compile(Attention(), backend=backend, fullgraph=True, dynamic=False)
    assert torch.equal(compiled(*inputs), want)
    graphs.append(torch.export.export(Attention(), inputs).graph_module)
    before = len(kernel.calls)
    torch.compile(Attention(), backend="aot_eager", fullgraph=True)(*inputs)
    assert len(kernel.calls) == before + 1, "tracing calls no kernel"
    for graph in graphs:
        nodes = [str(node.target) for node in graph.graph.nodes if "nki" in str(node.target)]
        assert len(nodes) == 1


def test_a_layers_choice_and_its_prefill_compile_into_one_node(install: Install) -> None:
    kernel = install(device=True)
    made = layer(BF16, {"logical_nc_config": 2}, sliding_window=4)
    at = torch.arange(LENGTH).expand(BATCH, -1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        choice = made.kernel_choice(1024, device_type="neuron")
        return prefill(
            q,
            k,
            v,
            implementation=choice.implementation,
            rule=made.prefill_rule,
            sink=None,
            attention_mask=at >= 0,
            position_ids=at,
        )

    inputs = step(dtype=BF16)
    want = attend(*inputs)
    got = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=False)(*inputs)
    assert torch.equal(got, want)
    assert len(kernel.calls) == 2
    assert kernel.route.count(("grid", 2)) == 2


S = FlashAttentionStrategy


@pytest.mark.parametrize(
    ("device", "strategy", "obstacle", "expected"),
    [
        ("neuron", S.UNSHARDED_KERNEL, None, Implementation.NKI),
        ("neuron", S.SHARDED_KERNEL, None, Implementation.NKI),
        ("neuron", S.UNSHARDED_KERNEL, "attention_cte: why", Implementation.FLASH),
        ("neuron", S.NONE, None, Implementation.FLASH),
        ("cpu", S.UNSHARDED_KERNEL, None, Implementation.SDPA),
        ("cuda", S.UNSHARDED_KERNEL, None, Implementation.SDPA),
    ],
)
def test_the_kernel_is_selected_on_neuron_alone(
    device: str, strategy: S, obstacle: str | None, expected: Implementation
) -> None:
    choice = resolve_kernel(
        strategy, q_len=4096, plain=True, device_type=device, nki_obstacle=obstacle
    )
    assert choice.implementation is expected
    assert (obstacle or "") in choice.reason


@pytest.mark.parametrize(
    ("features", "call", "reason"),
    [
        ({}, {}, "attention_cte serves it"),
        ({"sliding_window": 4, "learned_sinks_size": 1}, {}, "attention_cte serves it"),
        ({}, {"prior": True, "prior_in_order": True}, "attention_cte serves it"),
        ({}, {"prior": True}, "not one run from slot 0"),
        ({}, {"trains": True}, "no backward"),
        ({}, {"explicit_mask": True}, "takes no mask"),
        ({"attn_logit_softcapping": 5.0}, {}, "no softcap"),
        ({"dtype": torch.float16}, {}, "multiplies in bfloat16"),
        ({"head_dim": 130}, {}, "head_dim 130 is above the 128 it serves"),
    ],
)
def test_a_layer_on_neuron_selects_it_where_it_can_and_says_why_not(
    install: Install, features: dict[str, Any], call: dict[str, Any], reason: str
) -> None:
    install(device=True)
    given = dict(features)
    width, dtype = given.pop("head_dim", WIDTH), given.pop("dtype", BF16)
    made = layer(config=model(dtype, {"logical_nc_config": 2}, head_dim=width), **given)
    choice = made.kernel_choice(1024, device_type="neuron", **call)
    assert reason in choice.reason
    assert (choice.implementation is Implementation.NKI) == (reason == "attention_cte serves it")
    assert made.kernel_choice(1024, **call).implementation is not Implementation.NKI


def test_a_layer_on_neuron_without_the_packages_says_which_is_missing() -> None:
    made = layer(BF16, {"logical_nc_config": 2})
    choice = made.kernel_choice(1024, device_type="neuron")
    assert choice.implementation is Implementation.FLASH
    assert "nki must be importable" in choice.reason


def test_the_bound_kernel_is_not_reported_as_unbound(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install(device=True)
    assert attention_setup.device_obstacle() is None
    layer(run={"attn_kernel_enabled": True})
    assert not caplog.records
    layer(run={"attn_kernel_enabled": True, "qkv_kernel_enabled": True})
    assert "['qkv_kernel_enabled']" in caplog.text
