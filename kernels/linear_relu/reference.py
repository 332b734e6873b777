"""A linear layer and its ReLU in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear_relu(x_BNC: Tensor, weight_HC: Tensor, bias_H: Tensor) -> Tensor:
    """See the package for the formula and the shapes."""
    return F.relu(F.linear(x_BNC, weight_HC.to(x_BNC.dtype), bias_H.to(x_BNC.dtype)))
