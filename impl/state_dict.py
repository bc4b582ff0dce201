"""Checkpoints: Hugging Face's names and fused or separate weights, into this layer's layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from impl.errors import StateDictError, explain

if TYPE_CHECKING:
    from impl.attention import NeuronAttentionBase

_PARTS = ("q_proj", "k_proj", "v_proj")
_FUSED_NAMES = ("qkv_proj.Wqkv", "qkv_proj", "Wqkv")
_NORM_NAMES = {"q_norm": "q_layernorm", "k_norm": "k_layernorm"}
_SINK_NAMES = ("sinks", "learned_sinks.sink")


def adapt(module: NeuronAttentionBase, state: dict[str, Tensor], prefix: str) -> None:
    """Rename and reshape the entries under `prefix` for `module`, in place.

    Accepted besides the module's own names: `{q,k,v}_proj.*`, fused `qkv_proj.*` or `Wqkv.*`
    (rows: q, then k, then v), `<o_proj_layer_name>.*`, `{q,k}_norm.*` and `sinks`.

    Args:
        module: the layer to load into.
        state: the state dict of the whole model.
        prefix: where the layer's entries are, "" or ending in a dot.

    Raises:
        StateDictError: both fused and separate weights, a part of q, k and v to fuse, or a wrong
            shape.
    """
    found = {key[len(prefix) :]: key for key in state if key.startswith(prefix)}
    local = {name: state.pop(key) for name, key in found.items()}
    _rename(local, _output_name(module), "o_proj.o_proj")
    if module.q_layernorm is not None:
        for theirs, ours in _NORM_NAMES.items():
            _rename(local, theirs, ours)
    _place_sinks(module, local)
    for kind in ("weight", "bias"):
        _place_qkv(module, local, kind)
    _check_shapes(module, local)
    state.update({prefix + name: value for name, value in local.items()})


def _output_name(module: NeuronAttentionBase) -> str:
    return module.o_proj.layer_name


def _rename(local: dict[str, Tensor], theirs: str, ours: str) -> None:
    for kind in ("weight", "bias"):
        old, new = f"{theirs}.{kind}", f"{ours}.{kind}"
        if old in local and old != new:
            if new in local:
                raise StateDictError(explain("state dict", f"name {new} once", [old, new]))
            local[new] = local.pop(old)


def _place_sinks(module: NeuronAttentionBase, local: dict[str, Tensor]) -> None:
    if module.learned_sinks is None:
        return
    for name in _SINK_NAMES:
        if name in local:
            value = local.pop(name)
            local["learned_sinks.sink"] = value
            if module.tkg_learned_sinks is not None:
                local.setdefault("tkg_learned_sinks.sink", value)


def _place_qkv(module: NeuronAttentionBase, local: dict[str, Tensor], kind: str) -> None:
    """Bring q, k and v of one kind (weight or bias) into the module's fused or separate form."""
    rows = module.qkv_proj.row_counts
    fused = [f"{name}.{kind}" for name in _FUSED_NAMES if f"{name}.{kind}" in local]
    parts = {}
    for part in _PARTS:
        names = [n for n in (f"qkv_proj.{part}.{kind}", f"{part}.{kind}") if n in local]
        if len(names) > 1:
            raise StateDictError(explain("state dict", f"name {part}.{kind} once", names))
        if names:
            parts[part] = names[0]
    if len(fused) > 1 or (fused and parts):
        raise StateDictError(
            explain("state dict", "hold q, k and v fused or separate", fused + list(parts.values()))
        )
    if fused and not module.qkv_proj.fused_qkv:
        value = local.pop(fused[0])
        if value.shape[0] != sum(rows):
            raise StateDictError(
                explain(
                    fused[0], f"have {sum(rows)} rows: q, k and v of {rows}", tuple(value.shape)
                )
            )
        for part, piece in zip(_PARTS, torch.split(value, list(rows)), strict=True):
            local[f"qkv_proj.{part}.{kind}"] = piece
    elif fused:
        local[f"qkv_proj.Wqkv.{kind}"] = local.pop(fused[0])
    elif parts and module.qkv_proj.fused_qkv:
        missing = [p for p in _PARTS if p not in parts]
        if missing:
            raise StateDictError(
                explain("state dict", f"hold q, k and v to fuse their {kind}", sorted(parts))
            )
        pieces = [local.pop(parts[part]) for part in _PARTS]
        for part, piece, count in zip(_PARTS, pieces, rows, strict=True):
            if piece.shape[0] != count:
                raise StateDictError(
                    explain(f"{part}.{kind}", f"have {count} rows", tuple(piece.shape))
                )
        local[f"qkv_proj.Wqkv.{kind}"] = torch.cat(pieces)
    else:
        for part, name in parts.items():
            local[f"qkv_proj.{part}.{kind}"] = local.pop(name)


def _check_shapes(module: NeuronAttentionBase, local: dict[str, Tensor]) -> None:
    for name, own in module.state_dict().items():
        value = local.get(name)
        if value is not None and value.shape != own.shape:
            raise StateDictError(
                explain(name, f"have shape {tuple(own.shape)}", tuple(value.shape), "other heads?")
            )


def check_keys(missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Refuse an incomplete or overfull checkpoint.

    Args:
        missing: parameters that were not in it.
        unexpected: entries that no parameter took.

    Raises:
        StateDictError: there are any.
    """
    if missing:
        raise StateDictError(
            explain("state dict", f"hold {', '.join(missing)}", "none", "or pass strict=False")
        )
    if unexpected:
        raise StateDictError(
            explain(
                "state dict",
                "hold only what the layer has",
                ", ".join(unexpected),
                "does the layer lack a bias, norm or sink of the checkpoint?",
            )
        )
