"""Starts ranks, watches them, and ends every one of them whatever happens.

Ranks are forked from a process that has loaded PyTorch and made a first collective, which takes
most of the time a rank would need: eight ranks start in about a second.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import init_device_mesh

from conformance.parallel.ledger import read_ledger
from conformance.parallel.rank_main import RankFunction, files_of, run_process, run_threads
from conformance.parallel.rank_reports import RankReport, RunReport, State, out_of_step

GRACE = 2.0
"""Seconds that ranks get to end by themselves once one of them has failed."""
_POLL = 0.01
_LOOK = 0.5
"""Seconds between looks at whether ranks are still in step."""


def warm_up() -> None:
    """Load what ranks need, and make a first collective."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        init_device_mesh("cpu", (1, 1), mesh_dim_names=("cp", "tp"))
        world = dist.group.WORLD
        assert world is not None
        functional.all_reduce(torch.ones(1), "sum", world).sum().item()
        dist.destroy_process_group()


def supervise(
    function: RankFunction,
    world_size: int,
    payload: Any = None,
    *,
    seconds: float = 20.0,
    threads: bool = False,
) -> RunReport:
    """Run a function on every rank.

    Args:
        function: called on each rank with rank, world size and payload.
        world_size: ranks.
        payload: what all of them get.
        seconds: after which ranks that have not finished are stopped.
        threads: ranks are threads of one process; for breadth, since they share much.

    Returns:
        Every rank's end. No process is left behind.
    """
    started = time.monotonic()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        if threads:
            arguments: tuple[Any, ...] = (function, world_size, payload, folder, seconds)
            processes: list[BaseProcess] = [context.Process(target=run_threads, args=arguments)]
        else:
            processes = [
                context.Process(
                    target=run_process,
                    args=(function, rank, world_size, payload, folder, seconds),
                )
                for rank in range(world_size)
            ]
        for process in processes:
            process.start()
        try:
            _watch(processes, folder, world_size, started + seconds)
        finally:
            codes = _end(processes)
        reports = tuple(
            _report(folder, rank, codes[0 if threads else rank]) for rank in range(world_size)
        )
    return RunReport(reports, time.monotonic() - started)


def _watch(processes: list[BaseProcess], folder: Path, world_size: int, deadline: float) -> None:
    """Return once all ranks are through, or `GRACE` after the first that failed, or late."""
    look_again = time.monotonic() + _LOOK
    while time.monotonic() < deadline:
        if time.monotonic() > look_again:
            so_far = [_report(folder, rank, None) for rank in range(world_size)]
            if out_of_step(so_far):
                return
            look_again = time.monotonic() + _LOOK
        through = failed = 0
        for rank in range(world_size):
            result, error, _ = files_of(folder, rank)
            through += result.exists()
            failed += error.exists()
        if through == world_size:
            return
        gone = sum(process.exitcode is not None for process in processes)
        if failed or (gone and through + failed < world_size):
            deadline = min(deadline, time.monotonic() + GRACE)
            if through + failed == world_size or gone == len(processes):
                return
        time.sleep(_POLL)


def _end(processes: list[BaseProcess]) -> list[int | None]:
    """Let processes that are through exit, kill the others; their exit codes, None if killed."""
    deadline = time.monotonic() + 0.5
    codes: list[int | None] = []
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        codes.append(process.exitcode)
    late = [process for process in processes if process.is_alive()]
    # all are halted before the first is killed, or it would be an error in those it talks to
    for kind in (signal.SIGSTOP, signal.SIGKILL):
        for process in late:
            assert process.pid is not None
            os.kill(process.pid, kind)
    for process in processes:
        process.join()
    return codes


def _report(folder: Path, rank: int, code: int | None) -> RankReport:
    result, error, ledger = files_of(folder, rank)
    begun, waiting = read_ledger(ledger)
    state: State
    if result.exists():
        value = pickle.loads(result.read_bytes())
        return RankReport(rank, "finished", "", begun, waiting, value)
    if error.exists():
        state, detail = "raised", error.read_text()
    elif code is None:
        state, detail = "stopped", ""
    else:
        state = "died"
        detail = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return RankReport(rank, state, detail, begun, waiting)
