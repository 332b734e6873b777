"""Matrix products that several operations share, with weights and their gradients in fp32.

Axes: R rows, C channels in, F features out.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rows(tensor: Tensor) -> Tensor:
    """[..., C] as a matrix [R, C]."""
    return tensor.reshape(-1, tensor.shape[-1])


def lowered(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Detached copies of the weights in `dtype`, by a launch or two for all of them; themselves where they have it."""
    detached = [weight.detach() for weight in weights]
    if all(weight.dtype == dtype for weight in detached):
        return detached
    copies = [torch.empty_like(weight, dtype=dtype) for weight in detached]
    torch._foreach_copy_(copies, detached)
    return copies


def weight_gradient(dout_RF: Tensor, feat_RC: Tensor) -> Tensor:
    """dout^T feat, [F, C]; on a GPU in fp32, in which the products are summed anyway."""
    if dout_RF.device.type == "cuda" and dout_RF.dtype != torch.float32:
        return torch.mm(dout_RF.t(), feat_RC, out_dtype=torch.float32)
    return dout_RF.t() @ feat_RC
