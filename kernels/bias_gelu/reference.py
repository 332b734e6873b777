"""GELU after a bias in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from affmae_kernels.precision import compute_dtype


def bias_gelu(x_BNC: Tensor, bias_C: Tensor) -> Tensor:
    """See the package for the formula and the shapes."""
    dtype = compute_dtype(x_BNC)
    return F.gelu(x_BNC.to(dtype) + bias_C.to(dtype)).to(x_BNC.dtype)
