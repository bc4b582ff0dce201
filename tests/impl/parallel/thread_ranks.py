"""Ranks as threads of this process, for tests of `impl.parallel`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg as threaded

SECONDS = 60


def on_ranks(world_size: int, function: Callable[[int], Any]) -> list[Any]:
    """Call `function(rank)` on every rank and return the results, by rank."""
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    threaded._install_threaded_pg()
    store = dist.HashStore()
    results: dict[int, Any] = {}
    errors: dict[int, BaseException] = {}

    def run(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world_size, store=store)
            with torch.no_grad():
                results[rank] = function(rank)
            dist.barrier()
            dist.destroy_process_group()
        except BaseException as error:
            errors[rank] = error
            threaded.ProcessLocalGroup.exception_handle(error)

    ranks = [threading.Thread(target=run, args=(r,), daemon=True) for r in range(world_size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(SECONDS)
    threaded.ProcessLocalGroup.reset()
    threaded._uninstall_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(False)
    causes = [error for error in errors.values() if not isinstance(error, SystemExit)]
    if causes:
        raise causes[0]
    assert len(results) == world_size, "a rank hangs"
    return [results[rank] for rank in range(world_size)]
