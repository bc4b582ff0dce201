"""Checkpoints: Hugging Face's names and fused or separate weights, into this rank's layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from impl.errors import StateDictError, explain
from impl.parallel.head_layout import Slots
from impl.parallel.layer import PhaseHeads
from impl.parallel.weights import shard_heads

if TYPE_CHECKING:
    from impl.attention import NeuronAttentionBase

_PARTS = ("q_proj", "k_proj", "v_proj")
_FUSED_NAMES = ("qkv_proj.Wqkv", "qkv_proj", "Wqkv")
_NORM_NAMES = {"q_norm": "q_layernorm", "k_norm": "k_layernorm"}
_SINK_NAMES = ("sinks", "learned_sinks.sink")


def adapt(module: NeuronAttentionBase, state: dict[str, Tensor], prefix: str) -> None:
    """Rename, reshape and shard the entries under `prefix` for `module`, in place.

    Accepted besides the module's own names: `{q,k,v}_proj.*`, fused `qkv_proj.*` or `Wqkv.*`
    (rows: q, then k, then v), `<o_proj_layer_name>.*`, `{q,k}_norm.*` and `sinks`. Under these
    names every head of the model is expected, and each rank keeps its own; the module's own
    parameters are also taken as they are.

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
    _rename(local, module.o_proj_layer_name, "o_proj.o_proj")
    if module.q_layernorm is not None:
        for theirs, ours in _NORM_NAMES.items():
            _rename(local, theirs, ours)
    _place_sinks(module, local)
    for kind in ("weight", "bias"):
        _place_qkv(module, local, kind)
        _place_output(module, local, kind)
    if module.lora is not None:  # A base checkpoint has no adapters and leaves those that are held.
        for name, value in module.lora.state_dict(prefix="lora.").items():
            local.setdefault(name, value)
    _check_shapes(module, local)
    state.update({prefix + name: value for name, value in local.items()})


def _rename(local: dict[str, Tensor], theirs: str, ours: str) -> None:
    for kind in ("weight", "bias"):
        old, new = f"{theirs}.{kind}", f"{ours}.{kind}"
        if old in local and old != new:
            if new in local:
                raise StateDictError(explain("state dict", f"name {new} once", [old, new]))
            local[new] = local.pop(old)


def _phases(module: NeuronAttentionBase) -> list[tuple[str, bool, PhaseHeads]]:
    """Prefix of a phase's projections, whether it is prefill, and this rank's heads in it."""
    parallel = module.parallel
    if parallel.shares_weights:
        return [("", True, parallel.prefill_heads)]
    return [("cte_", True, parallel.prefill_heads), ("tkg_", False, parallel.decode_heads)]


def _place_sinks(module: NeuronAttentionBase, local: dict[str, Tensor]) -> None:
    if module.learned_sinks is None:
        return
    for name in _SINK_NAMES:
        if name not in local:
            continue
        value = local.pop(name)
        whole = value.shape[0] == module.num_heads
        for _, is_prefill, heads in _phases(module):
            place = "learned_sinks.sink" if is_prefill else "tkg_learned_sinks.sink"
            local.setdefault(place, shard_heads(value, heads.query, 1) if whole else value)


def _place_qkv(module: NeuronAttentionBase, local: dict[str, Tensor], kind: str) -> None:
    """Bring q, k and v of one kind (weight or bias) into each phase's projection."""
    parts = _parts(module, local, kind)
    if not parts:
        return
    for prefix, is_prefill, heads in _phases(module):
        projection = module.get_qkv_proj(is_prefill)
        slots = (heads.query, heads.key_value, heads.key_value)
        place = f"{prefix}qkv_proj"
        pieces = {
            part: _own_heads(parts[part], of, count, rows, module.head_dim, f"{part}.{kind}")
            for part, of, count, rows in zip(
                _PARTS, slots, _head_counts(module), projection.row_counts, strict=True
            )
            if part in parts
        }
        if not projection.fused_qkv:
            local.update({f"{place}.{part}.{kind}": piece for part, piece in pieces.items()})
        elif len(pieces) < len(_PARTS):
            raise StateDictError(
                explain("state dict", f"hold q, k and v to fuse their {kind}", sorted(parts))
            )
        else:
            local[f"{place}.Wqkv.{kind}"] = torch.cat([pieces[part] for part in _PARTS])


def _parts(module: NeuronAttentionBase, local: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Take q, k and v of one kind, fused or separate, out of the checkpoint."""
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
    if not fused:
        return {part: local.pop(name) for part, name in parts.items()}
    value = local.pop(fused[0])
    whole = [heads * module.head_dim for heads in _head_counts(module)]
    own = list(module.get_qkv_proj(is_prefill_stage=True).row_counts)
    for rows in (whole, own):
        if value.shape[0] == sum(rows):
            return dict(zip(_PARTS, torch.split(value, rows), strict=True))
    raise StateDictError(
        explain(
            fused[0], f"have {sum(whole)} rows: q, k and v of {tuple(whole)}", tuple(value.shape)
        )
    )


def _head_counts(module: NeuronAttentionBase) -> tuple[int, int, int]:
    return (module.num_heads, module.num_key_value_heads, module.num_key_value_heads)


def _own_heads(
    value: Tensor, slots: Slots, heads: int, rows: int, width: int, name: str, dim: int = 0
) -> Tensor:
    """This rank's heads of a weight of all heads; a weight of its heads as it is."""
    if value.shape[dim] == heads * width:
        return value if slots == tuple(range(heads)) else shard_heads(value, slots, width, dim)
    if value.shape[dim] == rows:
        return value
    kind = "rows" if dim == 0 else "columns"
    raise StateDictError(explain(name, f"have {heads * width} {kind}", tuple(value.shape)))


def _place_output(module: NeuronAttentionBase, local: dict[str, Tensor], kind: str) -> None:
    """Bring the output projection into that of each phase."""
    value = local.pop(f"o_proj.o_proj.{kind}", None)
    if value is None:
        return
    for prefix, is_prefill, heads in _phases(module):
        piece = value
        if kind == "weight" and value.dim() == 2:
            columns = module.get_o_proj(is_prefill).o_proj.in_features
            piece = _own_heads(
                value, heads.query, module.num_heads, columns, module.head_dim, "o_proj.weight", 1
            )
        local[f"{prefix}o_proj.o_proj.{kind}"] = piece


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
