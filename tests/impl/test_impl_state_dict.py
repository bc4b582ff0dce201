from typing import Any

import pytest
import torch
from impl_layers import HEADS, HIDDEN, KV_HEADS, WIDTH, layer, tokens
from torch import nn

from impl import RMSNorm, StateDictError

Q_ROWS, KV_ROWS = HEADS * WIDTH, KV_HEADS * WIDTH


def features() -> dict[str, Any]:
    return {
        "qkv_bias": True,
        "o_bias": True,
        "learned_sinks_size": 1,
        "q_layernorm": RMSNorm(WIDTH, dtype=torch.float64),
        "k_layernorm": RMSNorm(WIDTH, dtype=torch.float64),
    }


def hugging_face(norm: str = "q_norm", output: str = "o_proj") -> dict[str, torch.Tensor]:
    """A checkpoint by Hugging Face's names."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    state = {}
    for name, rows in (("q_proj", Q_ROWS), ("k_proj", KV_ROWS), ("v_proj", KV_ROWS)):
        state[f"{name}.weight"], state[f"{name}.bias"] = draw(rows, HIDDEN), draw(rows)
    state[f"{output}.weight"], state[f"{output}.bias"] = draw(HIDDEN, Q_ROWS), draw(HIDDEN)
    state[f"{norm}.weight"], state[f"{norm.replace('q', 'k', 1)}.weight"] = draw(WIDTH), draw(WIDTH)
    state["sinks"] = draw(HEADS)
    return state


def fuse(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    rest = {k: v for k, v in state.items() if k[:2] not in ("q_", "k_", "v_") or "norm" in k}
    for kind in ("weight", "bias"):
        rest[f"{name}.{kind}"] = torch.cat([state[f"{p}_proj.{kind}"] for p in "qkv"])
    return rest


def values(made: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by role, whatever the layout."""
    own = made.state_dict()
    for kind in ("weight", "bias"):
        fused = own.pop(f"qkv_proj.Wqkv.{kind}", None)
        if fused is not None:
            pieces = fused.split((Q_ROWS, KV_ROWS, KV_ROWS))
            for part, piece in zip("qkv", pieces, strict=True):
                own[f"qkv_proj.{part}_proj.{kind}"] = piece
    return own


@pytest.mark.parametrize("fused_layer", [False, True])
@pytest.mark.parametrize("form", ["separate", "qkv_proj", "Wqkv", "own separate", "own fused"])
def test_any_checkpoint_loads_into_any_layout(fused_layer: bool, form: str) -> None:
    made = layer(run={"fused_qkv": fused_layer}, **features())
    state = hugging_face()
    source = layer(run={"fused_qkv": form == "own fused"}, seed=7, **features())
    source.load_state_dict(state)
    if form in ("qkv_proj", "Wqkv"):
        given = fuse(state, form)
    else:
        given = source.state_dict() if form.startswith("own") else state
    made.load_state_dict(given)
    got = values(made)
    for part in ("q_proj", "k_proj", "v_proj"):
        for kind in ("weight", "bias"):
            assert torch.equal(got[f"qkv_proj.{part}.{kind}"], state[f"{part}.{kind}"])
    assert torch.equal(got["o_proj.o_proj.weight"], state["o_proj.weight"])
    assert torch.equal(got["q_layernorm.weight"], state["q_norm.weight"])
    assert torch.equal(got["k_layernorm.weight"], state["k_norm.weight"])
    assert torch.equal(got["learned_sinks.sink"], state["sinks"])


def test_names_follow_the_layer_and_the_model_around_it() -> None:
    made = layer(o_proj_layer_name="dense", **features())
    whole = nn.ModuleDict({"self_attn": made})
    state = hugging_face(norm="q_layernorm", output="dense")
    whole.load_state_dict({f"self_attn.{k}": v for k, v in state.items()})
    assert torch.equal(made.o_proj.o_proj.bias, state["dense.bias"])
    assert torch.equal(made.k_layernorm.weight, state["k_layernorm.weight"])


def test_the_callers_dictionary_is_not_changed() -> None:
    state = hugging_face()
    names = list(state)
    layer(**features()).load_state_dict(state)
    assert list(state) == names


def test_own_state_dict_round_trips() -> None:
    source, target = layer(**features()), layer(seed=9, **features())
    target.load_state_dict(source.state_dict())
    hidden = tokens(3)
    assert torch.equal(source(hidden).hidden_states, target(hidden).hidden_states)


def broken(**changes: Any) -> dict[str, torch.Tensor]:
    state = hugging_face()
    for name, value in changes.items():
        key = name.replace("__", ".")
        if value is None:
            del state[key]
        else:
            state[key] = value
    return state


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"o_proj__weight": None}, "hold o_proj.o_proj.weight, got none"),
        ({"k_proj__weight": None}, "hold q"),
        ({"sinks": None}, "learned_sinks.sink"),
        ({"q_norm__weight": None}, "q_layernorm.weight"),
        ({"sinks": torch.zeros(HEADS + 1)}, r"learned_sinks.sink must have shape \(6,\)"),
        ({"v_proj__weight": torch.zeros(KV_ROWS + 8, HIDDEN)}, r"got \(24, 48\)"),
        ({"qkv_proj__weight": torch.zeros(Q_ROWS + 2 * KV_ROWS, HIDDEN)}, "fused or separate"),
        ({"gate__weight": torch.zeros(1)}, "got gate.weight"),
        ({"q_layernorm__weight": torch.zeros(WIDTH)}, "name q_layernorm.weight once"),
    ],
)
def test_unfit_checkpoints_are_refused(changes: dict[str, Any], words: str, fused: bool) -> None:
    if "k_proj__weight" in changes:
        words = "hold q, k and v to fuse" if fused else "hold qkv_proj.k_proj.weight"
    made = layer(run={"fused_qkv": fused}, **features())
    with pytest.raises(StateDictError, match=words):
        made.load_state_dict(broken(**changes))
    with pytest.raises((ValueError, RuntimeError)):
        made.load_state_dict(broken(**changes))


def test_a_fused_checkpoint_of_other_heads_is_refused() -> None:
    state = fuse(hugging_face(), "qkv_proj")
    state["qkv_proj.weight"] = state["qkv_proj.weight"][:-WIDTH]
    with pytest.raises(StateDictError, match=r"have 80 rows: q, k and v of \(48, 16, 16\)"):
        layer(**features()).load_state_dict(state)


def test_a_bias_the_layer_lacks_is_refused() -> None:
    without = {k: v for k, v in features().items() if k != "qkv_bias"}
    with pytest.raises(StateDictError, match="does the layer lack a bias"):
        layer(**without).load_state_dict(hugging_face())


def test_a_model_around_the_layer_reports_what_is_missing() -> None:
    whole = nn.ModuleDict({"self_attn": layer(**features())})
    state = {f"self_attn.{k}": v for k, v in hugging_face().items() if k != "sinks"}
    with pytest.raises(RuntimeError, match=r"Missing key.*self_attn\.learned_sinks\.sink"):
        whole.load_state_dict(state)


def test_partial_loading_leaves_the_rest_alone() -> None:
    made = layer(**features())
    before = made.o_proj.o_proj.weight.clone()
    made.load_state_dict({"sinks": torch.ones(HEADS)}, strict=False)
    assert torch.equal(made.learned_sinks.sink, torch.ones(HEADS, dtype=torch.float64))
    assert torch.equal(made.o_proj.o_proj.weight, before)
