"""Run a function on real ranks of this machine, from a test, a notebook or the command line.

Ranks are processes over gloo, forked by a server that starts on first use and ends with this
process. Whatever a rank does, die, hang or fall out of step, the run ends within its time limit
with every rank's state and leaves no process behind.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from conformance.parallel.rank_reports import RunReport
from conformance.parallel.rank_server import Request, receive, send

_START = 120.0
"""Seconds the server may take to load and warm up."""
_SLACK = 15.0
"""Seconds beyond a run's own limit before the server itself is given up."""


class RankServer:
    """The server, started on first use."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def run(
        self,
        function: Callable[[int, int, Any], Any],
        world_size: int,
        payload: Any = None,
        *,
        seconds: float = 20.0,
        threads: bool = False,
    ) -> RunReport:
        """Run a function on every rank.

        Args:
            function: called on each rank with rank, world size and payload; importable by name.
            world_size: ranks.
            payload: anything that can be pickled.
            seconds: time limit.
            threads: ranks are threads of one process, which start faster and allow more of them.

        Raises:
            ValueError: the function cannot be imported by name.
            RuntimeError: the server itself failed.
        """
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        request = Request(
            function.__module__,
            function.__qualname__,
            world_size,
            payload,
            seconds,
            threads,
            list(sys.path),
        )
        try:
            send(process.stdin, request)
            ready, _, _ = select.select([process.stdout], [], [], _START + seconds + _SLACK)
            answer = receive(process.stdout) if ready else None
        except (EOFError, BrokenPipeError) as error:
            self.stop()
            raise RuntimeError(f"the server of ranks is gone: {error}") from error
        if isinstance(answer, str):
            raise ValueError(f"function must be importable by its name, got {answer}")
        if not isinstance(answer, RunReport):
            self.stop()
            raise RuntimeError(f"the server of ranks did not answer within {seconds + _SLACK} s")
        return answer

    def stop(self) -> None:
        """End the server and every rank it may still have."""
        process, self._process = self._process, None
        if process is None:
            return
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "conformance.parallel.rank_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
            start_new_session=True,
        )
        return self._process


_SERVER = RankServer()
atexit.register(_SERVER.stop)
run_on_ranks = _SERVER.run
"""`RankServer.run` of the server that this process shares."""
