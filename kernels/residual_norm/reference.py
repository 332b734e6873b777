"""Residual LayerNorm in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from affmae_kernels.precision import compute_dtype


def residual_norm(
    x_BNC: Tensor,
    branch_BNC: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    offset_C: Tensor | None,
    scale_B: Tensor | None,
    dropout: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See the package for the formula and the shapes."""
    dtype = compute_dtype(x_BNC)
    branch_BNC = branch_BNC.to(dtype)
    if offset_C is not None:
        branch_BNC = branch_BNC + offset_C.to(dtype)
    branch_BNC = F.dropout(branch_BNC, dropout)
    if scale_B is not None:
        branch_BNC = branch_BNC * scale_B.to(dtype).view(-1, *[1] * (branch_BNC.ndim - 1))
    sum_BNC = (x_BNC.to(dtype) + branch_BNC).to(x_BNC.dtype)
    normed_BNC = F.layer_norm(sum_BNC.to(dtype), weight_C.shape, weight_C.to(dtype), bias_C.to(dtype), eps)
    return normed_BNC.to(x_BNC.dtype), sum_BNC
