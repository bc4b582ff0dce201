"""What ranks are made to do in tests of the runner."""

import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional


def summed(value: torch.Tensor, operation: str = "sum") -> torch.Tensor:
    return functional.all_reduce(value, operation, dist.group.WORLD) + 0


def add(rank: int, world_size: int, payload: Any) -> float:
    return float(summed(torch.full((2,), float(rank + payload)))[0])


def report_process(rank: int, world_size: int, payload: Any) -> int:
    summed(torch.ones(1))
    return os.getpid()


def killed(rank: int, world_size: int, payload: str) -> int:
    """One rank is killed between its second and third collective; the process ids go to a file."""
    with open(payload, "a") as file:
        file.write(f"{os.getpid()}\n")
    for step in range(100):
        summed(torch.ones(1))
        if rank == 2 and step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def raising(rank: int, world_size: int, payload: Any) -> None:
    summed(torch.ones(1))
    if rank == 1:
        raise ValueError("heads must divide, got 7")
    summed(torch.ones(1))


def hanging(rank: int, world_size: int, payload: Any) -> None:
    summed(torch.ones(1))
    if rank == 3:
        time.sleep(1000)
    summed(torch.ones(1))


def other_operation(rank: int, world_size: int, payload: Any) -> None:
    summed(torch.ones(1))
    summed(torch.ones(1), "max" if rank == 2 else "sum")


def other_shape(rank: int, world_size: int, payload: Any) -> None:
    summed(torch.ones(3 if rank == 1 else 2))


def other_order(rank: int, world_size: int, payload: Any) -> None:
    calls = [torch.ones(2), torch.ones(2, dtype=torch.float64)]
    for value in reversed(calls) if rank == 0 else calls:
        summed(value)


def leaving_early(rank: int, world_size: int, payload: Any) -> None:
    for _ in range(1 if rank == 3 else 2):
        summed(torch.ones(1))


def exiting(rank: int, world_size: int, payload: Any) -> None:
    if rank == 1:
        os._exit(7)
    summed(torch.ones(1))
