"""The blocks of one encoder stage: cluster attention and an MLP, pre-norm, with stochastic depth (method 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from affmae_kernels import cluster_attention, residual_norm
from affmae_kernels.dispatch import choose_backend, fp32_only
from affmae_kernels.encoder_blocks import reference
from affmae_kernels.neighbourhoods import Neighbourhoods
from affmae_kernels.precision import feature_dtype, without_autocast

__all__ = ["BlockWeights", "encoder_blocks"]


class BlockWeights(NamedTuple):
    """Parameters of one block; C channels, H heads of width D, F hidden channels of the MLP. All floating."""

    norm1_weight_C: Tensor
    norm1_bias_C: Tensor
    qkv_weight_3CC: Tensor
    qkv_bias_3C: Tensor
    position_weight_H5: Tensor
    position_bias_H: Tensor
    blank_key_HD: Tensor
    blank_value_HD: Tensor
    out_weight_CC: Tensor
    out_bias_C: Tensor
    norm2_weight_C: Tensor
    norm2_bias_C: Tensor
    hidden_weight_FC: Tensor
    hidden_bias_F: Tensor
    last_weight_CF: Tensor
    last_bias_C: Tensor


def encoder_blocks(
    feat_BNC: Tensor,
    blocks: Sequence[BlockWeights],
    norm_weight_C: Tensor,
    norm_bias_C: Tensor,
    near: Neighbourhoods,
    *,
    branch_scale_SB: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Runs the blocks one after the other, then LayerNorm:

        x = x + scale * attention(LN(x)),   x = x + scale * MLP(LN(x)),   MLP with exact GELU

    Everything is computed in `precision.feature_dtype`, with fp32 statistics, softmax and sums; the residual stream has
    the features' dtype.

    Args:
        feat_BNC: features, rows in the order of `near`; floating.
        blocks: parameters of each block, at least one.
        norm_weight_C, norm_bias_C: of the LayerNorm after the last block; floating.
        near: neighborhoods of the N tokens.
        branch_scale_SB: factor of every branch and image, [2 * blocks, B], attention before MLP: 0 or 1 / (1 - rate)
            with stochastic depth. No gradient. None: 1.
        backend: see `affmae_kernels.dispatch`.

    Returns:
        The normalized features and the features of the last block, both [B, N, C] in the features' dtype. Gradients:
        features and all parameters.

    Raises:
        ValueError: when shapes do not fit together.
    """
    _check(feat_BNC, blocks, near, branch_scale_SB)
    dtype = feature_dtype(feat_BNC)
    width = blocks[0].blank_key_HD.shape[1]
    obstacle = (
        cluster_attention.unsupported(dtype, width, near)
        or residual_norm.unsupported(dtype, feat_BNC.shape[2])
        or fp32_only(norm_weight_C)
    )
    choice = choose_backend(backend, "encoder_blocks", feat_BNC.device, obstacle)
    with without_autocast(feat_BNC):
        if choice.name == "triton":
            from affmae_kernels.encoder_blocks import triton

            return triton.encoder_blocks(feat_BNC.to(dtype), blocks, norm_weight_C, norm_bias_C, near, branch_scale_SB)
        return reference.encoder_blocks(feat_BNC.to(dtype), blocks, norm_weight_C, norm_bias_C, near, branch_scale_SB)


def _check(
    feat_BNC: Tensor, blocks: Sequence[BlockWeights], near: Neighbourhoods, branch_scale_SB: Tensor | None
) -> None:
    if feat_BNC.ndim != 3 or not feat_BNC.is_floating_point() or feat_BNC.shape[:2] != near.pos_BN2.shape[:2]:
        raise ValueError(
            f"feat_BNC must be floating [B, N, C] for neighborhoods of [B, N] = {list(near.pos_BN2.shape[:2])}; got "
            f"{feat_BNC.dtype} {list(feat_BNC.shape)}"
        )
    if not blocks:
        raise ValueError("a stage needs at least one block")
    channels = feat_BNC.shape[2]
    for block in blocks:
        heads, width = block.blank_key_HD.shape
        hidden = len(block.hidden_bias_F)
        if heads * width != channels or block.qkv_weight_3CC.shape != (3 * channels, channels):
            raise ValueError(f"a block of {heads} heads of width {width} does not take {channels} channels")
        if block.hidden_weight_FC.shape != (hidden, channels) or block.last_weight_CF.shape != (channels, hidden):
            raise ValueError(f"an MLP of {hidden} hidden channels does not fit features of {channels} channels")
    if branch_scale_SB is not None and branch_scale_SB.shape != (2 * len(blocks), len(feat_BNC)):
        raise ValueError(
            f"branch_scale_SB must be [{2 * len(blocks)}, {len(feat_BNC)}]; got {list(branch_scale_SB.shape)}"
        )
