"""The Neuron SDK: is it there, is it the right one, and where does the layer run?

Nothing is imported until asked for: the package works without the SDK.
"""

from __future__ import annotations

import importlib
import platform
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from impl.errors import DeviceError, explain

PACKAGE = "torch-neuronx"
PIP_INDEX = "https://pip.repos.neuron.amazonaws.com"
SERVED_VERSIONS = ("2.13", "2.14")
_INSTALL = f"install it from AWS's own index: pip install --extra-index-url {PIP_INDEX} {PACKAGE}"


BACKENDS = {"cpu": "inductor", "cuda": "inductor", "neuron": "neuron"}
"""What `torch.compile` compiles with on each device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """Where a layer runs, and whether it is compiled: the same three calls on every device.

    ```python
    runtime = get_runtime("auto", compiled=True)
    layer = runtime.place(layer)
    output = runtime.to_host(layer(**runtime.to_device(arguments)))
    ```

    Attributes:
        device: where.
        backend: of `torch.compile`, None for eager.
    """

    device: torch.device
    backend: str | None = None

    def place(self, module: nn.Module) -> Any:
        """Put a module on the device and, unless eager, compile it.

        A compiled module is one graph of static shapes: a part that cannot be in it is an error
        at the first call, and so is never run on the host without a word.

        Args:
            module: a layer, or a model of layers; it is moved, not copied.

        Returns:
            What to call in place of the module.
        """
        module = module.to(self.device)
        if self.backend is None:
            return module
        return torch.compile(module, backend=self.backend, fullgraph=True, dynamic=False)

    def to_device(self, values: Any) -> Any:
        """Put every tensor in a nest of tuples, lists and dictionaries on the device."""
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(self.device), values)

    def to_host(self, values: Any) -> Any:
        """Bring every tensor of such a nest back, which waits until it has been computed."""
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to("cpu"), values)


def get_runtime(device: str = "auto", *, compiled: bool = False) -> Runtime:
    """Choose where to run and how.

    Args:
        device: "cpu", "cuda", "neuron", or "auto" for neuron, else cuda, else cpu.
        compiled: compile with `torch.compile`, on neuron with its backend "neuron".

    Raises:
        DeviceError: the device is not there.
    """
    found = resolve_device(device)
    return Runtime(device=found, backend=BACKENDS[found.type] if compiled else None)


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvironmentReport:
    """What a bug report should say about a machine.

    Attributes:
        python: version of Python.
        platform: operating system and processor.
        torch: version of PyTorch.
        torch_neuronx: version of the installed distribution, None if there is none.
        neuron: "available", or why the SDK cannot be used.
        devices: device types that a tensor can be put on.
        compilers: device type and the backend of `torch.compile` for it.
    """

    python: str
    platform: str
    torch: str
    torch_neuronx: str | None
    neuron: str
    devices: tuple[str, ...]
    compilers: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(
            f"{name}: {', '.join(value) if isinstance(value, tuple) else value}"
            for name, value in asdict(self).items()
        )


def installed_version() -> str | None:
    """Version of the installed `torch-neuronx` distribution; None if there is none."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return None


def require_torch_neuronx() -> ModuleType:
    """Import the Neuron SDK's PyTorch package.

    Returns:
        The module `torch_neuronx`.

    Raises:
        DeviceError: it is not installed, is the placeholder that PyPI has under this name, or is
            of a version that is not served.
    """
    version = installed_version()
    if version is None:
        raise DeviceError(explain(PACKAGE, "be installed to use the device neuron", None, _INSTALL))
    if _is_placeholder():
        raise DeviceError(
            explain(
                PACKAGE, "be AWS's own package", f"{version}, PyPI's placeholder for it", _INSTALL
            )
        )
    if not version.startswith(tuple(f"{served}." for served in SERVED_VERSIONS)):
        raise DeviceError(
            explain(
                PACKAGE,
                f"be of version {' or '.join(SERVED_VERSIONS)} (the native PyTorch backend)",
                version,
                "older ones are built on torch-xla, which is not served",
            )
        )
    try:
        return importlib.import_module("torch_neuronx")
    except ImportError as error:
        if "WRONG PACKAGE" in str(error):
            raise DeviceError(
                explain(PACKAGE, "be AWS's own package", "PyPI's placeholder for it", _INSTALL)
            ) from error
        raise DeviceError(explain(PACKAGE, "be importable", error, _INSTALL)) from error


def _is_placeholder() -> bool:
    """Whether the installed distribution says of itself that it is the wrong one."""
    return "WRONG PACKAGE" in str(metadata.metadata(PACKAGE))


def resolve_device(name: str = "auto") -> torch.device:
    """Device to run on.

    Args:
        name: "cpu", "cuda", "neuron", or "auto" for neuron, else cuda, else cpu.

    Returns:
        The device.

    Raises:
        DeviceError: it is not there.
    """
    if name == "auto":
        return torch.device(_available()[0])
    if name == "neuron":
        require_torch_neuronx()
    if name not in _available():
        raise DeviceError(explain("device", f"be one of {_available()}", name))
    return torch.device(name)


def _available() -> tuple[str, ...]:
    """Device types that can be used, the preferred one first."""
    found = []
    try:
        require_torch_neuronx()
        found.append("neuron")
    except DeviceError:
        pass  # Why is in `environment_report`.
    if torch.cuda.is_available():
        found.append("cuda")
    return (*found, "cpu")


def environment_report() -> EnvironmentReport:
    """Describe this machine."""
    neuron = "available"
    try:
        require_torch_neuronx()
    except DeviceError as error:
        neuron = str(error)
    devices = _available()
    return EnvironmentReport(
        python=sys.version.split()[0],
        platform=f"{platform.system()} {platform.machine()}",
        torch=torch.__version__,
        torch_neuronx=installed_version(),
        neuron=neuron,
        devices=devices,
        compilers=tuple(f"{device} by {BACKENDS[device]}" for device in devices),
    )
