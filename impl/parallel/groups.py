"""Process groups of a run, by stage: who reduces with whom.

`init_process_group` starts `torch.distributed` with the backend of a device and takes ranks and
addresses from the environment that `torchrun` sets, on one host or several. `process_groups` then
makes the groups of a configuration once per process; every rank must come to it in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from impl.errors import ConfigError, DeviceError, explain
from impl.neuron_config import NeuronConfig
from impl.parallel.meshes import StageMesh, stage_mesh

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "neuron": "neuron"}
"""Backend of `torch.distributed` for each type of device."""


@dataclass(frozen=True, slots=True)
class Group:
    """A process group as collectives name it.

    Attributes:
        name: its name in `torch.distributed`; empty for a rank alone.
        size: ranks in it.
        rank: this rank's place in it, in the order of the mesh.
        numbers: number of the rank at each place in its process group, which orders ranks by their
            global number; empty where that is the mesh's order. It is not where Trn2's wiring
            makes a column of 64 ranks, such as 12, 8, 28, 24.
    """

    name: Any = ""
    size: int = 1
    rank: int = 0
    numbers: tuple[int, ...] = ()


ALONE = Group()


@dataclass(frozen=True, slots=True)
class Stage:
    """Groups of this rank in one stage.

    Attributes:
        tp: ranks that share heads.
        split: ranks that share a sequence (prefill, CP) or a batch (decode, DP).
    """

    tp: Group = ALONE
    split: Group = ALONE


@dataclass(frozen=True, slots=True)
class ProcessGroups:
    """Groups of this rank in both stages.

    Attributes:
        prefill: context encoding.
        decode: token generation.
        world: all ranks.
    """

    prefill: Stage = Stage()
    decode: Stage = Stage()
    world: Group = ALONE

    @property
    def rank(self) -> int:
        """This rank among all."""
        return self.world.rank


_MADE: WeakKeyDictionary[Any, dict[tuple[object, ...], ProcessGroups]] = WeakKeyDictionary()
_CORES: WeakKeyDictionary[Any, dict[int, Group]] = WeakKeyDictionary()


def init_process_group(
    device: torch.device | str = "cpu", *, timeout: timedelta = timedelta(minutes=5)
) -> None:
    """Join the run that the environment describes.

    Reads `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`, as `torchrun` sets them.

    Args:
        device: where tensors live; its type chooses the backend: gloo, nccl or neuron.
        timeout: after which a collective that a rank does not join fails.

    Raises:
        DeviceError: no backend for this device.
    """
    kind = torch.device(device).type
    if kind not in BACKENDS:
        raise DeviceError(explain("device", f"be one of {tuple(BACKENDS)}", kind))
    dist.init_process_group(BACKENDS[kind], timeout=timeout)


def process_groups(run: NeuronConfig) -> ProcessGroups:
    """Groups for a configuration, made on first use.

    Args:
        run: its degrees; `tp_degree` must be the world size of `torch.distributed`.

    Returns:
        This rank's groups; one rank alone needs no `torch.distributed`.

    Raises:
        ConfigError: `torch.distributed` has not started, or with another number of ranks.
    """
    if run.tp_degree == 1:
        return ProcessGroups()
    started = dist.is_available() and dist.is_initialized()
    if not started or dist.get_world_size() != run.tp_degree:
        raise ConfigError(
            explain(
                "tp_degree",
                "be the number of ranks of torch.distributed",
                f"{run.tp_degree} and {dist.get_world_size() if started else 'none started'}",
                "call impl.parallel.init_process_group() in each process of torchrun",
            )
        )
    made = _MADE.setdefault(dist.group.WORLD, {})
    key = (run.tp_degree, run.cp_degree, run.attention_dp_degree, run.switch_cc)
    if key not in made:
        before, after = (
            stage_mesh(run.tp_degree, degree, switch_cc=run.switch_cc) for degree in key[1:3]
        )
        made[key] = _make(before, after, dist.get_rank())
    return made[key]


def core_group(run: NeuronConfig, cores: int) -> Group:
    """Ranks that keep one KV head's tokens together (flash decoding), made on first use.

    Args:
        run: its `tp_degree` is the world size of `torch.distributed`.
        cores: neighbouring ranks of a group; divides `tp_degree`.

    Returns:
        This rank's group, in which rank `r` is core `r % cores`.
    """
    if cores == 1:
        return ALONE
    rank = process_groups(run).rank
    made = _CORES.setdefault(dist.group.WORLD, {})
    if cores not in made:
        ranks = torch.arange(run.tp_degree).view(-1, cores)
        mesh = DeviceMesh(_device_type(), ranks, mesh_dim_names=("group", "core"))
        first = rank - rank % cores
        made[cores] = _group(mesh, "core", range(first, first + cores), rank % cores)
    return made[cores]


def _make(before: StageMesh, after: StageMesh, rank: int) -> ProcessGroups:
    prefill = _stage(before, "cp", rank)
    decode = prefill if before == after else _stage(after, "dp", rank)
    everyone = dist.group.WORLD
    assert everyone is not None
    world = Group(everyone.group_name, before.world_size, rank)
    return ProcessGroups(prefill, decode, world)


def _stage(mesh: StageMesh, split: str, rank: int) -> Stage:
    made = DeviceMesh(_device_type(), torch.tensor(mesh.rows), mesh_dim_names=(split, "tp"))
    row, column = mesh.coordinates(rank)
    return Stage(
        tp=_group(made, "tp", mesh.rows[row], column),
        split=_group(made, split, mesh.columns[column], row),
    )


def _device_type() -> str:
    return {backend: kind for kind, backend in BACKENDS.items()}.get(dist.get_backend(), "cpu")


def _group(mesh: DeviceMesh, name: str, ranks: Sequence[int], rank: int) -> Group:
    if len(ranks) == 1:
        return ALONE
    by_number = sorted(ranks)
    numbers = () if by_number == list(ranks) else tuple(map(by_number.index, ranks))
    return Group(mesh.get_group(name).group_name, len(ranks), rank, numbers)
