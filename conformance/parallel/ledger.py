"""A rank writes down every collective it begins and ends, so that its fate can be told afterwards.

The ledger is a file: what a rank wrote before it was killed is still there. Collectives are seen
where PyTorch dispatches them, functional ones and those of `torch.distributed` alike.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from conformance.parallel.rank_reports import Collective

_NAMESPACES = ("_c10d_functional", "c10d")


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes a line for each collective begun, and one for each wait that is over.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._groups: dict[str, list[int]] = {}
        self._open = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation, written down if it is a collective."""
        namespace, _, operation = func.name().partition("::")
        named = namespace in _NAMESPACES
        if named and operation.startswith("_"):  # these move no data
            return func(*args, **(kwargs or {}))
        collective = named and not operation.startswith("wait_tensor")
        if collective:
            self._write(["begin", *self._described(operation, args)])
        result = func(*args, **(kwargs or {}))
        # a functional collective is over when a later operation, its wait at the latest, returns
        if self._open and not (collective and namespace == "_c10d_functional"):
            self._write(["end"])
        return result

    def _described(self, operation: str, args: Any) -> tuple[list[int], str]:
        tensors = _tensors(args)
        shape = f"{str(tensors[0].dtype)[6:]}{list(tensors[0].shape)}" if tensors else ""
        names = [a for a in args if isinstance(a, str)]
        group = names[-1] if names else ""
        if group not in self._groups:
            self._groups[group] = _members(group)
        extra = " ".join(names[:-1])
        return self._groups[group], " ".join(filter(None, (operation, extra, shape)))

    def _write(self, entry: list[Any]) -> None:
        self._open = entry[0] == "begin"
        os.write(self._file, (json.dumps(entry) + "\n").encode())


def _tensors(args: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in args:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _members(name: str) -> list[int]:
    if not name:
        return list(range(dist.get_world_size()))
    resolve: Any = vars(dist.distributed_c10d)["_resolve_process_group"]
    return list(dist.get_process_group_ranks(resolve(name)))


def read_ledger(path: Path) -> tuple[tuple[Collective, ...], bool]:
    """Read a ledger: what was begun, and whether the last was not over.

    Args:
        path: the file; missing is empty.
    """
    if not path.exists():
        return (), False
    entries = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("]")]
    begun = tuple(Collective(tuple(e[1]), e[2]) for e in entries if e[0] == "begin")
    return begun, bool(entries) and entries[-1][0] == "begin"
