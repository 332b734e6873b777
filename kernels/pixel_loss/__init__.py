"""The pretraining loss of one head: squared error of predicted pixels, averaged over what counts (method 5)."""

from __future__ import annotations

from torch import Tensor

from affmae_kernels.dispatch import choose_backend
from affmae_kernels.launch import DTYPES
from affmae_kernels.pixel_loss import reference
from affmae_kernels.precision import without_autocast

__all__ = ["pixel_loss"]


def pixel_loss(
    pred_BQP: Tensor, target_BQP: Tensor, real_BQP: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """mean of (pred - target)^2 over the pixels that are real, computed in fp32 (float64 for float64).

    Args:
        pred_BQP: predicted pixels of Q patches of P pixels; floating.
        target_BQP: true pixels; floating.
        real_BQP: bool, False for pixels that pad the image; at least one is True. None: all are real.
        backend: see `affmae_kernels.dispatch`.

    Returns:
        A scalar of at least fp32. Gradients: `pred_BQP`.

    Raises:
        ValueError: when shapes do not fit together.
    """
    for name, tensor in (("target_BQP", target_BQP), ("real_BQP", real_BQP)):
        if tensor is not None and tensor.shape != pred_BQP.shape:
            raise ValueError(f"{name} must be {list(pred_BQP.shape)}, as pred_BQP; got {list(tensor.shape)}")
    obstacle = None if pred_BQP.dtype in DTYPES else f"predictions of {pred_BQP.dtype}"
    choice = choose_backend(backend, "pixel_loss", pred_BQP.device, obstacle)
    with without_autocast(pred_BQP):
        if choice.name == "triton":
            from affmae_kernels.pixel_loss import triton

            return triton.pixel_loss(pred_BQP, target_BQP, real_BQP)
        return reference.pixel_loss(pred_BQP, target_BQP, real_BQP)
