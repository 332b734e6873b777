"""Matrix products that operations and fused layers share."""

from __future__ import annotations

import torch
from torch import Tensor


def weight_gradient(dout_RH: Tensor, features_RC: Tensor) -> Tensor:
    """dout^T features, [H, C]; where cuBLAS can, in fp32, in which the products are summed anyway."""
    if dout_RH.is_cuda and dout_RH.dtype != torch.float32:
        return torch.mm(dout_RH.t(), features_RC, out_dtype=torch.float32)
    return dout_RH.t() @ features_RC
