"""The squared error of predicted pixels in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from affmae_kernels.precision import compute_dtype


def pixel_loss(pred_BQP: Tensor, target_BQP: Tensor, real_BQP: Tensor | None) -> Tensor:
    """See the package for the formula and the shapes."""
    dtype = compute_dtype(pred_BQP)
    error_BQP = (pred_BQP.to(dtype) - target_BQP.to(dtype)).square()
    return error_BQP.mean() if real_BQP is None else (error_BQP * real_BQP).sum() / real_BQP.sum()
