"""The table leaves nothing out: what impl can do is what its paths together did."""

from __future__ import annotations

import inspect
from types import CodeType, FunctionType
from typing import get_args

import pytest
import torch
from forward_paths import PATHS
from path_build import build
from path_layers import LAYERS
from routes import Taken, functions

from golden.rope_config import RopeScaling
from impl import NeuronAttentionBase, attention_core
from impl.kv_cache.codec import CODE_DTYPES
from impl.kv_cache.dense import DenseCache
from impl.kv_cache.paged import PagedCache
from impl.kv_cache.plan import LayerCache
from impl.serving import FORWARD_KEYWORDS
from impl.slot_positions import SlotLayout
from impl.strategy import Implementation

ELSEWHERE = {
    "on ranks: tests/impl/parallel": {
        "flash_decoding.RowSumExchange.forward",
        "attention_layer.AttentionLayer.chunked_attention_with_context_parallel_forward",
        "flash_decoding.attend_on_group",
        "strategy._with_context_parallelism",
    },
    "backward: test_gradients.py, test_impl_kernels_flash.py, test_impl_attention_block.py": {
        "kernels.flash_function.FlashAttention.backward",
        "kernels.flash_function._KeyGradients.of",
        "kernels.flash_function._KeyGradients.zeros",
        "kernels.flash_function._stream_gradients",
    },
    "NKI, on its device or with a stand-in: test_nki_block_paths.py, test_impl_kernels_nki*.py": {
        "kernels.nki._fake",
        "kernels.nki._launch",
        "kernels.nki._register",
        "kernels.nki.attention_cte",
        "kernels.nki.load",
        "kernels.nki.register",
        "kernels.nki_arguments.attention_cte_calls",
        "kernels.nki_block._fake",
        "kernels.nki_block._launch",
        "kernels.nki_block._no_quantization",
        "kernels.nki_block._register",
        "kernels.nki_block.attention_block_tkg",
        "kernels.nki_block_arguments._gamma",
        "kernels.nki_block_arguments._line",
        "kernels.nki_block_arguments._table",
        "kernels.nki_block_arguments.attention_block_tkg_call",
        "kernels.nki_block_arguments.joint_mask",
        "kernels.nki_block_limits.attention_block_tkg_obstacle",
        "kernels.nki_block_limits.has_free_tail",
        "kernels.prefill._nki",
    },
    "eager alone, on the CPU, so in no graph: test_impl_kernels_decode.py, "
    "test_impl_kernels_updated.py, test_long_layers.py": {
        "kernels.headwise._Pieces.__init__",
        "kernels.headwise._Pieces.__iter__",
        "kernels.headwise._add_values",
        "kernels.headwise._exponentials",
        "kernels.headwise._products",
        "kernels.headwise.token_generation",
        "kernels.updated._attend",
        "kernels.updated._updated_mask",
        "kernels.updated.token_generation",
    },
    "long sequences, to the same bits: test_impl_rope.py": {
        "rotation._Turn.of_tokens",
        "rotation._in_pieces",
    },
    "the caller's, around forward: test_impl_cache.py, test_impl_output.py, test_impl_rope.py": {
        "flash_decoding.own_tokens",
        "kv_cache.manager.KVCacheManager.get_cache",
        "kv_cache.manager.KVCacheManager.update_cache",
        "output.NeuronAttentionBaseOutput.__getitem__",
        "output.NeuronAttentionBaseOutput.__iter__",
        "output.NeuronAttentionBaseOutput.__len__",
        "output.NeuronAttentionBaseOutput._unpacked",
        "rope._RotaryBase._apply",
    },
    "abstract, or only refuses": {
        "serving._refuse",
        "slot_positions.LeftPaddedSlots.slot_of",
        "slot_positions.SlotLayout.held",
        "slot_positions.SlotLayout.slot_of",
        "slot_positions.SlotLayout.slots_for",
    },
}
"""Functions that no path enters, by why not or where they are tested."""


@pytest.fixture(scope="module")
def taken() -> Taken:
    """What the paths of the table take, each run once."""
    seen = Taken()
    with torch.no_grad(), seen.recording():
        for path in PATHS.values():
            built = build(path, torch.float64)
            built.step(**built.tensors)
    return seen


def missed(taken: Taken) -> set[str]:
    """Functions of impl that were not entered."""
    return {name for code, name in functions().items() if code not in taken.codes}


def test_every_function_of_a_step_is_entered_by_some_path(taken: Taken) -> None:
    elsewhere = set().union(*ELSEWHERE.values())
    assert sorted(missed(taken) - elsewhere) == [], "no path takes these: add one that does"
    assert sorted(elsewhere - missed(taken)) == [], "listed as not taken, but a path takes it"


def test_a_function_that_no_path_enters_is_found(
    taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = compile("def planted(): ...", attention_core.__file__, "exec")
    (code,) = (part for part in source.co_consts if isinstance(part, CodeType))
    planted = FunctionType(code, {})
    before = missed(taken)
    monkeypatch.setattr(attention_core, "planted", planted, raising=False)
    assert missed(taken) - before == {"attention_core.planted"}


def test_every_kernel_is_taken_in_every_phase_that_has_it(taken: Taken) -> None:
    native, streamed, fused = Implementation.NATIVE, Implementation.FLASH, Implementation.SDPA
    # NKI runs on its device alone; the fused attention has no argument for cached keys
    eager_alone = Implementation.HEADWISE
    assert {native, streamed, fused} == set(Implementation) - {Implementation.NKI, eager_alone}
    prompts = {("prefill", each, prior) for each in (native, streamed) for prior in (False, True)}
    steps = {("decode", each, True) for each in (native, streamed)}
    assert taken.kernels == prompts | steps | {("prefill", fused, False)}


def test_every_kind_of_cache_is_taken(taken: Taken) -> None:
    caches = [cache for manager in taken.managers for cache in manager.caches]
    assert {type(cache) for cache in caches} == set(get_args(LayerCache))
    # by name: a dataclass with slots leaves the class it was made from behind
    kinds = {kind.__name__ for kind in SlotLayout.__subclasses__()}
    assert {type(cache.layout).__name__ for cache in caches} == kinds
    dense = [cache for cache in caches if isinstance(cache, DenseCache)]
    pages = [cache for cache in caches if isinstance(cache, PagedCache)]
    for options in (
        {(cache.k_transposed, cache.tiled) for cache in dense},
        {(cache.heads_first, cache.tiles > 1) for cache in pages},
    ):
        assert options == {(False, False), (True, False), (False, True)}


def test_every_stored_format_is_taken_as_it_may_be_scaled(taken: Taken) -> None:
    codecs = [codec for manager in taken.managers for codec in manager.codecs]
    scaled = {(c.stored, c.scale is not None) for c in codecs if c.stored in CODE_DTYPES}
    int8 = torch.int8
    assert {stored for stored, _ in scaled} == set(CODE_DTYPES)
    assert scaled >= {(int8, True), (torch.float8_e4m3fn, False), (torch.float8_e4m3fn, True)}
    assert {tuple(c.scale.shape) for c in codecs if c.scale is not None} == {
        (),
        (2, 1, 1),
        (2, 1, 8),
    }


def test_every_argument_of_forward_is_given(taken: Taken) -> None:
    named = set(inspect.signature(NeuronAttentionBase.forward).parameters) | FORWARD_KEYWORDS
    assert taken.arguments - {"self"} == named - {"self", "kwargs"}


def test_every_scaling_of_rope_turns_some_layer() -> None:
    turned = {type(config.rope.scaling) for config in LAYERS.values() if config.rope is not None}
    assert turned - {type(None)} == set(get_args(RopeScaling))
