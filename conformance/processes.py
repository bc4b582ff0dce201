"""Maps a function over items in worker processes, one thread each, with a progress bar."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

Item = TypeVar("Item")
Result = TypeVar("Result")

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def in_processes(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    jobs: int,
    title: str,
    console: Console,
) -> Iterator[Result]:
    """Yield results as they come, in any order.

    Args:
        function: importable by name, since it travels to other processes.
        items: what to call it on, the costly ones first if the end should be even.
        jobs: processes; 1 runs everything in this one.
        title: shown before the bar.
        console: where the bar goes.
    """
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(title, total=len(items))
        if jobs == 1:
            for item in items:
                yield function(item)
                progress.advance(task)
            return
        for name in _THREADS:
            os.environ.setdefault(name, "1")  # workers read it when they load NumPy and torch
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            try:
                for future in as_completed([pool.submit(function, item) for item in items]):
                    yield future.result()
                    progress.advance(task)
            finally:
                pool.shutdown(cancel_futures=True)  # when interrupted, do not work off the rest
