"""Residual LayerNorm: y = LayerNorm(x + dropout(branch)), a post-norm seam in one pass (method 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from affmae_kernels.dispatch import choose_backend
from affmae_kernels.launch import DTYPES
from affmae_kernels.residual_norm import reference

__all__ = ["residual_norm"]

WIDEST = 2048
"""Most channels that the kernel takes: a row stays in registers."""


def residual_norm(
    x_NC: Tensor,
    branch_NC: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    *,
    dropout: float = 0.0,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """LayerNorm(x + dropout(branch)) over the last axis.

    The sum is rounded to the features' dtype; statistics and the normalisation are fp32 (float64 for float64), also
    under autocast.

    Args:
        x_NC, branch_NC: [..., C], of one floating dtype.
        weight_C, bias_C: of the LayerNorm; floating.
        dropout: probability that an element of the branch is dropped (the others are scaled up); 0 outside training.
            Drawn from PyTorch's generator of the device; backends draw different numbers.
        eps: of the LayerNorm.
        backend: see `affmae_kernels.dispatch`.

    Returns:
        y_NC in the dtype of `x_NC`. Gradients: all floating arguments.

    Raises:
        ValueError: when shapes or dtypes do not fit together, or `dropout` is not in [0, 1).
    """
    width = x_NC.shape[-1]
    if x_NC.shape != branch_NC.shape or x_NC.dtype != branch_NC.dtype or not x_NC.is_floating_point():
        raise ValueError(
            f"x_NC and branch_NC must be floating and alike; got {x_NC.dtype} {list(x_NC.shape)} and "
            f"{branch_NC.dtype} {list(branch_NC.shape)}"
        )
    if weight_C.shape != (width,) or bias_C.shape != (width,):
        raise ValueError(f"weight_C and bias_C must be [{width}]; got {list(weight_C.shape)}, {list(bias_C.shape)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1); got {dropout}")
    choice = choose_backend(backend, "residual_norm", x_NC.device, _unsupported(x_NC))
    with torch.autocast(x_NC.device.type, enabled=False):
        if choice.name == "triton":
            from affmae_kernels.residual_norm import triton_impl

            return triton_impl.residual_norm(x_NC, branch_NC, weight_C, bias_C, dropout, eps)
        return reference.residual_norm(x_NC, branch_NC, weight_C, bias_C, dropout, eps)


def _unsupported(x_NC: Tensor) -> str | None:
    """What the kernel cannot take of these arguments."""
    if x_NC.shape[-1] > WIDEST:
        return f"{x_NC.shape[-1]} channels, only up to {WIDEST}"
    return None if x_NC.dtype in DTYPES else f"features of {x_NC.dtype}"
