"""Residual LayerNorm: s = x + scale dropout(branch + offset), y = LayerNorm(s), in one pass (method 3.3 and 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from affmae_kernels.dispatch import choose_backend
from affmae_kernels.launch import DTYPES
from affmae_kernels.precision import without_autocast
from affmae_kernels.residual_norm import reference

__all__ = ["residual_norm", "unsupported"]

WIDEST = 2048
"""Most channels that the kernel takes: a row stays in registers."""


def residual_norm(
    x_BNC: Tensor,
    branch_BNC: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    *,
    offset_C: Tensor | None = None,
    scale_B: Tensor | None = None,
    dropout: float = 0.0,
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalize the sum over the last axis.

    The sum is rounded to the features' dtype; statistics and the normalisation are fp32 (float64 for float64), also
    under autocast.

    Args:
        x_BNC, branch_BNC: [B, ..., C], of one floating dtype.
        weight_C, bias_C: of the LayerNorm; floating.
        offset_C: added to the branch: the bias of the linear layer that made it, whose gradient is summed in the same
            pass; floating.
        scale_B: factor of the branch per image: 0 or 1 / (1 - rate) with stochastic depth. No gradient.
        dropout: probability that an element of the branch is dropped (the others are scaled up); 0 outside training.
            Drawn from PyTorch's generator of the device; backends draw different numbers.
        eps: of the LayerNorm.
        backend: see `affmae_kernels.dispatch`.

    Returns:
        y_BNC and the sum s_BNC in the dtype of `x_BNC`. Gradients: all floating arguments but `scale_B`.

    Raises:
        ValueError: when shapes or dtypes do not fit together, or `dropout` is not in [0, 1).
    """
    _check(x_BNC, branch_BNC, {"weight_C": weight_C, "bias_C": bias_C, "offset_C": offset_C}, scale_B, dropout)
    choice = choose_backend(backend, "residual_norm", x_BNC.device, unsupported(x_BNC.dtype, x_BNC.shape[-1]))
    with without_autocast(x_BNC):
        if choice.name == "triton":
            from affmae_kernels.residual_norm import triton

            return triton.residual_norm(x_BNC, branch_BNC, weight_C, bias_C, offset_C, scale_B, dropout, eps)
        return reference.residual_norm(x_BNC, branch_BNC, weight_C, bias_C, offset_C, scale_B, dropout, eps)


def unsupported(dtype: torch.dtype, channels: int) -> str | None:
    """Why the kernel cannot take features of this dtype and width; None: it can."""
    if channels > WIDEST:
        return f"{channels} channels, only up to {WIDEST}"
    return None if dtype in DTYPES else f"features of {dtype}"


def _check(
    x_BNC: Tensor, branch_BNC: Tensor, vectors: dict[str, Tensor | None], scale_B: Tensor | None, dropout: float
) -> None:
    if x_BNC.shape != branch_BNC.shape or x_BNC.dtype != branch_BNC.dtype or not x_BNC.is_floating_point():
        raise ValueError(
            f"x_BNC and branch_BNC must be floating and alike; got {x_BNC.dtype} {list(x_BNC.shape)} and "
            f"{branch_BNC.dtype} {list(branch_BNC.shape)}"
        )
    width = x_BNC.shape[-1]
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (width,):
            raise ValueError(f"{name} must be [{width}]; got {list(vector.shape)}")
    if scale_B is not None and scale_B.shape != x_BNC.shape[:1]:
        raise ValueError(f"scale_B must be [{x_BNC.shape[0]}]; got {list(scale_B.shape)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1); got {dropout}")
