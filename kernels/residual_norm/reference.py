"""Residual LayerNorm in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from affmae_kernels.precision import compute_dtype


def residual_norm(
    x_NC: Tensor, branch_NC: Tensor, weight_C: Tensor, bias_C: Tensor, dropout: float, eps: float
) -> Tensor:
    """See the package for the formula and the shapes."""
    dtype = compute_dtype(x_NC)
    sum_NC = (x_NC.to(dtype) + F.dropout(branch_NC.to(dtype), dropout)).to(x_NC.dtype)
    normed_NC = F.layer_norm(sum_NC.to(dtype), weight_C.shape, weight_C.to(dtype), bias_C.to(dtype), eps)
    return normed_NC.to(x_NC.dtype)
