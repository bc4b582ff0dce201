"""Stand-ins of the packages that NKI kernels come with, for kernels that are stand-ins too."""

from __future__ import annotations

import gc
import importlib.machinery
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from impl import devices
from impl.kernels import nki, nki_block

UNQUANTISED = object()
"""The stand-in of `QuantizationType.NONE`."""


class Recorder:
    """What the packages see of a kernel: its calls, and the way it was reached."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.route: list[Any] = []

    def __getitem__(self, grid: int) -> Recorder:
        self.route.append(("grid", grid))
        return self


def forget_operators() -> None:
    """Unregister the operators that a test used, before the next ones are registered.

    At once: an operator's end also takes the one of its name that was registered since, and left to
    the garbage collector it comes in the midst of a later trace.
    """
    nki._operator.cache_clear()
    torch.compiler.reset()
    gc.collect()


def module(name: str, **content: Any) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
    made.__dict__.update(content)
    return made


def install_packages(
    monkeypatch: pytest.MonkeyPatch, name: str, kernel: Recorder, *, device: bool = False
) -> None:
    """Put stand-ins of `nki` and `nkilib` where imports look, and of `torch_neuronx` if asked."""

    def simulate(given: Recorder) -> Recorder:
        given.route.append("simulate")
        return given

    def wrap_nki(given: Recorder) -> Recorder:
        given.route.append("wrap_nki")
        return given

    def nki_op(operator: str, mutates_args: Any = ()) -> Any:
        assert mutates_args == ()
        kernel.route.append(("nki_op", operator))
        return torch.library.custom_op(operator, mutates_args=mutates_args)

    for made in (
        module("nki", simulate=simulate),
        module("nkilib"),
        module(nki.MODULES[name], **{name: kernel}),
        module(nki_block.COMMON_TYPES, QuantizationType=SimpleNamespace(NONE=UNQUANTISED)),
    ):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    if device:
        monkeypatch.setattr(devices, "installed_version", lambda: "2.14.0")
        monkeypatch.setattr(devices.metadata, "metadata", lambda _name: "")
        sdk = module("torch_neuronx", nki_op=nki_op, wrap_nki=wrap_nki)
        monkeypatch.setitem(sys.modules, "torch_neuronx", sdk)
