"""`attn-conformance bench golden`: streamed attention against its peers, in float64.

Peers are torch's `scaled_dot_product_attention`, ONNX's reference evaluator (extra `oracles`) and
`golden.attend`, the plain NumPy definition; the ceiling is the rate of the machine's own matrix
product, measured in the same run. A share of that rate counts only the lower half of the scores
as useful work. Contenders take turns, and a ratio is that of one turn.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from conformance.benchmarks.figures import Figure, figure, ratios, table, take_turns, write_json
from conformance.benchmarks.peak_memory import measure
from conformance.terminal import console
from golden import Causal, SlidingWindow, attend
from golden.blockwise import attend_blockwise
from golden.blockwise_pool import usable_threads
from golden.stages import Array

HEADS = 4
HEAD_DIM = 128
SQUARE = 2048
"""Side of the matrices whose product gives the machine's rate."""

TORCH_TARGETS = {512: 0.6, 2048: 1.05, 4096: 1.05, 8192: 1.05}
DGEMM_TARGETS = {4096: 0.6, 8192: 0.6}
ONNX_TARGETS = {2048: 6.0}
SECONDS_TARGETS = {"rows256-s1048576": 90.0}
MEMORY_TARGETS = {"window1024-s65536": 300.0, "rows256-s1048576": 500.0}
LONGEST_DENSE = 2048
"""Beyond this, definitions that hold all scores at once take too long and too much memory."""

Tick = Callable[[], None]


def run(json_path: Path | None, quick: bool) -> None:
    """Measure everything, print a table, and write JSON if asked to.

    Args:
        json_path: where to write the figures; None writes nothing.
        quick: shorter lengths and fewer turns: shows that it works, not how fast it is.
    """
    output = console()
    lengths = (512, 1024) if quick else (512, 1024, 2048, 4096, 8192)
    windows = (2048, 4096) if quick else (32768, 65536)
    memory = ("window1024-s4096", "rows256-s65536") if quick else tuple(MEMORY_TARGETS)
    rounds = {length: 3 if quick else 15 if length <= 1024 else 5 for length in lengths}
    figures: list[Figure] = []
    with Progress(console=output, transient=True) as progress:
        for length in lengths:
            task = progress.add_task(f"causal {length}")
            figures += causal(length, rounds[length], _ticker(progress, task))
            progress.remove_task(task)
        task = progress.add_task("window 1024")
        figures += windowed(windows, 3, _ticker(progress, task))
        progress.remove_task(task)
        task = progress.add_task("memory", total=len(memory))
        for case in memory:
            figures += memory_of(case)
            progress.advance(task)
    output.print(table("golden, streamed, float64", figures))
    if json_path is not None:
        write_json(json_path, figures)
        output.print(f"wrote {json_path}")


def causal(length: int, rounds: int, tick: Callable[[int], Tick]) -> list[Figure]:
    """Return the figures of causal attention over `length` tokens, 4 heads of 128 channels."""
    q, k, v = _drawn(HEADS, length)
    positions = np.arange(length)
    arguments: dict[str, Any] = {
        "q_positions": positions,
        "kv_positions": positions,
        "mask": Causal(),
    }
    square = np.random.default_rng(0).standard_normal((SQUARE, SQUARE))
    product = np.empty_like(square)
    query, key, value = (torch.from_numpy(x) for x in (q, k, v))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    contenders: dict[str, Callable[[], object]] = {
        "streamed": lambda: attend_blockwise(q, k, v, **arguments),
        "torch-float64": lambda: sdpa(query, key, value, is_causal=True),
        "dgemm": lambda: np.matmul(square, square, out=product),
    }
    if length <= LONGEST_DENSE:
        contenders["definition"] = lambda: attend(q, k, v, **arguments)
        if importlib.util.find_spec("onnx") is not None:
            contenders["onnx-reference"] = onnx_reference(q, k, v)
    before = torch.get_num_threads()
    torch.set_num_threads(usable_threads(None))
    try:
        took = take_turns(contenders, rounds=rounds, tick=tick(rounds * len(contenders)))
    finally:
        torch.set_num_threads(before)
    return _causal_figures(length, took)


def _causal_figures(length: int, took: dict[str, list[float]]) -> list[Figure]:
    ours, at = took["streamed"], f"golden/causal/s{length}"
    useful = 4 * HEAD_DIM * HEADS * length**2 / 2
    rates = [2 * SQUARE**3 / seconds for seconds in took["dgemm"]]
    share = [useful / seconds / rate for seconds, rate in zip(ours, rates, strict=True)]
    figures = [
        figure(f"{at}/seconds", ours, "seconds"),
        figure(
            f"{at}/torch-float64",
            ratios(ours, took["torch-float64"]),
            "ratio",
            "lower",
            TORCH_TARGETS.get(length),
        ),
        figure(f"{at}/torch-float64-seconds", took["torch-float64"], "seconds"),
        figure(f"{at}/dgemm-share", share, "share", "higher", DGEMM_TARGETS.get(length)),
        figure(f"{at}/dgemm-rate", [rate / 1e9 for rate in rates], "Gflop/s"),
    ]
    for peer in ("definition", "onnx-reference"):
        if peer in took:
            target = ONNX_TARGETS.get(length) if peer == "onnx-reference" else None
            faster = ratios(took[peer], ours)
            figures.append(figure(f"{at}/faster-than-{peer}", faster, "ratio", "higher", target))
    return figures


def windowed(lengths: tuple[int, int], rounds: int, tick: Callable[[int], Tick]) -> list[Figure]:
    """Return how time grows from one length to twice that under a window of 1024."""
    short, long = lengths

    def contender(length: int) -> Callable[[], object]:
        q, k, v = _drawn(HEADS, length)
        mask, positions = Causal() & SlidingWindow(1024), np.arange(length)
        return lambda: attend_blockwise(
            q, k, v, q_positions=positions, kv_positions=positions, mask=mask
        )

    contenders = {"short": contender(short), "long": contender(long)}
    took = take_turns(contenders, rounds=rounds, tick=tick(2 * rounds))
    return [
        figure(
            f"golden/window1024/s{long}/over-s{short}",
            ratios(took["long"], took["short"]),
            "ratio",
            "lower",
            2.2,
        ),
        figure(f"golden/window1024/s{long}/seconds", took["long"], "seconds"),
    ]


def memory_of(case: str) -> list[Figure]:
    """Return time and memory beyond inputs and results of a case of `peak_memory`."""
    taken = measure(case)
    name = "golden/" + case.replace("-", "/")
    seconds = SECONDS_TARGETS.get(case)
    return [
        figure(f"{name}/seconds-alone", [taken.seconds], "seconds", "lower", seconds),
        figure(f"{name}/memory-beyond", [taken.megabytes], "MB", "lower", MEMORY_TARGETS.get(case)),
    ]


def onnx_reference(q: Array, k: Array, v: Array) -> Callable[[], object]:
    """Return ONNX's reference evaluation of its Attention operator, causal, in float64."""
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    def tensor(name: str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.DOUBLE, q.shape)

    node = helper.make_node("Attention", ["q", "k", "v"], ["o"], is_causal=1)
    graph = helper.make_graph([node], "causal", [tensor(x) for x in "qkv"], [tensor("o")])
    opset = helper.make_opsetid("", 23)
    evaluator = ReferenceEvaluator(helper.make_model(graph, opset_imports=[opset]))
    return lambda: evaluator.run(None, {"q": q, "k": k, "v": v})


def _drawn(heads: int, length: int) -> list[Array]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, heads, length, HEAD_DIM)) for _ in range(3)]


def _ticker(progress: Progress, task: Any) -> Callable[[int], Tick]:
    def start(total: int) -> Tick:
        progress.update(task, total=total)
        return lambda: progress.advance(task)

    return start


if __name__ == "__main__":
    run(None, quick=True)
