"""The blocks of an encoder stage in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from affmae_kernels.cluster_attention.reference import cluster_attention
from affmae_kernels.neighbourhoods import Neighbourhoods
from affmae_kernels.precision import layer_norm, linear

if TYPE_CHECKING:
    from affmae_kernels.encoder_blocks import BlockWeights


def encoder_blocks(
    feat_BNC: Tensor,
    blocks: Sequence[BlockWeights],
    norm_weight_C: Tensor,
    norm_bias_C: Tensor,
    near: Neighbourhoods,
    branch_scale_SB: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See the package for the formula and the shapes."""
    for index, block in enumerate(blocks):
        scale_B = None if branch_scale_SB is None else branch_scale_SB[2 * index]
        feat_BNC = feat_BNC + _scaled(_attention(feat_BNC, block, near), scale_B)
        scale_B = None if branch_scale_SB is None else branch_scale_SB[2 * index + 1]
        feat_BNC = feat_BNC + _scaled(_mlp(feat_BNC, block), scale_B)
    return layer_norm(feat_BNC, norm_weight_C, norm_bias_C), feat_BNC


def _attention(feat_BNC: Tensor, block: BlockWeights, near: Neighbourhoods) -> Tensor:
    heads = len(block.blank_key_HD)
    normed_BNC = layer_norm(feat_BNC, block.norm1_weight_C, block.norm1_bias_C)
    qkv_BN3HD = linear(normed_BNC, block.qkv_weight_3CC, block.qkv_bias_3C).unflatten(-1, (3, heads, -1))
    attended_BNHD = cluster_attention(
        qkv_BN3HD, near, block.blank_key_HD, block.blank_value_HD, block.position_weight_H5, block.position_bias_H
    )
    return linear(attended_BNHD.flatten(2), block.out_weight_CC, block.out_bias_C)


def _mlp(feat_BNC: Tensor, block: BlockWeights) -> Tensor:
    normed_BNC = layer_norm(feat_BNC, block.norm2_weight_C, block.norm2_bias_C)
    hidden_BNF = F.gelu(linear(normed_BNC, block.hidden_weight_FC, block.hidden_bias_F))
    return linear(hidden_BNF, block.last_weight_CF, block.last_bias_C)


def _scaled(branch_BNC: Tensor, scale_B: Tensor | None) -> Tensor:
    """Stochastic depth: the branch times one factor per image."""
    return branch_BNC if scale_B is None else branch_BNC * scale_B[:, None, None].to(branch_BNC.dtype)
