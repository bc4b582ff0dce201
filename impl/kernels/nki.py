"""The bridge to nki-library: a kernel as one operator, one node of a graph.

Nothing is imported until a kernel is asked for. With torch-neuronx the operator is registered by
`torch_neuronx.nki_op` and the kernel is wrapped by `wrap_nki`; where only `nki` and `nkilib` are
there, the same call runs in `nki.simulate`. Without them a call raises `DeviceError` that says what
is missing. No Neuron hardware and no `nki` package was used in making this: tests hold the
arguments against the kernels' documentation with stand-ins.

Bound are `attention_cte`, attention of a prefill, here, and `attention_block_tkg`, a whole decode
step, in `impl.kernels.nki_block`.

Source: Neuron documentation, "How to work with NKI kernels from torch-neuronx" and "nki.simulate";
the kernel's own is cited in `impl.kernels.nki_arguments`.
"""

import functools
import importlib
import importlib.util
import threading
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from impl.devices import require_torch_neuronx
from impl.errors import DeviceError, UnsupportedError, explain
from impl.kernels.nki_arguments import attention_cte_calls

OPERATOR = "impl_nki::attention_cte"
MODULES = {
    "attention_cte": "nkilib.core.attention.attention_cte",
    "attention_block_tkg": "nkilib.experimental.transformer.attention_block_tkg",
}
"""Where nki-library keeps each kernel that is bound."""
_REGISTERING = threading.Lock()
"""Ranks may be threads: registered twice at once, an operator takes the other's library with it."""


class Runtime(Enum):
    """Who runs NKI kernels here."""

    DEVICE = "device"
    SIMULATOR = "simulator"


def runtime() -> Runtime:
    """Say who runs NKI kernels here.

    Raises:
        DeviceError: nobody: a package is missing; the sentence says which.
    """
    for package in ("nki", "nkilib"):
        if importlib.util.find_spec(package) is None:
            raise DeviceError(
                explain(
                    package,
                    "be importable to run an NKI kernel",
                    None,
                    "it comes with the Neuron SDK; the torch forms do not need it",
                )
            )
    try:
        require_torch_neuronx()
    except DeviceError:
        return Runtime.SIMULATOR
    return Runtime.DEVICE


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def device_obstacle() -> str | None:
    """Why no NKI kernel runs on a Neuron device here, in words; None if one does."""
    try:
        found = runtime()
    except DeviceError as error:
        return str(error)
    return None if found is Runtime.DEVICE else "NKI kernels run in the simulator alone here"


def load(kernel: str, logical_nc_config: int = 1) -> Callable[..., Any]:
    """A kernel of nki-library, ready to be called with tensors.

    Args:
        kernel: its name.
        logical_nc_config: physical cores per logical core; 2 launches on a grid of two.

    Raises:
        UnsupportedError: it is not bound.
        DeviceError: it cannot be had here.
    """
    if kernel not in MODULES:
        raise UnsupportedError(
            explain("kernel", f"be one that is bound: {', '.join(MODULES)}", kernel)
        )
    where = runtime()
    try:
        found = getattr(importlib.import_module(MODULES[kernel]), kernel)
    except (ImportError, AttributeError) as error:
        raise DeviceError(explain("nkilib", f"hold {MODULES[kernel]}.{kernel}", error)) from error
    if where is Runtime.DEVICE:
        found = require_torch_neuronx().wrap_nki(found)
    if logical_nc_config > 1:
        found = found[logical_nc_config]
    if where is Runtime.SIMULATOR:
        found = importlib.import_module("nki").simulate(found)
    return found  # type: ignore[no-any-return]


def attention_cte(
    q: Tensor, k: Tensor, v: Tensor, *, logical_nc_config: int = 1, **given: Any
) -> Tensor:
    """Attention of a prefill, by nki-library's kernel.

    Args:
        q: `(batch, num_attention_heads, q_len, head_dim)`, BHSD, rotated.
        k: `(batch, num_key_value_heads, kv_len, head_dim)`, BHSD, rotated.
        v: like `k`.
        logical_nc_config: physical cores per logical core.
        **given: as `impl.kernels.nki_arguments.attention_cte_calls` takes them.

    Returns:
        Like `q`.

    Raises:
        DeviceError: the kernel cannot be had here.
        UnsupportedError: more heads, tokens or ranks than it serves.
        ShapeError: arguments that do not go together.
    """
    calls = attention_cte_calls(q, k, v, **given)
    _register()
    operator = torch.ops.impl_nki.attention_cte
    heads = [operator(*call, logical_nc_config) for call in calls]
    return torch.cat(heads).view(q.shape) if len(heads) > 1 else heads[0].view(q.shape)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prior: Tensor | None,
    v_prior: Tensor | None,
    prior_used_len: Tensor | None,
    sink: Tensor | None,
    cp_offset: Tensor | None,
    scale: float,
    causal_mask: bool,
    sliding_window: int,
    global_cp_deg: int,
    cp_strided_q_slicing: bool,
    logical_nc_config: int,
) -> Tensor:
    """The operator: an `AttentionCTECall` in its fields' order, and the grid."""
    return load("attention_cte", logical_nc_config)(  # type: ignore[no-any-return]
        q=q,
        k=k,
        v=v,
        scale=scale,
        causal_mask=causal_mask,
        k_prior=k_prior,
        v_prior=v_prior,
        prior_used_len=prior_used_len,
        sink=sink,
        sliding_window=sliding_window or None,
        tp_q=True,
        tp_k=True,
        tp_out=False,
        cp_offset=cp_offset,
        global_cp_deg=global_cp_deg or None,
        cp_strided_q_slicing=cp_strided_q_slicing,
    )


def _fake(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _register() -> None:
    """Register the operator, once; outside the graph when a compiler traces the caller."""
    register(OPERATOR, _launch, _fake)


def register(name: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register `launch`, which changes no argument, as an operator; `fake` is it without values.

    Raises:
        DeviceError: no NKI kernel runs here.
    """
    with _REGISTERING:
        _operator(runtime(), name, launch, fake)


@functools.cache
def _operator(
    where: Runtime, name: str, launch: Callable[..., Any], fake: Callable[..., Any]
) -> Any:
    decorator: Callable[..., Any] = torch.library.custom_op
    if where is Runtime.DEVICE:
        decorator = require_torch_neuronx().nki_op
    operator = decorator(name, mutates_args=())(launch)
    operator.register_fake(fake)
    return operator
