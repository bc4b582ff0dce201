"""nki-library's `attention_block_tkg`, a whole decode step, as one operator.

`attention_block_tkg` here takes what `impl.kernels.token_generation_block` takes and gives what it
gives, up to rounding. The operator changes none of its arguments: the kernel is asked for the
step's keys and values and not to write them, see `impl.kernels.nki_block_arguments`.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from impl.errors import DeviceError, UnsupportedError, explain
from impl.kernels.nki import load, register
from impl.kernels.nki_block_arguments import BlockCall, attention_block_tkg_call, joint_mask
from impl.kernels.nki_block_limits import attention_block_tkg_obstacle
from impl.kernels.token_generation_block import BlockOutput, BlockRule, BlockWeights

OPERATOR = "impl_nki::attention_block_tkg"
COMMON_TYPES = "nkilib.core.utils.common_types"
"""Where nki-library keeps `QuantizationType`."""


def attention_block_tkg(
    hidden_states: Tensor,
    weights: BlockWeights,
    rule: BlockRule,
    *,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    prior_mask: Tensor,
    active_mask: Tensor,
    logical_nc_config: int = 1,
) -> BlockOutput:
    """Compute a decode step by nki-library's kernel.

    Args:
        hidden_states: as `impl.kernels.token_generation_block` takes it, like the rest.
        weights: see there.
        rule: see there; its `implementation` is not read.
        cos: see there.
        sin: see there.
        k_cache: see there. Not changed.
        v_cache: see there. Not changed.
        prior_mask: see there. Not changed.
        active_mask: see there; always given. Not changed.
        logical_nc_config: physical cores per logical core.

    Returns:
        Hidden states, and the step's keys and values, `(batch, 1, q_len, head_dim)`. A token that
        sees no key gets the projection of zeros, as in the torch form; a row whose mask wants one
        of the slots that the kernel fills with the step's tokens gets NaN.

    Raises:
        DeviceError: the kernel cannot be had here.
        UnsupportedError: the step is beyond it.
        ShapeError: the step is longer than the cache.
    """
    batch, q_len, _ = hidden_states.shape
    slots = v_cache.shape[2]
    obstacle = attention_block_tkg_obstacle(
        weights,
        rule,
        batch=batch,
        q_len=q_len,
        slots=slots,
        rotary_dim=None if cos is None else cos.shape[-1] * (2 if rule.interleaved else 1),
        logical_nc_config=logical_nc_config,
    )
    if obstacle is not None:
        raise UnsupportedError(
            explain("step", "be one that the kernel serves", obstacle, "the torch form serves all")
        )
    mask, sees, broken = joint_mask(prior_mask, active_mask, slots)
    call = attention_block_tkg_call(
        hidden_states,
        weights,
        rule,
        cos=cos,
        sin=sin,
        k_cache=k_cache,
        v_cache=v_cache,
        mask=mask,
    )
    _register()
    out, k, v = torch.ops.impl_nki.attention_block_tkg(*call, logical_nc_config)
    out = out.view(batch, q_len, -1)
    blind = out.new_zeros(()) if weights.output_bias is None else weights.output_bias
    out = torch.where(sees[..., None], out, blind.to(out.dtype))
    out = out.masked_fill(broken[:, None, None], float("nan"))
    return BlockOutput(out, k.permute(1, 2, 0)[:, None], v)


def _launch(
    X: Tensor,
    rmsnorm_X_gamma: Tensor | None,
    W_qkv: Tensor,
    bias_qkv: Tensor | None,
    norm_W_Q: Tensor | None,
    norm_W_K: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    K_cache: Tensor,
    V_cache: Tensor,
    attention_mask: Tensor,
    sink: Tensor | None,
    W_out: Tensor,
    bias_out: Tensor | None,
    rmsnorm_X_eps: float,
    norm_eps: float,
    norm_after_rope: bool,
    rope_contiguous_layout: bool,
    K_cache_transposed: bool,
    softmax_scale: float,
    logical_nc_config: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator: a `BlockCall` in its fields' order, and the grid."""
    unquantised = _no_quantization()
    before, after = (norm_W_Q is not None and norm_after_rope is late for late in (False, True))
    return load("attention_block_tkg", logical_nc_config)(  # type: ignore[no-any-return]
        X=X,
        X_hidden_dim_actual=None,
        rmsnorm_X_enabled=rmsnorm_X_gamma is not None,
        rmsnorm_X_eps=rmsnorm_X_eps,
        rmsnorm_X_gamma=rmsnorm_X_gamma,
        W_qkv=W_qkv,
        bias_qkv=bias_qkv,
        quantization_type_qkv=unquantised,
        weight_dequant_scale_qkv=None,
        input_dequant_scale_qkv=None,
        rmsnorm_QK_pre_rope_enabled=before,
        rmsnorm_QK_pre_rope_eps=norm_eps,
        rmsnorm_QK_pre_rope_W_Q=norm_W_Q if before else None,
        rmsnorm_QK_pre_rope_W_K=norm_W_K if before else None,
        cos=cos,
        sin=sin,
        rope_contiguous_layout=rope_contiguous_layout,
        rmsnorm_QK_post_rope_enabled=after,
        rmsnorm_QK_post_rope_eps=norm_eps,
        rmsnorm_QK_post_rope_W_Q=norm_W_Q if after else None,
        rmsnorm_QK_post_rope_W_K=norm_W_K if after else None,
        K_cache_transposed=K_cache_transposed,
        active_blocks_table=None,
        K_cache=K_cache,
        V_cache=V_cache,
        attention_mask=attention_mask,
        sink=sink,
        softmax_scale=softmax_scale,
        update_cache=False,
        kv_cache_update_idx=None,
        W_out=W_out,
        bias_out=bias_out,
        quantization_type_out=unquantised,
        weight_dequant_scale_out=None,
        input_dequant_scale_out=None,
        transposed_out=False,
        out_in_sb=False,
    )


def _fake(X: Tensor, *call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of `_launch`."""
    batch, q_len, hidden = X.shape
    width = call[BlockCall._fields.index("V_cache") - 1].shape[3]
    return (
        X.new_empty(batch * q_len, hidden),
        X.new_empty(width, batch, q_len),
        X.new_empty(batch, 1, q_len, width),
    )


def _no_quantization() -> Any:
    """What nki-library calls weights that are not quantised."""
    try:
        return importlib.import_module(COMMON_TYPES).QuantizationType.NONE
    except (ImportError, AttributeError) as error:
        raise DeviceError(
            explain("nkilib", f"hold {COMMON_TYPES}.QuantizationType", error)
        ) from error


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _register() -> None:
    """Register the operator, once; outside the graph when a compiler traces the caller."""
    register(OPERATOR, _launch, _fake)
