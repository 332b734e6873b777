"""A linear layer and its ReLU: y = max(0, x W^T + b), the first half of the decoder's MLP (method 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from affmae_kernels.dispatch import choose_backend
from affmae_kernels.launch import DTYPES
from affmae_kernels.linear_relu import reference

__all__ = ["linear_relu", "unsupported"]


def linear_relu(x_BNC: Tensor, weight_HC: Tensor, bias_H: Tensor, *, backend: str = "auto") -> Tensor:
    """max(0, x W^T + b).

    Under autocast it computes in autocast's dtype, else in that of `x_BNC`, as a linear layer does.

    Args:
        x_BNC: [..., C], floating.
        weight_HC, bias_H: of the linear layer; floating.
        backend: see `affmae_kernels.dispatch`.

    Returns:
        y_BNH in the dtype that it computes in. Gradients: all arguments; at 0 the slope is 0.

    Raises:
        ValueError: when shapes do not fit together.
    """
    channels, hidden = x_BNC.shape[-1], len(bias_H)
    if not x_BNC.is_floating_point() or bias_H.ndim != 1 or weight_HC.shape != (hidden, channels):
        raise ValueError(
            f"weight_HC must be [H, C] and bias_H [H] for floating x_BNC [..., C]; got {list(weight_HC.shape)} and "
            f"{list(bias_H.shape)} for {x_BNC.dtype} {list(x_BNC.shape)}"
        )
    kind = x_BNC.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_BNC.dtype
    choice = choose_backend(backend, "linear_relu", x_BNC.device, unsupported(dtype))
    with torch.autocast(kind, enabled=False):
        if choice.name == "triton":
            from affmae_kernels.linear_relu import triton_impl

            return triton_impl.linear_relu(x_BNC.to(dtype), weight_HC, bias_H)
        return reference.linear_relu(x_BNC.to(dtype), weight_HC, bias_H)


def unsupported(dtype: torch.dtype) -> str | None:
    """What the kernel cannot take of features in this dtype."""
    return None if dtype in DTYPES else f"features of {dtype}"
