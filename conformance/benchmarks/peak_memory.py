"""Peak memory of the golden at long lengths, each case in a process of its own.

`python -m conformance.benchmarks.peak_memory CASE` prints what the case took, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from golden import Attended, Causal, SlidingWindow
from golden.blockwise import attend_blockwise
from golden.row_plan import plan_rows
from golden.row_sampling import attend_rows

MB = 1e6
HEAD_DIM = 128


@dataclass(frozen=True, slots=True)
class Taken:
    """What a case took.

    Attributes:
        seconds: wall time.
        megabytes: largest resident set on the way, beyond inputs and results.
    """

    seconds: float
    megabytes: float


def measure(case: str) -> Taken:
    """Run a case of `CASES` in a fresh process and return what it took."""
    done = subprocess.run(
        [sys.executable, "-m", __name__, case], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"the memory of {case} could not be measured:\n{done.stderr}")
    return Taken(**json.loads(done.stdout))


def window(length: int) -> Callable[[], Attended]:
    """Return a window of 1024 over 8 heads of `length` float64 tokens."""
    q, k, v = (_drawn((1, 8, length, HEAD_DIM), np.float64, seed) for seed in range(3))
    positions = np.arange(length)
    return lambda: attend_blockwise(
        q,
        k,
        v,
        q_positions=positions,
        kv_positions=positions,
        mask=Causal() & SlidingWindow(1024),
    )


def rows(length: int) -> Callable[[], Attended]:
    """Return 256 rows of 8 heads over one KV head of `length` bfloat16 tokens, causal."""
    q = _drawn((1, 8, length, HEAD_DIM), ml_dtypes.bfloat16, 0)
    k, v = (_drawn((1, 1, length, HEAD_DIM), ml_dtypes.bfloat16, seed) for seed in (1, 2))
    positions = np.arange(length)
    plan = plan_rows(positions, Causal(), count=256, seed=0)
    return lambda: attend_rows(
        q, k, v, rows=plan.rows, q_positions=positions, kv_positions=positions, mask=Causal()
    )


CASES: dict[str, tuple[Callable[[int], Callable[[], Attended]], int]] = {
    "window1024-s4096": (window, 4096),
    "window1024-s65536": (window, 65536),
    "rows256-s65536": (rows, 65536),
    "rows256-s1048576": (rows, 1048576),
}
"""What to run, and at which length."""


def _drawn(shape: tuple[int, ...], dtype: Any, seed: int) -> Any:
    """Return normal numbers, drawn piece by piece so that drawing needs little memory."""
    rng, out = np.random.default_rng(seed), np.empty(shape, dtype)
    for start in range(0, shape[2], 1 << 14):
        part = out[:, :, start : start + (1 << 14)]
        part[...] = rng.standard_normal(part.shape, dtype=np.float32)
    return out


def resident(field: str) -> int:
    """Return a field of this process's status in bytes; the peak so far where there is none."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    return 0 if found is None else int(found[1]) * 1024


def _take(case: str) -> Taken:
    make, length = CASES[case]
    call = make(length)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, start = resident("VmRSS"), time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    beyond = resident("VmHWM") - before - result.output.nbytes - result.logsumexp.nbytes
    return Taken(seconds, beyond / MB)


if __name__ == "__main__":
    taken = _take(sys.argv[1])
    print(json.dumps({"seconds": taken.seconds, "megabytes": taken.megabytes}))
