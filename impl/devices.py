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

import torch

from impl.errors import DeviceError, explain

PACKAGE = "torch-neuronx"
PIP_INDEX = "https://pip.repos.neuron.amazonaws.com"
SERVED_VERSIONS = ("2.13", "2.14")
_INSTALL = f"install it from AWS's own index: pip install --extra-index-url {PIP_INDEX} {PACKAGE}"


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
    """

    python: str
    platform: str
    torch: str
    torch_neuronx: str | None
    neuron: str
    devices: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(f"{name}: {value}" for name, value in asdict(self).items())


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
    return EnvironmentReport(
        python=sys.version.split()[0],
        platform=f"{platform.system()} {platform.machine()}",
        torch=torch.__version__,
        torch_neuronx=installed_version(),
        neuron=neuron,
        devices=_available(),
    )
