from typing import Any

import pytest
import torch

from impl import NeuronAttentionBaseOutput

HIDDEN, K, V, COS, SIN, RESIDUAL = (torch.full((1,), float(i)) for i in range(6))


def full_output() -> NeuronAttentionBaseOutput:
    return NeuronAttentionBaseOutput(HIDDEN, (K, V), COS, SIN, RESIDUAL)


def test_output_unpacks_into_the_four_values_of_the_old_tuple() -> None:
    attn_out, kv, cos, sin = full_output()
    assert (attn_out is HIDDEN, kv[0] is K, kv[1] is V, cos is COS, sin is SIN) == (True,) * 5


def test_output_attributes_are_the_five_documented_fields() -> None:
    output = full_output()
    assert output.hidden_states is HIDDEN
    assert output.present_key_value == (K, V)
    assert output.cos_cache is COS
    assert output.sin_cache is SIN
    assert output.residual is RESIDUAL


def test_output_caches_and_residual_default_to_none() -> None:
    output = NeuronAttentionBaseOutput(HIDDEN, (K, V))
    assert (output.cos_cache, output.sin_cache, output.residual) == (None, None, None)


@pytest.mark.parametrize(
    ("index", "expected"), [(0, HIDDEN), (2, COS), (3, SIN), (4, RESIDUAL), (-1, SIN), (-4, HIDDEN)]
)
def test_output_index_counts_fields_and_negative_index_the_old_tuple(
    index: int, expected: Any
) -> None:
    assert full_output()[index] is expected


def test_output_length_and_slices_are_those_of_the_old_tuple() -> None:
    output = full_output()
    assert len(output) == 4
    assert output[2:] == (COS, SIN)
    with pytest.raises(IndexError):
        output[5]


def test_output_is_frozen() -> None:
    with pytest.raises(AttributeError):
        full_output().hidden_states = K
