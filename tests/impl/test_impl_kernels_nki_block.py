"""What nki-library's `attention_block_tkg` is called with, and when. No kernel runs here.

`BlockStandin` stands in for the kernel: see there what that pins, and what it cannot. Where numbers
are compared to round-off the layer is in float64, which the kernel does not serve: the limit on
dtypes is lifted there, and tested by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from block_tkg_standin import BlockStandin
from impl_layers import ROUNDOFF, relative_error
from nki_packages import forget_operators, install_packages
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from impl import (
    DeviceError,
    ShapeError,
    UnsupportedError,
)
from impl.kernels import nki, nki_block, nki_block_limits
from impl.kernels.native import ScoreRule
from impl.kernels.nki_block import attention_block_tkg
from impl.kernels.nki_block_arguments import joint_mask
from impl.kernels.nki_block_limits import attention_block_tkg_obstacle, has_free_tail
from impl.kernels.token_generation_block import (
    BlockRule,
    BlockWeights,
    RMSWeight,
    token_generation_block,
)
from impl.slot_positions import (
    ChunkSlots,
    ContiguousSlots,
    LeftPaddedSlots,
    RollingSlots,
    ShardSlots,
    SlotLayout,
    slot_positions,
)

HIDDEN, HEADS, WIDTH, SLOTS, BATCH = 128, 3, 64, 128, 2
BF16 = torch.bfloat16
RUN = {
    "attn_block_tkg_nki_kernel_enabled": True,
    "qkv_kernel_enabled": True,
    "fused_qkv": True,
    "seq_len": SLOTS,
}

Install = Callable[..., BlockStandin]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put stand-ins of the packages, and of the kernel, where imports look."""

    def put(device: bool = False, dtypes: bool = True) -> BlockStandin:
        kernel = BlockStandin()
        install_packages(monkeypatch, "attention_block_tkg", kernel, device=device)
        if dtypes:
            served = (*nki_block_limits.DTYPES, torch.float64)
            monkeypatch.setattr(nki_block_limits, "DTYPES", served)
        return kernel

    forget_operators()
    yield put
    forget_operators()


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def step(
    q_len: int = 1,
    *,
    width: int = WIDTH,
    batch: int = BATCH,
    heads: int = HEADS,
    dtype: torch.dtype = torch.float64,
    rule: dict[str, Any] | None = None,
    weights: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Arguments of a decode step by both forms."""
    made = BlockWeights(
        **{
            "qkv": drawn((heads + 2) * width, HIDDEN, dtype=dtype) / 8,
            "output": drawn(HIDDEN, heads * width, dtype=dtype) / 8,
            **(weights or {}),
        }
    )
    kept = BlockRule(
        **{
            "num_key_value_heads": 1,
            "head_dim": width,
            "score": ScoreRule(divisor=5.0),
            **(rule or {}),
        }
    )
    held = torch.tensor([90, 40]).repeat(batch // 2 + 1)[:batch, None]
    prior = (torch.arange(SLOTS) < held)[:, None, None, :]
    cache = drawn(batch, 1, SLOTS, width, dtype=dtype)
    return {
        "hidden_states": drawn(batch, q_len, HIDDEN, dtype=dtype),
        "weights": made,
        "rule": kept,
        "cos": None,
        "sin": None,
        "k_cache": cache.transpose(2, 3).contiguous() if kept.k_cache_transposed else cache,
        "v_cache": drawn(batch, 1, SLOTS, width, seed=1, dtype=dtype),
        "prior_mask": prior,
        "active_mask": torch.ones(1, 1, q_len, q_len).tril().bool(),
    }


def angles(q_len: int, width: int, interleaved: bool) -> dict[str, Tensor]:
    half = drawn(BATCH, q_len, width // 2, seed=7)
    whole = half if interleaved else torch.cat([half, half], dim=-1)
    return {"cos": whole.cos(), "sin": whole.sin()}


def norm(width: int, seed: int, offset: float = 0.0) -> RMSWeight:
    return RMSWeight(weight=drawn(width, seed=seed), eps=1e-3, offset=offset)


CASES: dict[str, dict[str, Any]] = {
    "bare": {},
    "biases": {"weights": {"qkv_bias": drawn(5 * WIDTH), "output_bias": drawn(HIDDEN)}},
    "sinks": {"weights": {"sink": 2 * drawn(HEADS)}},
    "norm of the input": {"weights": {"input_norm": norm(HIDDEN, 1)}},
    "norm of the input, one added": {"weights": {"input_norm": norm(HIDDEN, 1, offset=1.0)}},
    "keys as columns": {"rule": {"k_cache_transposed": True}},
    "norms before": {
        "width": 128,
        "weights": {"q_norm": norm(128, 2), "k_norm": norm(128, 3, offset=1.0)},
    },
    "norms after": {
        "width": 128,
        "rule": {"norm_after_rope": True},
        "weights": {"q_norm": norm(128, 2), "k_norm": norm(128, 3)},
    },
    "one query head": {"heads": 1},
}


@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("turns", ["no", "half", "interleaved"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_documented_formula_of_the_arguments_is_the_torch_form(
    install: Install, case: dict[str, Any], turns: str, q_len: int
) -> None:
    kernel = install()
    rule = {**case.get("rule", {}), "interleaved": turns == "interleaved"}
    given = step(q_len, **{**case, "rule": rule})
    if turns != "no":
        given |= angles(q_len, given["rule"].head_dim, turns == "interleaved")
    before = {name: x.clone() for name, x in given.items() if isinstance(x, Tensor)}
    got, want = attention_block_tkg(**given), token_generation_block(**given)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < ROUNDOFF
    assert all(torch.equal(given[name], value) for name, value in before.items())
    (call,) = kernel.calls
    assert (call["update_cache"], call["kv_cache_update_idx"]) == (False, None)
    assert call["softmax_scale"] == 1 / 5.0
    assert call["rope_contiguous_layout"] == (turns != "interleaved")


def test_masks_are_read_and_never_written() -> None:
    prior = torch.zeros(1, 1, 1, 6).bool().index_fill(3, torch.tensor([0, 1]), True)
    shared = prior.expand(2, 1, 2, 6)  # the rows and tokens are one storage
    active = torch.tensor([[1, 0], [1, 1]]).bool().expand(2, 1, 2, 2)
    mask, sees, broken = joint_mask(shared, active, 6)
    assert mask[0, 0].tolist() == [[True, True, False, False, *row] for row in active[0, 0]]
    assert torch.equal(mask[0], mask[1])
    assert prior.flatten().tolist() == [True, True, False, False, False, False]
    assert (sees.all(), broken.any()) == (True, False)
    with pytest.raises(ShapeError, match="active_mask must be of at most 1 tokens, got 2"):
        joint_mask(shared[..., :1], active, 1)


def test_a_token_that_sees_nothing_gets_the_projection_of_zeros(install: Install) -> None:
    kernel = install()
    for bias in (None, drawn(HIDDEN)):
        given = step(2, weights={"output_bias": bias, "sink": drawn(HEADS)})
        given["prior_mask"] = given["prior_mask"] & torch.tensor([True, False])[:, None, None, None]
        given["active_mask"] = torch.tensor([[0, 0], [1, 1]]).bool().expand(2, 1, 2, 2)
        got, want = attention_block_tkg(**given), token_generation_block(**given)
        assert relative_error(got.hidden_states, want.hidden_states) < ROUNDOFF
        blind = torch.zeros(HIDDEN, dtype=torch.float64) if bias is None else bias
        assert torch.equal(got.hidden_states[1, 0], blind)
        # the kernel itself is never asked to divide by nothing
        seen = kernel.calls[-1]["attention_mask"].sum(dim=0)
        assert seen[:, 0].tolist() == [[90, 92], [1, 2]]


@pytest.mark.parametrize("q_len", [1, 3])
def test_a_row_that_needs_the_last_slots_as_a_cache_is_nan_and_no_other(
    install: Install, q_len: int
) -> None:
    install()
    given = step(q_len)
    given["prior_mask"] = (
        torch.arange(SLOTS) < torch.tensor([SLOTS - q_len, SLOTS - q_len + 1])[:, None, None, None]
    )
    got, want = attention_block_tkg(**given), token_generation_block(**given)
    assert relative_error(got.hidden_states[0], want.hidden_states[0]) < ROUNDOFF
    assert got.hidden_states[1].isnan().all()


LAYOUTS: list[tuple[SlotLayout, int]] = [
    (ContiguousSlots(), 12),
    (ChunkSlots(12), 12),
    (ChunkSlots(20), 12),
    (RollingSlots(12), 12),
    (RollingSlots(11), 12),
    (RollingSlots(9), 12),
    (RollingSlots(0), 12),
    (LeftPaddedSlots(), 12),
    (ShardSlots(0, 2), 12),
]


@pytest.mark.parametrize("q_len", [1, 2, 3])
@pytest.mark.parametrize(("layout", "slots"), LAYOUTS, ids=str)
def test_a_tail_is_called_free_only_where_no_step_finds_a_key_in_it(
    layout: SlotLayout, slots: int, q_len: int
) -> None:
    # where the cache ends with the sequence, its last step ends with the cache
    ends = isinstance(layout, ContiguousSlots) or (
        isinstance(layout, ChunkSlots) and layout.size > slots
    )
    lengths = torch.arange(slots - q_len + 1 if ends else 4 * slots)
    if isinstance(layout, ChunkSlots):
        lengths = lengths[lengths % layout.size + q_len <= layout.size]
    held = slot_positions(layout, lengths, slots)[:, slots - q_len :]
    assert not (has_free_tail(layout, slots, q_len) and (held >= 0).any())
    known = isinstance(layout, ContiguousSlots | ChunkSlots | RollingSlots)
    assert has_free_tail(layout, slots, q_len) == (known and not (held >= 0).any())


def test_it_takes_a_step_where_every_limit_is_met() -> None:
    given = step(8, batch=8, heads=2, dtype=BF16)
    limits: dict[str, Any] = {"batch": 8, "q_len": 8, "slots": 256, "rotary_dim": WIDTH}
    for cores in (1, 2):
        wide = BlockWeights(
            qkv=torch.zeros(4 * WIDTH, 256, dtype=torch.float16),
            output=torch.zeros(256, 2 * WIDTH, dtype=torch.float16),
        )
        for weights in (wide, given["weights"]) if cores == 1 else (wide,):
            found = attention_block_tkg_obstacle(
                weights, given["rule"], logical_nc_config=cores, **limits
            )
            assert found is None
    # below 256 the slots are not split over the cores
    limits["slots"] = 128
    assert attention_block_tkg_obstacle(wide, given["rule"], logical_nc_config=2, **limits) is None


LIMITS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "dtype": ({"dtype": torch.float32}, {}, "float16 and bfloat16, and the layer is in torch.fl"),
    "softcap": ({"rule": {"score": ScoreRule(divisor=1.0, softcap=5.0)}}, {}, "no softcap"),
    "KV heads": ({"rule": {"num_key_value_heads": 2}}, {}, "one KV head a rank, and there are 2"),
    "odd heads": ({"width": 63}, {}, "head_dim 63 is odd"),
    "wide heads": ({"width": 130}, {}, "head_dim 130 is above the 128"),
    "rotated heads": ({"width": 96}, {"rotary_dim": 96}, "rotates heads of 64 or 128, not of 96"),
    "partial rotation": ({}, {"rotary_dim": 32}, "every channel of a head, and 32 of 64 turn"),
    "one norm": ({"width": 128, "weights": {"q_norm": norm(128, 1)}}, {}, "q and k, or neither"),
    "normed heads": (
        {"weights": {"q_norm": norm(WIDTH, 1), "k_norm": norm(WIDTH, 2)}},
        {},
        "norms heads of 128 alone, not of 64",
    ),
    "epsilons": (
        {
            "width": 128,
            "weights": {"q_norm": norm(128, 1), "k_norm": RMSWeight(weight=drawn(128), eps=1e-6)},
        },
        {},
        "one epsilon",
    ),
    "tokens": ({}, {"q_len": 9}, "takes 8 tokens a row, and there are 9"),
    "rows": ({}, {"batch": 43}, "query heads are 129, above the 128"),
    "output width": (
        {"weights": {"output": torch.zeros(256, HEADS * WIDTH, dtype=BF16)}},
        {},
        "as wide as it writes, not 128 and 256",
    ),
    "hidden size": ({}, {"logical_nc_config": 2}, "hidden size 128 is no multiple of 256"),
    "projection": ({"heads": 63}, {"batch": 1}, "q, k and v are 4160 wide, above the 4096"),
    "slots": ({}, {"slots": 130}, "130 slots is no multiple of 128"),
    "slots on two cores": (
        {
            "weights": {
                "qkv": torch.zeros(5 * WIDTH, 256, dtype=BF16),
                "output": torch.zeros(256, HEADS * WIDTH, dtype=BF16),
            }
        },
        {"slots": 384, "logical_nc_config": 2},
        "384 slots is no multiple of 256",
    ),
    "tail": ({}, {"free_tail": False}, "last slots, which hold cached keys"),
    "gradients": ({}, {"trains": True}, "no backward"),
}


@pytest.mark.parametrize(("made", "asked", "reason"), LIMITS.values(), ids=LIMITS)
def test_what_it_cannot_compute_is_said_in_words(
    made: dict[str, Any], asked: dict[str, Any], reason: str
) -> None:
    given = step(**{"dtype": BF16, **made})
    shape = {"batch": BATCH, "q_len": 1, "slots": SLOTS, "rotary_dim": None, **asked}
    found = attention_block_tkg_obstacle(given["weights"], given["rule"], **shape)
    assert found is not None
    assert found.startswith("attention_block_tkg: ")
    assert reason in found


def test_a_step_beyond_it_is_refused_when_called(install: Install) -> None:
    kernel = install(dtypes=False)
    with pytest.raises(UnsupportedError, match=r"the layer is in torch\.float64; the torch form"):
        attention_block_tkg(**step())
    assert not kernel.calls


def test_without_the_packages_one_sentence_says_what_is_missing(install: Install) -> None:
    given = step(dtype=BF16)
    with pytest.raises(DeviceError, match="nki must be importable to run an NKI kernel"):
        attention_block_tkg(**given)
    install()
    del sys.modules[nki_block.COMMON_TYPES].QuantizationType
    with pytest.raises(DeviceError, match=r"nkilib must hold .*common_types\.QuantizationType"):
        attention_block_tkg(**given)
    install()
    del sys.modules[nki.MODULES["attention_block_tkg"]].attention_block_tkg
    with pytest.raises(DeviceError, match=r"nkilib must hold .*attention_block_tkg"):
        attention_block_tkg(**given)


@pytest.mark.parametrize("lnc", [1, 2])
def test_the_simulator_runs_it_only_where_there_is_no_device(install: Install, lnc: int) -> None:
    grid = [("grid", 2)] if lnc == 2 else []
    given = step(weights={"qkv": drawn(5 * WIDTH, 256), "output": drawn(256, HEADS * WIDTH)})
    given["hidden_states"] = drawn(BATCH, 1, 256)
    kernel = install()
    attention_block_tkg(**given, logical_nc_config=lnc)
    assert kernel.route == [*grid, "simulate"]
    kernel = install(device=True)
    attention_block_tkg(**given, logical_nc_config=lnc)
    assert kernel.route == [("nki_op", nki_block.OPERATOR), "wrap_nki", *grid]


class Decode(torch.nn.Module):
    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        self.given = {n: x for n, x in given.items() if not isinstance(x, Tensor)}

    def forward(self, **tensors: Tensor) -> tuple[Tensor, ...]:
        twice = {**tensors, "hidden_states": tensors["hidden_states"] * 2}
        return tuple(attention_block_tkg(**self.given, **twice))


@pytest.mark.parametrize("device", [False, True])
def test_it_stays_one_node_when_compiled_and_when_exported(install: Install, device: bool) -> None:
    kernel = install(device)
    given = step(3, weights={"output_bias": drawn(HIDDEN)}) | angles(3, WIDTH, False)
    tensors = {n: x for n, x in given.items() if isinstance(x, Tensor)}
    decode = Decode(given)
    want = decode(**tensors)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    forget_operators()
    compiled = torch.compile(decode, backend=backend, fullgraph=True, dynamic=False)
    assert all(map(torch.equal, compiled(**tensors), want))
    before = len(kernel.calls)
    exported = torch.export.export(decode, (), tensors)
    graphs.append(exported.graph_module)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = decode(**{n: mode.from_tensor(x) for n, x in tensors.items()})
    assert len(kernel.calls) == before, "tracing calls no kernel"
    assert [(f.shape, f.dtype) for f in fakes] == [(w.shape, w.dtype) for w in want]
    again = torch.compile(decode, backend="aot_eager", fullgraph=True)(**tensors)
    assert all(map(torch.equal, again, want))
    assert all(map(torch.equal, exported.module()(**tensors), want))
    assert len(kernel.calls) == before + 2
    for graph in graphs:
        nodes = [str(node.target) for node in graph.graph.nodes if "nki" in str(node.target)]
        assert len(nodes) == 1
    schema = torch.ops.impl_nki.attention_block_tkg.default._schema
    assert not schema.is_mutable
