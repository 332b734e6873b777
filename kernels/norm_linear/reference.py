"""LayerNorm and a linear layer in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from affmae_kernels.precision import layer_norm, linear


def norm_linear(x_BNC: Tensor, norm_weight_C: Tensor, norm_bias_C: Tensor, weight_FC: Tensor, bias_F: Tensor) -> Tensor:
    """See the package for the formula and the shapes."""
    return linear(layer_norm(x_BNC, norm_weight_C, norm_bias_C), weight_FC, bias_F)
