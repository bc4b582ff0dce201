"""Peak memory of `impl`'s streamed prefill, each length in a process of its own.

`python -m conformance.benchmarks.impl_memory LENGTH` prints the megabytes that one prefill of a
layer with sinks and a softcap, which no kernel but the streamed one can express, takes beyond its
weights.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import torch

from conformance.benchmarks.impl_contenders import prefill_layer
from conformance.benchmarks.peak_memory import MB, resident


def measure(length: int) -> float:
    """Run a prefill of `length` tokens in a fresh process; megabytes beyond the weights.

    Every block of a mebibyte and more is given back as it is freed. By default glibc keeps those of
    up to 32 in a heap with holes between them, which took 640 to 1,010 MB where 571 are needed.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, "-m", __name__, str(length)]
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=settings)
    if done.returncode != 0:
        raise RuntimeError(f"the memory of length {length} could not be measured:\n{done.stderr}")
    return float(done.stdout)


@torch.no_grad()
def take(length: int) -> float:
    """Run it here: largest resident set on the way, beyond what was resident before."""
    features = {"learned_sinks_size": 1, "attn_logit_softcapping": 30.0}
    prefill_layer(torch.float32, 64, **features)()  # what is loaded once is no need
    call = prefill_layer(torch.float32, length, **features)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    call()
    return (resident("VmHWM") - before) / MB


if __name__ == "__main__":
    print(take(int(sys.argv[1])))
