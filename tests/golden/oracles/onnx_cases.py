"""The node tests of ONNX Attention and RotaryEmbedding, in float64 and in golden's terms.

onnx is imported when `load_cases` is called, so that a test module can skip itself first.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

import golden

if TYPE_CHECKING:
    import onnx

AnyArray: TypeAlias = NDArray[Any]

EXPANDED = "_expanded"
"""Suffix of a case whose operator is replaced by the graph of primitive operators it means."""


MASKED = "masked"
"""Scores after cap, bias and mask: no stage of golden, which drops hidden scores at once."""

STAGE_OF_MODE = {0: "scores", 1: "softcap", 2: MASKED, 3: "weights"}
"""What the output `qk_matmul_output` shows, by `qk_matmul_output_mode`."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One node test.

    Attributes:
        name: as onnx names it.
        operator: `Attention` or `RotaryEmbedding`.
        attributes: of the operator.
        inputs: by the operator's names, in the case's own precision; absent ones are missing.
        outputs: by the operator's names, as onnx stores them.
        rtol: relative tolerance onnx gives the stored outputs.
        atol: absolute tolerance onnx gives the stored outputs.
        model: a graph of the one operator.
        expanded: the same as a graph of primitive operators, None where onnx has none.
    """

    name: str
    operator: str
    attributes: Mapping[str, Any]
    inputs: Mapping[str, AnyArray]
    outputs: Mapping[str, AnyArray]
    rtol: float
    atol: float
    model: onnx.ModelProto
    expanded: onnx.ModelProto | None

    def float64(self, name: str) -> AnyArray:
        """Return an input, widened exactly."""
        return self.inputs[name].astype(np.float64)


@cache
def load_cases() -> dict[str, Case]:
    """Generate the node tests of the two operators, by name, without the expanded ones."""
    import onnx  # optional: see the module docstring

    folder = "onnx.backend.test.case.node"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # generating other operators' tests overflows on purpose
        for module in ("attention", "rotaryembedding"):
            importlib.import_module(f"{folder}.{module}")
        generated = {case.name: case for case in importlib.import_module(folder)._NodeTestCases}
    cases = {}
    for name, test in generated.items():
        node = test.model.graph.node[0]
        if name.endswith(EXPANDED) or node.op_type not in ("Attention", "RotaryEmbedding"):
            continue
        inputs, outputs = test.data_sets[0]
        twin = generated.get(name + EXPANDED)
        cases[name] = Case(
            name=name,
            operator=node.op_type,
            attributes={a.name: onnx.helper.get_attribute_value(a) for a in node.attribute},
            inputs=_by_name(node.input, inputs),
            outputs=_by_name(node.output, outputs),
            rtol=test.rtol,
            atol=test.atol,
            model=test.model,
            expanded=None if twin is None else twin.model,
        )
    return cases


def _by_name(names: Any, values: Any) -> dict[str, AnyArray]:
    from onnx import TensorProto, numpy_helper

    arrays = [numpy_helper.to_array(v) if isinstance(v, TensorProto) else v for v in values]
    return dict(zip([name for name in names if name], arrays, strict=True))


def evaluate_in_float64(model: onnx.ModelProto, inputs: Mapping[str, AnyArray]) -> list[AnyArray]:
    """Run a model in the reference evaluator with every floating type of it widened to double."""
    from onnx.reference import ReferenceEvaluator

    wide = {
        name: array if array.dtype.kind in "biu" else array.astype(np.float64)
        for name, array in inputs.items()
    }
    evaluator = ReferenceEvaluator(in_float64(model), new_ops=[_exact_scale(model)])
    with np.errstate(invalid="ignore"):  # expanded graphs make NaN of an empty row, then drop it
        outputs: list[AnyArray] = evaluator.run(None, wide)
    for name, output in zip((o.name for o in model.graph.output), outputs, strict=True):
        assert output.dtype == np.float64, f"{name} must come out in float64, got {output.dtype}"
    return outputs


def _exact_scale(model: onnx.ModelProto) -> Any:
    """Return the evaluator's Attention with its `scale` widened; it would root it in float32."""
    from onnx.reference.ops import load_op

    base: Any = load_op("", "Attention", model.opset_import[0].version)

    class Attention(base):  # type: ignore[misc]
        op_domain = ""

        def _run(self, *inputs: Any, scale: Any = None, **attributes: Any) -> Any:
            wide = None if scale is None else float(scale)
            return super()._run(*inputs, scale=wide, **attributes)

    return Attention


def in_float64(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a model that declares, casts to and holds double for every narrower float.

    `softmax_precision` is such a type too: float32 in the middle would hide golden's error.
    """
    import onnx

    narrow = {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.BFLOAT16,
    }
    double = onnx.TensorProto.DOUBLE
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in (*copy.graph.input, *copy.graph.output, *copy.graph.value_info):
        if value.type.tensor_type.elem_type in narrow:
            value.type.tensor_type.elem_type = double
    for node in _nodes(copy.graph):
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype", "softmax_precision") and attribute.i in narrow:
                attribute.i = double
            elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in narrow:
                array = onnx.numpy_helper.to_array(attribute.t).astype(np.float64)
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(array, attribute.t.name))
            elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                value = onnx.helper.get_attribute_value(attribute)
                tensor = onnx.numpy_helper.from_array(np.asarray(value, dtype=np.float64))
                attribute.CopyFrom(onnx.helper.make_attribute("value", tensor))
        if node.op_type == "ConstantOfShape" and not node.attribute:  # float32 zeros by default
            zero = onnx.numpy_helper.from_array(np.zeros(1))
            node.attribute.append(onnx.helper.make_attribute("value", zero))
    return copy


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph and of the branches inside it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """An Attention case in golden's terms; `AttentionCall.outputs` runs it.

    Attributes:
        q: `(batch, num_attention_heads, q_len, head_dim)`, BHSD, float64.
        k: `(batch, num_key_value_heads, kv_len, head_dim)`, this step's keys, BHSD, float64.
        v: like `k`, `value_dim` wide.
        past: keys and values already cached, BHSD, None without.
        q_positions: `(batch, q_len)`, int.
        kv_positions: `(batch, past + kv_len)`, int, -1 for padding.
        mask: True = attend.
        bias: float64, added to the capped scores by an observer, broadcastable to
            `(batch, num_attention_heads, q_len, past + kv_len)`; None for none.
        softmax_scale: None for golden's default.
        softcap: None for none.
        flat: whether the case lays q, k, v and its output out as `(batch, length, heads * dim)`.
        product_stage: what the output `qk_matmul_output` shows: one of golden's stages, `softcap`
            standing for the scores where there is no cap, or `MASKED`.
    """

    q: AnyArray
    k: AnyArray
    v: AnyArray
    past: tuple[AnyArray, AnyArray] | None
    q_positions: AnyArray
    kv_positions: AnyArray
    mask: golden.Mask
    bias: AnyArray | None
    softmax_scale: float | None
    softcap: float | None
    flat: bool
    product_stage: str

    def outputs(self) -> dict[str, AnyArray]:
        """Return golden's outputs by the names of the operator's."""
        k, v = self.k, self.v
        if self.past is not None:
            k, v = self._present(*self.past)
        capture = golden.Capture()
        last = "scores" if self.softcap is None else "softcap"

        def observe(
            stage: str, value: AnyArray, accumulation: golden.Accumulation | None = None
        ) -> AnyArray:
            seen = capture(stage, value, accumulation)
            return seen if self.bias is None or stage != last else seen + self.bias

        attended = golden.attend(
            self.q,
            k,
            v,
            q_positions=self.q_positions,
            kv_positions=self.kv_positions,
            mask=self.mask,
            softmax_scale=self.softmax_scale,
            softcap=self.softcap,
            observe=observe,
        ).output
        batch, _, q_len, _ = attended.shape
        visible = golden.attention.visible_keys(
            self.mask, self.q_positions, np.asarray(self.kv_positions)
        )
        bias = 0.0 if self.bias is None else self.bias
        seen = capture.values | {MASKED: np.where(visible, capture.values[last] + bias, -np.inf)}
        return {
            "Y": attended.swapaxes(1, 2).reshape(batch, q_len, -1) if self.flat else attended,
            "present_key": k,
            "present_value": v,
            "qk_matmul_output": seen[self.product_stage if self.product_stage in seen else last],
        }

    def _present(self, past_k: AnyArray, past_v: AnyArray) -> tuple[AnyArray, AnyArray]:
        """Return past and new keys and values as golden's cache holds them."""
        return self._cached(past_k, self.k), self._cached(past_v, self.v)

    @staticmethod
    def _cached(past: AnyArray, new: AnyArray) -> AnyArray:
        """Write to a cache of this width; golden's layers have keys and values of one width."""
        batch, heads, past_len, width = past.shape
        length = past_len + new.shape[2]
        slots = np.broadcast_to(np.arange(length), (batch, length))
        zeros = np.zeros((batch, heads, length, width))
        held = golden.ContiguousCache(zeros, zeros, np.full((batch, length), -1))
        held = held.write(past, past, slots[:, :past_len])
        return held.write(new, new, slots[:, past_len:]).k


def translate_attention(case: Case) -> AttentionCall:
    """Say an Attention case in golden's terms.

    Positions carry ONNX's alignment: key `j` is at position `j`, query `i` at `offset + i` with
    offset = cached keys, or valid keys minus queries for a padded cache, or 0 (top left). Golden
    takes positions from 0 up, so a negative offset shifts both sides alike; every mask used here
    reads differences of positions only."""
    get = case.attributes.get
    flat = case.inputs["Q"].ndim == 3
    q, k, v = (case.float64(name) for name in ("Q", "K", "V"))
    if flat:
        q, k, v = _heads(q, get("q_num_heads")), *(_heads(x, get("kv_num_heads")) for x in (k, v))
    past = None
    if "past_key" in case.inputs:
        past = case.float64("past_key"), case.float64("past_value")
    batch, _, q_len, _ = q.shape
    past_len = 0 if past is None else past[0].shape[2]
    kv_len = past_len + k.shape[2]
    valid = case.inputs.get("nonpad_kv_seqlen")
    offsets = np.full(batch, past_len) if valid is None else valid - q_len
    shift = max(0, -int(offsets.min()))
    q_positions = offsets[:, None] + np.arange(q_len) + shift
    slots = np.broadcast_to(np.arange(kv_len), (batch, kv_len))
    kv_positions = slots + shift
    if valid is not None:
        kv_positions = np.where(slots < valid[:, None], kv_positions, -1)
    left, right = get("left_window_size", -1), get("right_window_size", -1)
    mask: golden.Mask = golden.Causal() if get("is_causal", 0) else golden.Everything()
    if left >= 0:
        mask = mask & golden.SlidingWindow(left + 1)  # ONNX does not count the query's own key
    if right >= 0:
        mask = mask & golden.Explicit(slots[:, None] + shift - q_positions[..., None] <= right)
    bias = None
    if "attn_mask" in case.inputs:
        allowed, bias = _allowed_and_bias(case.inputs["attn_mask"], kv_len)
        mask = mask & golden.Explicit(allowed)
    return AttentionCall(
        q=q,
        k=k,
        v=v,
        past=past,
        q_positions=q_positions,
        kv_positions=kv_positions,
        mask=mask,
        bias=bias,
        softmax_scale=get("scale"),
        softcap=get("softcap", 0.0) or None,
        flat=flat,
        product_stage=STAGE_OF_MODE[get("qk_matmul_output_mode", 0)],
    )


def _heads(x: AnyArray, heads: int) -> AnyArray:
    """Turn `(batch, length, heads * dim)` into BHSD."""
    batch, length, width = x.shape
    return x.reshape(batch, length, heads, width // heads).transpose(0, 2, 1, 3)


def _allowed_and_bias(attn_mask: AnyArray, kv_len: int) -> tuple[AnyArray, AnyArray | None]:
    """Part a mask into the keys it admits and what it adds to their scores; a short one hides more.

    ONNX aligns axes to the right: three of them are (heads, q_len, kv_len), where golden reads
    (batch, q_len, kv_len).

    Returns:
        `(batch or 1, heads or 1, q_len, kv_len)`, bool, True = attend; and the same in float64, 0
        where hidden, or None for a mask that adds nothing.
    """
    missing = kv_len - attn_mask.shape[-1]
    padded = np.pad(
        attn_mask,
        [(0, 0)] * (attn_mask.ndim - 1) + [(0, missing)],
        constant_values=False if attn_mask.dtype == np.bool_ else -np.inf,
    )
    padded = padded.reshape((1,) * (4 - padded.ndim) + padded.shape)
    if padded.dtype == np.bool_:
        return padded, None
    allowed = ~np.isneginf(padded)
    bias = np.where(allowed, padded.astype(np.float64), 0.0)
    return allowed, bias if bias.any() else None


def rotary_output(
    case: Case, rotate: Callable[..., AnyArray] = golden.rotate
) -> dict[str, AnyArray]:
    """Return golden's output of a RotaryEmbedding case; `rotate` stands in for golden's."""
    x = case.float64("input")
    flat = x.ndim == 3
    if flat:
        x = _heads(x, case.attributes["num_heads"])
    cos, sin = case.float64("cos_cache"), case.float64("sin_cache")
    if "position_ids" in case.inputs:
        cos, sin = cos[case.inputs["position_ids"]], sin[case.inputs["position_ids"]]
    pairing = "interleaved" if case.attributes.get("interleaved", 0) else "half"
    rotated = rotate(x, cos, sin, pairing=pairing)
    if flat:
        batch, _, length, _ = rotated.shape
        rotated = rotated.transpose(0, 2, 1, 3).reshape(batch, length, -1)
    return {"output": rotated}


def golden_outputs(case: Case) -> dict[str, AnyArray]:
    """Return golden's outputs of a case."""
    if case.operator == "RotaryEmbedding":
        return rotary_output(case)
    return translate_attention(case).outputs()
