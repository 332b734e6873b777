"""LayerNorm and a linear layer: the heads of the decoder and the reduction after merging (method 3.4, 5 and 6)."""

from __future__ import annotations

from torch import Tensor

from affmae_kernels import residual_norm
from affmae_kernels.dispatch import choose_backend, fp32_only
from affmae_kernels.norm_linear import reference
from affmae_kernels.precision import feature_dtype, without_autocast

__all__ = ["norm_linear"]


def norm_linear(
    x_BNC: Tensor,
    norm_weight_C: Tensor,
    norm_bias_C: Tensor,
    weight_FC: Tensor,
    bias_F: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """linear(LayerNorm(x)), computed in `precision.feature_dtype` of x with fp32 statistics and sums; eps 1e-5.

    Args:
        x_BNC: [..., C], floating.
        norm_weight_C, norm_bias_C: of the LayerNorm; floating.
        weight_FC, bias_F: of the linear layer; floating.
        backend: see `affmae_kernels.dispatch`.

    Returns:
        [..., F] in the dtype that it is computed in. Gradients: all arguments.

    Raises:
        ValueError: when shapes do not fit together.
    """
    channels, features = x_BNC.shape[-1], len(bias_F)
    if not x_BNC.is_floating_point() or weight_FC.shape != (features, channels) or norm_weight_C.shape != (channels,):
        raise ValueError(
            f"weight_FC must be [F, C] and norm_weight_C [C] for floating x_BNC [..., C]; got {list(weight_FC.shape)} "
            f"and {list(norm_weight_C.shape)} for {x_BNC.dtype} {list(x_BNC.shape)}"
        )
    dtype = feature_dtype(x_BNC)
    obstacle = residual_norm.unsupported(dtype, channels) or fp32_only(weight_FC)
    choice = choose_backend(backend, "norm_linear", x_BNC.device, obstacle)
    with without_autocast(x_BNC):
        if choice.name == "triton":
            from affmae_kernels.norm_linear import triton

            return triton.norm_linear(x_BNC.to(dtype), norm_weight_C, norm_bias_C, weight_FC, bias_F)
        return reference.norm_linear(x_BNC.to(dtype), norm_weight_C, norm_bias_C, weight_FC, bias_F)
