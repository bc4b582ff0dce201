"""What a rank does: join the group, call a function, leave the result in a file."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, HashStore, Store
from torch.testing._internal.distributed import multi_threaded_pg

from conformance.parallel.ledger import Ledger

RankFunction = Callable[[int, int, Any], Any]
"""Called with rank, world size and payload."""

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent is gone; without effect off Linux."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def files_of(folder: Path, rank: int) -> tuple[Path, Path, Path]:
    """Result, error and ledger of a rank."""
    return folder / f"{rank}.result", folder / f"{rank}.error", folder / f"{rank}.ledger"


def run_process(
    function: RankFunction, rank: int, world_size: int, payload: Any, folder: Path, seconds: float
) -> None:
    """Be one rank of processes over gloo."""
    die_with_parent()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    # whoever started the ranks stops them; PyTorch's own limit is only there to be out of the way
    beyond = timedelta(seconds=2 * seconds + 60)
    store = FileStore(str(folder / "store"), world_size)
    store.set_timeout(beyond)

    def join() -> None:
        dist.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=beyond,
        )

    if _call(join, function, rank, world_size, payload, folder):
        _meet(store, world_size, seconds)
    os._exit(0)  # no destructor of a group may wait for a rank that is gone


def run_threads(
    function: RankFunction, world_size: int, payload: Any, folder: Path, seconds: float
) -> None:
    """Be all ranks, one a thread of this process."""
    die_with_parent()
    torch.set_num_threads(1)
    isolate: Any = vars(torch._C._distributed_c10d)["_set_thread_isolation_mode"]
    isolate(True)
    install: Any = multi_threaded_pg._install_threaded_pg
    install()
    store = HashStore()

    def be(rank: int) -> None:
        def join() -> None:
            dist.init_process_group("threaded", rank=rank, world_size=world_size, store=store)

        _call(join, function, rank, world_size, payload, folder)

    threads = [threading.Thread(target=be, args=(r,), daemon=True) for r in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    os._exit(0)


def _call(
    join: Callable[[], None],
    function: RankFunction,
    rank: int,
    world_size: int,
    payload: Any,
    folder: Path,
) -> bool:
    result, error, ledger = files_of(folder, rank)
    try:
        join()
        with torch.no_grad(), Ledger(ledger):
            returned = function(rank, world_size, payload)
        _put(result, pickle.dumps(returned))
    except BaseException as failure:
        text = traceback.format_exception_only(type(failure), failure)[-1].strip()
        _put(error, text.encode())
        return False
    return True


def _put(path: Path, data: bytes) -> None:
    """Write a file that appears whole."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_bytes(data)
    part.rename(path)


def _meet(store: Store, world_size: int, seconds: float) -> None:
    """Stay until every rank is through: a closed connection would fail those still talking."""
    deadline = time.monotonic() + seconds
    there = store.add("through", 1)
    while there < world_size and time.monotonic() < deadline:
        time.sleep(0.005)
        there = store.add("through", 0)
