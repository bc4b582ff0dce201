import sys
import types
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from impl_layers import (
    KV_HEADS,
    ROUNDOFF,
    WIDTH,
    layer,
    positions,
    relative_error,
    tokens,
)

from impl import DeviceError, RotaryEmbedding, devices


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


@pytest.mark.parametrize(
    ("compiled", "backend"), [(False, None), (True, "inductor")], ids=["eager", "compiled"]
)
def test_a_runtime_names_device_and_backend(compiled: bool, backend: str | None) -> None:
    runtime = devices.get_runtime("cpu", compiled=compiled)
    assert (runtime.device, runtime.backend) == (torch.device("cpu"), backend)


def test_neuron_compiles_with_its_own_backend(
    sdk: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sdk("2.14.3.0.7", module=types.ModuleType("torch_neuronx"))
    # only the SDK gives a device this name; PyTorch's own for such devices stands in
    device = torch.device("privateuseone")
    named = types.SimpleNamespace(type="neuron", made_by=device)
    monkeypatch.setattr(devices.torch, "device", lambda name: {"neuron": named}[name])
    runtime = devices.get_runtime("neuron", compiled=True)
    assert (runtime.device, runtime.backend) == (named, "neuron")
    assert "neuron by neuron" in devices.environment_report().compilers


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_runtime_runs_a_layer_and_brings_the_result_home(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    made = layer(rotary_emb=RotaryEmbedding(WIDTH), learned_sinks_size=1, sliding_window=3)
    past = tuple(torch.ones(2, KV_HEADS, 8, WIDTH, dtype=torch.float64) for _ in range(2))
    call = {
        "hidden_states": tokens(1),
        "position_ids": positions(1, 5),
        "past_key_value": past,
    }
    expected = made(**call).hidden_states
    runtime = devices.get_runtime(device)
    placed = runtime.place(made)
    given = runtime.to_device(call)
    assert given["past_key_value"][0].device.type == device
    got = runtime.to_host(placed(**given).hidden_states)
    assert got.device.type == "cpu"
    assert relative_error(got, expected) <= ROUNDOFF


def test_a_compiled_runtime_makes_one_graph_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Leaving(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            print(x.shape)
            return x + 1

    monkeypatch.setitem(devices.BACKENDS, "cpu", "eager")
    runtime = devices.get_runtime("cpu", compiled=True)
    torch._dynamo.reset()
    assert torch.equal(runtime.place(torch.nn.Identity())(torch.ones(2)), torch.ones(2))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        runtime.place(Leaving())(torch.ones(2))


def test_importing_the_package_does_not_import_thesdk() -> None:
    assert "torch_neuronx" not in sys.modules
