"""What can go wrong with an error model: each a property with a correct subject and a wrong one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import variants
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import golden
from conformance import runner
from conformance.case_ids import parse
from conformance.error_model import MANY_RUNS, Outputs, predict_scale
from conformance.expected import reference
from conformance.inputs import CoreInputs, draw_core
from conformance.judge import Judgement, judge_outputs
from conformance.precision import profile_named
from conformance.subjects import CoreCall, LayerCall, LayerOutput, Subject
from conformance.subjects.impl import attention_layer
from conformance.variants import dense, sequential, streamed
from conformance.variants.judged import JudgedCase
from golden import FORMATS, Array, Observer, unobserved

Kernel = Callable[[CoreCall], Tensor]

sampled = settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),  # a seed does not get simpler by shrinking
)
seeds = st.integers(0, 10**6)
halves = st.sampled_from(["bf16", "fp16"])
dtypes = st.sampled_from(["fp32", "bf16", "fp16"])


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def prepared(
    case_id: str, change: Callable[[CoreInputs], CoreInputs] = lambda inputs: inputs
) -> JudgedCase:
    """Set a case up, on changed inputs; they must stay exact in its dtype."""
    case = parse(case_id)
    inputs = change(draw_core(case))
    return JudgedCase(case, inputs, reference(case, inputs))


def judged(one: JudgedCase, kernel: Kernel, profile: str) -> Judgement:
    return one.judge(kernel(one.call()).double().numpy(), profile)


def scaled(kernel: Kernel, factor: float) -> Kernel:
    return lambda call: kernel(replace(call, softmax_scale=call.softmax_scale * factor))


@sampled
@given(seed=seeds, dtype=halves, profile=st.sampled_from(["eager", "native", "flash", "sdpa"]))
def test_more_exact_than_claimed_conforms_and_a_wrong_scale_in_it_does_not(
    seed: int, dtype: str, profile: str
) -> None:
    one = prepared(f"core-h128-hq4-hkv2-d32/cte-{dtype}-b1-q61-gaussian-seed{seed}")
    right = judged(one, dense.float64_inside, profile)
    assert right.conforms, right.reason
    # twice what is found in half of all draws: T is then twice its limit, which is 5 deviations
    # and more, and half the limit is left for chance
    factor = 1 + 2 * right.power["softmax scale [%]"] / 100
    assert not judged(one, scaled(dense.float64_inside, factor), profile).conforms


@sampled
@given(
    seed=seeds,
    dtype=halves,
    profile=st.sampled_from(["eager", "native", "flash"]),
    index=st.tuples(st.integers(0, 1), st.integers(0, 3), st.integers(0, 20), st.integers(0, 15)),
)
def test_a_row_with_one_visible_key_is_that_value_to_the_bit(
    seed: int, dtype: str, profile: str, index: tuple[int, int, int, int]
) -> None:
    kernel = streamed.flash(16) if profile == "flash" else variants.native_kernel
    name = "core-h64-hq4-hkv4-d16-window1/cte-{}-b2-q21-gaussian-seed{}"
    # sums of float32 are predicted to err even where one term is not zero
    assert judged(prepared(name.format("fp32", seed)), kernel, profile).conforms
    one = prepared(name.format(dtype, seed))
    assert judged(one, kernel, profile).conforms

    def one_ulp_off(call: CoreCall) -> Tensor:
        output = kernel(call).clone()
        output[index] = torch.nextafter(output[index], torch.tensor(math.inf, dtype=output.dtype))
        return output

    wrong = judged(one, one_ulp_off, profile)
    assert not wrong.conforms
    assert f"exact rows 1 at {list(index[:3])} exceeds its limit 0" in wrong.reason
    assert wrong.worst is not None
    assert wrong.worst.index == index
    assert math.isinf(wrong.worst.z)


def masked_judgement(blind: set[int], seed: int, change: Callable[[Array], Array]) -> Judgement:
    """Judge outputs of attention in which some rows see no key at all."""
    rng = np.random.default_rng(seed)
    form = FORMATS["bfloat16"]
    q, k, v = (form.nearest(rng.standard_normal((1, 2, 12, 16))) for _ in range(3))
    allowed = np.tril(np.ones((12, 12), dtype=np.bool_))
    allowed[sorted(blind)] = False
    positions = np.arange(12)

    def evaluate(observe: Observer = unobserved) -> Outputs:
        attended = golden.attend(
            q,
            k,
            v,
            q_positions=positions,
            kv_positions=positions,
            mask=golden.Explicit(allowed),
            observe=observe,
        )
        return {"output": attended.output}

    profile = profile_named("native", "bfloat16")
    expected, rows = evaluate(), {"output": np.ones((1, 2, 12), dtype=np.bool_)}
    scales = predict_scale(evaluate, expected, rows, profile, seed=seed, runs=MANY_RUNS)
    observed = {"output": change(form.nearest(expected["output"]))}
    return judge_outputs(observed, expected, rows, scales)


@sampled
@given(
    seed=seeds,
    blind=st.sets(st.integers(0, 11), min_size=1, max_size=11),
    leak=st.floats(1e-300, 1.0),
    data=st.data(),
)
def test_a_fully_masked_row_is_zero_and_no_leak_is_too_small(
    seed: int, blind: set[int], leak: float, data: st.DataObject
) -> None:
    assert masked_judgement(blind, seed, lambda output: output).conforms
    row = data.draw(st.sampled_from(sorted(blind)))

    def leaking(output: Array) -> Array:
        output[0, 1, row, 5] = leak
        return output

    wrong = masked_judgement(blind, seed, leaking)
    assert not wrong.conforms
    assert f"exact rows 1 at [0, 1, {row}]" in wrong.reason


@sampled
@given(seed=seeds, dtype=dtypes, logit=st.sampled_from([8.0, 11.0, 14.0]))
def test_a_sink_that_takes_nearly_everything_leaves_something_to_judge(
    seed: int, dtype: str, logit: float
) -> None:
    # at 14 a row's output is some 1e-5 of its values: below float16's normal numbers
    one = prepared(
        f"core-h128-hq4-hkv2-d32-sinks/cte-{dtype}-b1-q33-gaussian-seed{seed}",
        lambda inputs: replace(inputs, sinks=np.full(4, logit)),
    )
    claims: tuple[tuple[Kernel, str], ...] = (
        (dense.eager, "eager"),
        (variants.native_kernel, "native"),
        (streamed.flash(16), "flash"),
        (streamed.split_keys(2), "flash"),
    )
    for right, profile in claims:
        found = judged(one, right, profile)
        assert found.conforms, found.reason

    def weaker(call: CoreCall) -> Tensor:
        assert call.sinks is not None
        return dense.float32_inside(replace(call, sinks=call.sinks - 0.5))

    def dropped(call: CoreCall) -> Tensor:
        return dense.float32_inside(replace(call, sinks=None))

    for wrong in (weaker, dropped, lambda call: torch.zeros_like(call.q)):
        assert not judged(one, wrong, "flash").conforms


@sampled
@given(seed=seeds, logit=st.sampled_from([14.0, 15.0]))
def test_subnormal_outputs_are_judged_and_flushing_them_is_caught(seed: int, logit: float) -> None:
    one = prepared(
        f"core-h128-hq4-hkv2-d32-sinks/cte-fp16-b1-q33-gaussian-seed{seed}",
        lambda inputs: replace(inputs, sinks=np.full(4, logit)),
    )
    output = streamed.flash(32)(one.call()).double().numpy()
    tiny = (np.abs(output) < 2.0**-14) & (output != 0)
    assert tiny.mean() > 0.5
    assert one.judge(output, "flash").conforms
    assert not one.judge(np.where(tiny, 0.0, output), "flash").conforms


def layer_verdict(case_id: str, function: Callable[[LayerCall], LayerOutput]) -> str:
    subject = Subject(name="layer", function=function, scope="layer", profile="native")
    record = runner.judge_case(parse(case_id), subject)
    return f"{record.verdict} {record.reason}".strip()


@sampled
@given(
    seed=seeds,
    dtype=halves,
    index=st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 8), st.integers(0, 15)),
)
def test_exactly_representable_outputs_are_exact_and_one_ulp_is_caught(
    seed: int, dtype: str, index: tuple[int, int, int, int]
) -> None:
    case_id = f"h64-hq4-hkv2-d16/cte-{dtype}-b2-q9-integers-seed{seed}"
    assert layer_verdict(case_id, attention_layer) == "CONFORMS"

    def off(call: LayerCall) -> LayerOutput:
        result = attention_layer(call)
        k_cache = result.k_cache.clone()
        away = torch.tensor(math.inf, dtype=k_cache.dtype)
        k_cache[index] = torch.nextafter(k_cache[index], away)
        return replace(result, k_cache=k_cache)

    wrong = layer_verdict(case_id, off)
    assert wrong.startswith(f"DEVIATES k_cache: exact rows 1 at {list(index[:3])}")


@sampled
@given(seed=seeds, regime=st.sampled_from(["peaked", "large"]))
def test_a_rounded_query_that_moves_a_whole_row_conforms_and_coarser_ones_do_not(
    seed: int, regime: str
) -> None:
    # every element of a row errs alike where its query's rounding decides which key it reads
    case_id = f"h64-hq4-hkv2-d16/cte-bf16-b1-q33-{regime}-seed{seed}"
    assert layer_verdict(case_id, attention_layer) == "CONFORMS"

    def coarse(call: LayerCall) -> LayerOutput:
        q_proj = call.weights["q_proj"]
        narrow = q_proj.to(torch.float8_e4m3fn).to(q_proj.dtype)
        return attention_layer(replace(call, weights={**call.weights, "q_proj": narrow}))

    assert layer_verdict(case_id, coarse).startswith("DEVIATES")


def bfloat16_sums(call: CoreCall) -> Tensor:
    """Float32 attention that adds up tiles of 16 keys in bfloat16."""
    scores = dense.masked_scores(call, torch.float32)
    weights = dense.normalised(scores, dense.sink_logits(call, torch.float32))
    v = dense.per_query_head(call.v, call.q)
    output = torch.zeros_like(call.q)
    for start in range(0, scores.shape[-1], 16):
        tile = slice(start, start + 16)
        output = (output + weights[..., tile] @ v[:, :, tile]).bfloat16().float()
    return output


def tf32_reads(call: CoreCall) -> Tensor:
    """Float32 attention whose products read TensorFloat-32."""

    def read(x: Tensor) -> Tensor:
        return torch.from_numpy(FORMATS["tensorfloat32"].nearest(x.double().numpy())).to(x.dtype)

    return dense.float32_inside(replace(call, q=read(call.q), k=read(call.k), v=read(call.v)))


@sampled
@given(seed=seeds, regime=st.sampled_from(["gaussian", "peaked", "outlier"]))
def test_float32_sums_as_claimed_conform_and_narrower_ones_do_not(seed: int, regime: str) -> None:
    one = prepared(f"core-h64-hq2-hkv1-d32/cte-fp32-b1-q49-{regime}-seed{seed}")
    for right in (sequential.sequential, dense.float32_inside, streamed.flash(16)):
        found = judged(one, right, "flash")
        assert found.conforms, found.reason
    for wrong in (bfloat16_sums, tf32_reads):
        assert not judged(one, wrong, "flash").conforms


def rounded_scores(call: CoreCall) -> Tensor:
    """Store scores in the tensors' dtype, softmax in float32."""
    scores = dense.masked_scores(call, torch.float32).to(call.q.dtype).float()
    weights = dense.normalised(scores, dense.sink_logits(call, torch.float32)).to(call.q.dtype)
    return weights @ dense.per_query_head(call.v, call.q)


@sampled
@given(seed=seeds, dtype=halves, q_len=st.integers(64, 110))
def test_scores_stored_narrow_conform_where_claimed_and_not_where_float32_is(
    seed: int, dtype: str, q_len: int
) -> None:
    one = prepared(f"core-h128-hq4-hkv2-d32/cte-{dtype}-b1-q{q_len}-peaked-seed{seed}")
    found = judged(one, rounded_scores, "eager")
    assert found.conforms, found.reason
    assert not judged(one, rounded_scores, "native").conforms
