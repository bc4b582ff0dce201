"""A process apart that forks ranks on request: `python -m conformance.parallel.rank_server`.

It has one thread and nothing but PyTorch loaded, so that forking it is safe; requests and reports
travel as pickles through its standard input and output.
"""

from __future__ import annotations

import importlib
import os
import pickle
import struct
import sys
from typing import IO, Any, NamedTuple

from conformance.parallel.rank_main import die_with_parent
from conformance.parallel.rank_reports import RunReport

_LENGTH = struct.Struct("<Q")


class Request(NamedTuple):
    """A run that is asked for.

    Attributes:
        module: where the function is.
        function: its name.
        world_size: ranks.
        payload: what every rank gets.
        seconds: time limit.
        threads: ranks are threads.
        path: `sys.path` of who asks, so that the module is found.
    """

    module: str
    function: str
    world_size: int
    payload: Any
    seconds: float
    threads: bool
    path: list[str]


def send(stream: IO[bytes], value: object) -> None:
    """Write one value."""
    data = pickle.dumps(value)
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """Read one value.

    Raises:
        EOFError: the other side is gone.
    """
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError("the other side has closed the stream")
    return pickle.loads(stream.read(_LENGTH.unpack(head)[0]))


def serve() -> None:
    """Answer requests until there are no more."""
    die_with_parent()
    from conformance.parallel import supervisor

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a rank prints must not mix with the answers
    supervisor.warm_up()
    while True:
        try:
            request: Request = receive(sys.stdin.buffer)
        except EOFError:
            return
        send(answers, _answer(request, supervisor))


def _answer(request: Request, supervisor: Any) -> RunReport | str:
    sys.path[:] = request.path
    try:
        function = getattr(importlib.import_module(request.module), request.function)
    except (ImportError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    report: RunReport = supervisor.supervise(
        function,
        request.world_size,
        request.payload,
        seconds=request.seconds,
        threads=request.threads,
    )
    return report


if __name__ == "__main__":
    serve()
