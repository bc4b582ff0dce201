"""What of impl the paths take: functions, kernels, caches and arguments."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from types import CodeType, FrameType
from typing import Any
from unittest.mock import patch

import impl
from impl import KVCacheManager, NeuronAttentionBase

BEFORE = ("impl.config", "impl.devices", "impl.errors", "impl.neuron_config", "impl.state_dict")
"""Modules that have done their part before forward, or have none in it."""
RANKS = "impl.parallel"
"""What ranks do among themselves, which tests/impl/parallel proves on real ones."""


def functions() -> dict[CodeType, str]:
    """Every function, method and property of impl that a step may run, by its code."""
    found: dict[CodeType, str] = {}
    for module in pkgutil.walk_packages(impl.__path__, "impl."):
        if module.name in BEFORE or module.name.startswith(RANKS):
            continue
        here = importlib.import_module(module.name)
        owners = [here, *(c for c in vars(here).values() if inspect.isclass(c))]
        for owner in owners:
            if owner is not here and owner.__module__ != module.name:
                continue
            for value in vars(owner).values():
                plain = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
                if isinstance(value, cached_property):
                    plain = value.func
                code = getattr(plain, "__code__", None)
                if code is not None and code.co_filename == here.__file__:
                    found[code] = f"{module.name.removeprefix('impl.')}.{plain.__qualname__}"
    return found


@dataclass(slots=True)
class Taken:
    """What was taken while `recording`.

    Attributes:
        codes: functions that were entered.
        kernels: phase, implementation, and whether there were cached keys.
        managers: cache managers that were made.
        arguments: names of what forward was given.
    """

    codes: set[CodeType] = field(default_factory=set, repr=False)
    kernels: set[tuple[str, impl.strategy.Implementation, bool]] = field(default_factory=set)
    managers: list[KVCacheManager] = field(default_factory=list)
    arguments: set[str] = field(default_factory=set)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what runs inside."""
        core = importlib.import_module("impl.attention_core")
        prefill, decode, made = core.prefill, core.decode, KVCacheManager.__init__
        forward = NeuronAttentionBase.forward

        def entered(frame: FrameType, event: str, _argument: Any) -> None:
            if event == "call":
                self.codes.add(frame.f_code)

        def prefilled(*tensors: Any, **named: Any) -> Any:
            self.kernels.add(("prefill", named["implementation"], named.get("prior") is not None))
            return prefill(*tensors, **named)

        def decoded(*tensors: Any, **named: Any) -> Any:
            self.kernels.add(("decode", named["implementation"], True))
            return decode(*tensors, **named)

        def make(manager: KVCacheManager, *given: Any, **named: Any) -> None:
            made(manager, *given, **named)
            self.managers.append(manager)

        def forwarded(layer: NeuronAttentionBase, *given: Any, **named: Any) -> Any:
            bound = inspect.signature(forward).bind(layer, *given, **named).arguments
            bound |= bound.pop("kwargs", {})
            self.arguments |= {name for name, value in bound.items() if value is not None}
            return forward(layer, *given, **named)

        with ExitStack() as patches:
            patches.enter_context(patch("impl.attention_core.prefill", prefilled))
            patches.enter_context(patch("impl.attention_core.decode", decoded))
            patches.enter_context(patch.object(KVCacheManager, "__init__", make))
            patches.enter_context(patch.object(NeuronAttentionBase, "forward", forwarded))
            before = sys.getprofile()
            sys.setprofile(entered)
            patches.callback(sys.setprofile, before)
            yield
