"""GELU after a bias: y = GELU(x + b), the seam inside an MLP (method 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from affmae_kernels.bias_gelu import reference
from affmae_kernels.dispatch import choose_backend
from affmae_kernels.launch import DTYPES
from affmae_kernels.precision import without_autocast

__all__ = ["bias_gelu", "unsupported"]


def bias_gelu(x_BNC: Tensor, bias_C: Tensor, *, backend: str = "auto") -> Tensor:
    """The exact GELU (with the error function) of `x_BNC + bias_C`, computed in fp32 (float64 for float64).

    Args:
        x_BNC: [..., C], what a linear layer without its bias gives; floating.
        bias_C: that bias; floating. Its gradient comes in the same pass as that of `x_BNC`.
        backend: see `affmae_kernels.dispatch`.

    Returns:
        y_BNC in the dtype of `x_BNC`. Gradients: both arguments.

    Raises:
        ValueError: when shapes do not fit together.
    """
    if not x_BNC.is_floating_point() or bias_C.shape != x_BNC.shape[-1:]:
        raise ValueError(
            f"bias_C must be [C] for floating x_BNC [..., C]; got {list(bias_C.shape)} for {x_BNC.dtype} "
            f"{list(x_BNC.shape)}"
        )
    choice = choose_backend(backend, "bias_gelu", x_BNC.device, unsupported(x_BNC))
    with without_autocast(x_BNC):
        if choice.name == "triton":
            from affmae_kernels.bias_gelu import triton_impl

            return triton_impl.bias_gelu(x_BNC, bias_C)
        return reference.bias_gelu(x_BNC, bias_C)


def unsupported(x_BNC: Tensor) -> str | None:
    """What the kernel cannot take of these features."""
    return None if x_BNC.dtype in DTYPES else f"features of {x_BNC.dtype}"
