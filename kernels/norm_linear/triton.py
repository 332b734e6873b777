"""LayerNorm and a linear layer: one kernel and one product in each direction, and fp32 weight gradients.

The normalized features are not kept: the backward pass of the LayerNorm writes them again for the weight gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from affmae_kernels.column_sums import column_sums
from affmae_kernels.products import lowered, rows, weight_gradient
from affmae_kernels.residual_norm import triton as norm


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        low_weight, low_bias = lowered([weight, bias], x.dtype)
        y, _, stat = norm.forward(x, norm_weight, norm_bias)
        ctx.save_for_backward(x, stat, norm_weight, norm_bias, low_weight)
        return torch.addmm(low_bias, rows(y), low_weight.t()).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, stat, norm_weight, norm_bias, low_weight = ctx.saved_tensors
        dout = rows(dout.contiguous())
        found = norm.backward((dout @ low_weight).view_as(x), None, x, stat, norm_weight, bias=norm_bias)
        return found.dx, found.dweight, found.dbias, weight_gradient(dout, rows(found.y)), column_sums(dout)


def norm_linear(x_BNC: Tensor, norm_weight_C: Tensor, norm_bias_C: Tensor, weight_FC: Tensor, bias_F: Tensor) -> Tensor:
    """See the package for the formula and the shapes."""
    out: Tensor = _NormLinear.apply(x_BNC.contiguous(), norm_weight_C, norm_bias_C, weight_FC, bias_F)
    return out
