"""A device named `neuron` in pure Python: counts every operator and lets none use the host.

Run as a script it takes every path through the device and prints one JSON object: per path the
operators and how often each ran, what went wrong (`host`), and whether the bits are the CPU's.
It is a process of its own because PyTorch names such a device once and for good.

Source: PyTorch's Python backends for PrivateUse1, `torch.utils.backend_registration`.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from judging import same_bits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from impl import NeuronAttentionBase
from impl.decode_strategy import DecodeStep, resolve_decode_kernel
from impl.strategy import Implementation

NAME = "neuron"


class OnDevice(Tensor):
    """A tensor of the device; its values lie in a tensor of the CPU, out of everyone's reach."""

    values: Tensor

    @staticmethod
    def __new__(cls: type, values: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=NAME,
        )
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{function} ran outside the device's mode")


class Device(TorchDispatchMode):
    """Runs operators on `OnDevice` tensors.

    Attributes:
        counts: how often each operator ran.
        host: operators that mixed in a tensor of the host, or asked for a value there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.host: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = str(function)
        self.counts[name] += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        target = torch.device(kwargs.get("device") or NAME)
        if not all(isinstance(tensor, OnDevice) for tensor in tensors) or target.type != NAME:
            self.host.append(name)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        args, kwargs = tree_map(
            lambda leaf: leaf.values if isinstance(leaf, OnDevice) else leaf, (args, kwargs)
        )
        results = function(*args, **kwargs)
        if not all(isinstance(leaf, Tensor) for leaf in tree_leaves(results)):
            self.host.append(name)
        return tree_map(lambda leaf: OnDevice(leaf) if isinstance(leaf, Tensor) else leaf, results)


@contextmanager
def kernels_of(device: str) -> Iterator[None]:
    """Let layers on the CPU take the kernels that they would take on a device."""
    choice = NeuronAttentionBase.kernel_choice

    def there(layer: Any, *arguments: Any, **named: Any) -> Any:
        return choice(layer, *arguments, **{**named, "device_type": device})

    def decode(step: DecodeStep) -> Implementation:
        return resolve_decode_kernel(replace(step, device_type=device))

    with ExitStack() as patches:
        patches.enter_context(patch.object(NeuronAttentionBase, "kernel_choice", there))
        users = [m for name, m in sys.modules.items() if name.startswith("impl.")]
        for module in users:
            if "resolve_decode_kernel" in vars(module):
                patches.enter_context(patch.object(module, "resolve_decode_kernel", decode))
        yield


def run(step: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Run a step on the device, and on the CPU with the device's kernels."""
    state = {**dict(step.named_parameters()), **dict(step.named_buffers())}
    held = {name: OnDevice(tensor.detach().clone()) for name, tensor in state.items()}
    given = {name: OnDevice(tensor.clone()) for name, tensor in tensors.items()}
    with kernels_of(NAME):
        expected = step(**tensors)  # which may write its cache
    with Device() as device:
        results = torch.func.functional_call(step, held, kwargs=given)
    return {
        "operators": dict(device.counts),
        "host": device.host,
        "devices": sorted({str(result.device) for result in results}),
        "same": all(
            same_bits(got.values, want) for got, want in zip(results, expected, strict=True)
        ),
    }


def main() -> None:
    """Run every path, and steps that use the host on purpose."""
    from forward_paths import PATHS
    from path_build import build
    from proofs import Planted

    _setup_privateuseone_for_python_backend(NAME)
    found = {}
    with torch.no_grad():
        for name, path in PATHS.items():
            built = build(path, torch.bfloat16)
            found[name] = run(built.step, built.tensors)
        planted = {
            "reads": lambda x: x * x[0].item(),
            "makes": lambda x: x + torch.ones(4),
            "returns": lambda x: x.to("cpu").to(x.device),
        }
        for name, spoil in planted.items():
            found[f"planted: {name}"] = run(Planted(spoil), {"x": torch.arange(1.0, 5.0)})
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
