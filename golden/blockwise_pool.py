"""Where the pieces of a streamed computation run: threads here, or anyone's executor."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

from golden.errors import ConfigError

Place = TypeVar("Place")
Work = TypeVar("Work")
Result = TypeVar("Result")

IN_FLIGHT_PER_WORKER = 4
"""Work items sent ahead to an executor, for each thread asked for: enough that none waits."""


def usable_threads(threads: int | None) -> int:
    """Return how many threads to use: `threads`, or one for each processor this process may use.

    Raises:
        ConfigError: `threads` is below 1.
    """
    if threads is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else _processors()
    if threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}; use None for all processors")
    return threads


def _processors() -> int:
    return os.cpu_count() or 1


def run_works(
    works: Iterator[tuple[Place, Work]],
    compute: Callable[[Work], Result],
    store: Callable[[Place, Result], None],
    *,
    threads: int | None,
    executor: Executor | None,
) -> None:
    """Compute every piece of work and store its result at its place.

    Pieces are made one by one as they are needed, so that their number costs no memory.

    Args:
        works: places and what to compute for them; places must not overlap.
        compute: a module-level function, so that it pickles; called on the worker.
        store: called here, for local threads from several of them at once.
        threads: threads to use here; with an executor, the workers to keep busy.
        executor: where to compute; None is threads of this process.
    """
    count = usable_threads(threads)
    with one_blas_thread():
        if executor is not None:
            _through(executor, works, compute, store, in_flight=IN_FLIGHT_PER_WORKER * count)
        elif count == 1:
            for place, work in works:
                store(place, compute(work))
        else:
            _in_threads(works, compute, store, count)


def _in_threads(
    works: Iterator[tuple[Place, Work]],
    compute: Callable[[Work], Result],
    store: Callable[[Place, Result], None],
    count: int,
) -> None:
    taking = threading.Lock()
    failed = threading.Event()

    def drain() -> None:
        while not failed.is_set():
            with taking:
                piece = next(works, None)
            if piece is None:
                return
            try:
                store(piece[0], compute(piece[1]))
            except BaseException:
                failed.set()
                raise

    with ThreadPoolExecutor(count - 1) as pool:
        others = [pool.submit(drain) for _ in range(count - 1)]
        drain()
        for future in others:
            future.result()


def _through(
    executor: Executor,
    works: Iterator[tuple[Place, Work]],
    compute: Callable[[Work], Result],
    store: Callable[[Place, Result], None],
    in_flight: int,
) -> None:
    pending: dict[Future[Any], Place] = {}

    def collect(done: set[Future[Any]]) -> None:
        for future in done:
            store(pending.pop(future), future.result())

    try:
        for place, work in works:
            pending[executor.submit(compute, work)] = place
            if len(pending) >= in_flight:
                collect(wait(pending, return_when=FIRST_COMPLETED).done)
        collect(wait(pending).done)
    finally:
        for future in pending:
            future.cancel()


_holding = threading.Lock()
_holders = 0
_limit: Any = None


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Hold BLAS to one thread in this process while anyone is inside.

    Threads over tiles and threads inside each matrix product would fight for the processors.
    The limit belongs to the process, so the first one in sets it and the last one out lifts it.
    """
    global _holders, _limit
    with _holding:
        if _holders == 0:
            _limit = _controller().limit(limits=1, user_api="blas")
        _holders += 1
    try:
        yield
    finally:
        with _holding:
            _holders -= 1
            if _holders == 0:
                _limit.restore_original_limits()


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()
