"""Adapters by batch row against weights they were merged into."""

from typing import Any

import pytest
import torch
from impl_layers import (
    HEADS,
    HIDDEN,
    KV_HEADS,
    ROUNDOFF,
    WIDTH,
    layer,
    positions,
    relative_error,
    tokens,
)
from torch import Tensor

from impl import (
    ConfigError,
    LoraServingConfig,
    NeuronAttentionBase,
    RotaryEmbedding,
    ShapeError,
    StateDictError,
)

DOUBLE = torch.float64
SIZES = {
    "q_proj": (HIDDEN, HEADS * WIDTH),
    "k_proj": (HIDDEN, KV_HEADS * WIDTH),
    "v_proj": (HIDDEN, KV_HEADS * WIDTH),
    "o_proj": (HEADS * WIDTH, HIDDEN),
}
LAYER = "base_model.model.layers.0."
CONFIG = LoraServingConfig(max_loras=3, max_lora_rank=4)


def adapter(rank: int, seed: int, targets: tuple[str, ...] = tuple(SIZES)) -> dict[str, Tensor]:
    """An adapter as PEFT writes it."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name in targets:
        width, out = SIZES[name]
        for letter, shape in (("A", (rank, width)), ("B", (out, rank))):
            values = torch.randn(shape, generator=generator, dtype=DOUBLE)
            state[f"{LAYER}self_attn.{name}.lora_{letter}.weight"] = values
    return state


def merged(base: dict[str, Tensor], state: dict[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """Weights of a layer with separate projections, the adapter added to them."""
    result = dict(base)
    for name in SIZES:
        own = "o_proj.o_proj.weight" if name == "o_proj" else f"qkv_proj.{name}.weight"
        stem = f"{LAYER}self_attn.{name}.lora_"
        if f"{stem}A.weight" in state:
            term = state[f"{stem}B.weight"] @ state[f"{stem}A.weight"]
            result[own] = base[own] + scaling * term
    return result


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases, clip": {"qkv_bias": True, "o_bias": True, "clip_qkv": 2.0},
    "window, sink": {"sliding_window": 3, "learned_sinks_size": 1},
}


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_each_row_is_that_of_its_adapter_merged_into_the_weights(
    features: dict[str, Any], fused: bool, phase: str
) -> None:
    features = {"rotary_emb": RotaryEmbedding(WIDTH), **features}
    made = layer(run={"lora_config": CONFIG, "fused_qkv": fused}, **features)
    plain = layer(**features)
    base = {name: value.clone() for name, value in plain.state_dict().items()}
    made.load_state_dict(base)
    states = [adapter(4, 1), adapter(2, 2), adapter(3, 3, ("q_proj", "v_proj"))]
    for index, state in enumerate(states):
        made.lora.load_adapter(index, state, lora_alpha=3.0)
    ids = torch.tensor([1, -1, 0, 2, 0])
    hidden, at = tokens(6, batch=5), positions(6, batch=5)
    call: dict[str, Any] = {"attention_mask": at >= 0}
    if phase == "decode":
        cache = tuple(torch.randn(5, KV_HEADS, 9, WIDTH, dtype=DOUBLE) for _ in range(2))
        hidden, at, call = hidden[:, :1], at[:, 5:], {"past_key_value": cache}
    got = made(hidden, position_ids=at, adapter_ids=ids, **call)
    for row, index in enumerate(ids.tolist()):
        weights = base
        if index >= 0:
            rank = (4, 2, 3)[index]
            weights = merged(base, states[index], 3.0 / rank)
        plain.load_state_dict(weights)
        one = slice(row, row + 1)
        alone = {
            name: tuple(t[one] for t in value) if isinstance(value, tuple) else value[one]
            for name, value in call.items()
        }
        expected = plain(hidden[one], position_ids=at[one], **alone)
        assert relative_error(got.hidden_states[one], expected.hidden_states) <= ROUNDOFF
        for new, want in zip(got.present_key_value, expected.present_key_value, strict=True):
            assert relative_error(new[one], want) <= ROUNDOFF


def loaded(rank: int = 4, alpha: float = 2.0, **options: Any) -> NeuronAttentionBase:
    made = layer(run={"lora_config": CONFIG})
    for module in made.lora.values():
        module.lora_A.zero_()
        module.lora_B.zero_()
    made.lora.load_adapter(0, adapter(rank, 1), lora_alpha=alpha, **options)
    return made


def test_no_ids_and_negative_ids_are_the_base_layer() -> None:
    made = loaded()
    expected = made(tokens(4)).hidden_states
    none = torch.tensor([-1, -5])
    assert torch.equal(made(tokens(4), adapter_ids=none).hidden_states, expected)
    zeros = torch.tensor([0, 1])
    got = made(tokens(4), adapter_ids=zeros).hidden_states
    assert torch.equal(got[1], expected[1])  # Nothing was loaded there.
    assert relative_error(got[0], expected[0]) > 0.01


def test_a_later_adapter_replaces_the_whole_of_an_earlier_one() -> None:
    made = loaded()
    made.lora.load_adapter(0, adapter(2, 5, ("q_proj",)), lora_alpha=2.0)
    fresh = layer(run={"lora_config": CONFIG})
    for module in fresh.lora.values():
        module.lora_A.zero_()
        module.lora_B.zero_()
    fresh.lora.load_adapter(0, adapter(2, 5, ("q_proj",)), lora_alpha=2.0)
    ids = torch.tensor([0, 0])
    expected = fresh(tokens(4), adapter_ids=ids).hidden_states
    assert torch.equal(made(tokens(4), adapter_ids=ids).hidden_states, expected)


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 0.5), (True, 1.0)])
def test_alpha_is_divided_by_the_rank_or_by_its_root(rslora: bool, scaling: float) -> None:
    made = loaded(alpha=2.0, use_rslora=rslora)
    assert {float(m.scaling[0]) for m in made.lora.values()} == {scaling}


def test_only_the_layers_own_entries_are_read() -> None:
    state = adapter(2, 1)
    other = {name.replace("layers.0", "layers.1"): 9 * value for name, value in state.items()}
    made = loaded()
    made.lora.load_adapter(
        0, {**state, **other}, lora_alpha=2.0, prefix="base_model.model.layers.0."
    )
    expected = loaded(rank=2)
    ids = torch.tensor([0, 0])
    got = made(tokens(4), adapter_ids=ids).hidden_states
    assert torch.equal(got, expected(tokens(4), adapter_ids=ids).hidden_states)


def test_adapters_survive_a_base_checkpoint_and_their_own_round_trip() -> None:
    made = loaded()
    ids = torch.tensor([0, 0])
    expected = made(tokens(4), adapter_ids=ids).hidden_states
    base = {n: p for n, p in made.state_dict().items() if not n.startswith("lora.")}
    made.load_state_dict(base)
    assert torch.equal(made(tokens(4), adapter_ids=ids).hidden_states, expected)
    again = layer(run={"lora_config": CONFIG}, seed=9)
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(tokens(4), adapter_ids=ids).hidden_states, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_term_is_rounded_once_with_the_projection(dtype: torch.dtype) -> None:
    made = layer(dtype, run={"lora_config": CONFIG})
    x = tokens(3, dtype=dtype)
    module = made.lora["q_proj"]
    product = made.qkv_proj.q_proj(x)
    term = module(x, torch.tensor([0, 0]))
    assert term.dtype is torch.float32
    got = made.lora.add(x, torch.tensor([0, 0]), "q_proj", product, is_prefill_stage=True)
    assert torch.equal(got, (product.float() + term).to(dtype))


@pytest.mark.parametrize(
    ("state", "index", "error", "words"),
    [
        (adapter(2, 1), 3, ConfigError, r"index must be in 0\.\.2, got 3"),
        ({}, 0, StateDictError, "name projections among"),
        ({"mlp.up_proj.lora_A.weight": torch.zeros(2, 2)}, 0, StateDictError, "up_proj"),
        (
            {"q_proj.lora_A.weight": torch.zeros(2, HIDDEN)},
            0,
            StateDictError,
            "hold lora_A and lora_B",
        ),
        (adapter(5, 1), 0, StateDictError, "rank at most 4"),
        (
            {
                "q_proj.lora_A.default.weight": torch.zeros(2, HIDDEN),
                "q_proj.lora_B.default.weight": torch.zeros(HIDDEN, 3),
            },
            0,
            StateDictError,
            "have shapes",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    state: dict[str, Tensor], index: int, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        loaded().lora.load_adapter(index, state, lora_alpha=1.0)


@pytest.mark.parametrize(
    "ids", [torch.zeros(3, dtype=torch.int64), torch.zeros(2), torch.zeros(())]
)
def test_ids_are_one_integer_per_row(ids: Tensor) -> None:
    with pytest.raises(ShapeError, match="one per batch row"):
        loaded()(tokens(4), adapter_ids=ids)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_loras": 0}, "max_loras"),
        ({"max_lora_rank": -1}, "max_lora_rank"),
        ({"target_modules": ("up_proj",)}, "target_modules"),
        ({"target_modules": ()}, "target_modules"),
    ],
)
def test_unusable_settings_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LoraServingConfig(**fields)
