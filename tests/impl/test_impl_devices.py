import sys
import types
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from impl import DeviceError, devices


@pytest.fixture
def sdk(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that a distribution of some version is installed, with a module or without."""

    def install(version: str, description: str = "", module: ModuleType | None = None) -> None:
        monkeypatch.setattr(devices, "installed_version", lambda: version)
        monkeypatch.setattr(devices.metadata, "metadata", lambda _name: description)
        monkeypatch.setitem(sys.modules, "torch_neuronx", module)

    return install


def test_an_absent_sdk_is_named_with_the_index_to_install_from(sdk: Callable[..., None]) -> None:
    sdk(None)
    with pytest.raises(DeviceError, match=r"be installed .*pip\.repos\.neuron\.amazonaws\.com"):
        devices.require_torch_neuronx()


def test_the_placeholder_of_pypi_is_recognised(sdk: Callable[..., None]) -> None:
    sdk("1.0", "Version: 1.0\n\nWRONG PACKAGE. Please install the package from Neuron Repository")
    with pytest.raises(DeviceError, match="PyPI's placeholder"):
        devices.require_torch_neuronx()


@pytest.mark.parametrize("version", ["2.9.0.2.15.32035", "2.8.0", "2.15.1"])
def test_other_versions_are_refused_by_name(sdk: Callable[..., None], version: str) -> None:
    sdk(version)
    with pytest.raises(DeviceError, match=r"2\.13 or 2\.14 .*torch-xla"):
        devices.require_torch_neuronx()


@pytest.mark.parametrize("version", ["2.13.3.0.1", "2.14.3.0.7"])
def test_the_native_backend_is_served(sdk: Callable[..., None], version: str) -> None:
    module = types.ModuleType("torch_neuronx")
    sdk(version, module=module)
    assert devices.require_torch_neuronx() is module
    assert devices.environment_report().neuron == "available"
    assert devices.environment_report().devices[0] == "neuron"


def test_a_module_that_does_not_import_is_reported(sdk: Callable[..., None]) -> None:
    sdk("2.13.3.0.1", module=None)
    with pytest.raises(DeviceError, match="be importable"):
        devices.require_torch_neuronx()


def test_report_names_versions_and_the_reason(sdk: Callable[..., None]) -> None:
    sdk(None)
    report = devices.environment_report()
    assert report.torch == torch.__version__
    assert report.torch_neuronx is None
    assert "be installed" in report.neuron
    assert report.devices[-1] == "cpu"
    assert f"torch: {torch.__version__}" in str(report)


def test_a_device_that_is_not_there_is_refused(sdk: Callable[..., None]) -> None:
    sdk(None)
    assert devices.resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(DeviceError, match="be installed"):
        devices.resolve_device("neuron")
    with pytest.raises(DeviceError, match="device must be one of"):
        devices.resolve_device("tpu")


def test_importing_the_package_does_not_import_thesdk() -> None:
    assert "torch_neuronx" not in sys.modules
