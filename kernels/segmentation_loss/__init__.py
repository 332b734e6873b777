"""Focal and Dice loss of a segmentation, image by image, with class weights and ignored pixels (method section 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from affmae_kernels.dispatch import choose_backend
from affmae_kernels.launch import DTYPES
from affmae_kernels.precision import without_autocast
from affmae_kernels.segmentation_loss import reference

__all__ = ["segmentation_loss"]

_LABEL_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def segmentation_loss(
    logits: Tensor,
    labels_BHW: Tensor,
    class_weights_K: Tensor,
    *,
    gamma: float = 2.0,
    patch: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Mean focal loss and mean Dice loss over the images of a batch.

    With p = softmax(logits), label y, weight w, and sums over the counted pixels n of one image (N of them):

        focal = 1/N sum_n w_y (1 - p_ny)^gamma (-log p_ny)
        dice  = sum_k share_k (1 - (2 sum_n p_nk [y_n = k] + e) / (sum_n p_nk + sum_n [y_n = k] + e)),  e = 1e-5

    share_k is w_k for the classes present in the image and 0 for the others, scaled to sum 1. Pixels whose label is not
    one of 0 to K - 1 are ignored: they are not counted, and their gradient is exactly 0 even where their logits are
    not finite. An image without any counted pixel has loss 0. Everything is computed in fp32 (float64 for float64).

    Args:
        logits: floating; class logits [B, K, H, W], or with `patch` the values of patches [B, T, p * p * K], laid out
            as (row, column, class), for T = ceil(H / p) * ceil(W / p) cells in row-major order. Pixels of the patches
            beyond H and W are ignored.
        labels_BHW: whole numbers, classes or anything else for ignored pixels (such as -1 or 255).
        class_weights_K: fp32 (or float64), at least 0; constants, without gradient.
        gamma: focusing exponent, 0 or at least 1 (between them the gradient is unbounded).
        patch: p, the edge of a patch in pixels.
        backend: see `affmae_kernels.dispatch`.

    Returns:
        focal and dice, scalars. Gradients: logits.

    Raises:
        ValueError: when shapes or dtypes do not fit together, or `gamma` is out of range.
    """
    _check(logits, labels_BHW, class_weights_K, patch)
    if gamma != 0 and gamma < 1:
        raise ValueError(f"gamma must be 0 or at least 1; got {gamma}")
    unsupported = None if logits.dtype in DTYPES else f"logits of {logits.dtype}"
    choice = choose_backend(backend, "segmentation_loss", logits.device, unsupported)
    weights_K = class_weights_K.detach()
    with without_autocast(logits):
        if choice.name == "triton":
            from affmae_kernels.segmentation_loss import triton

            return triton.segmentation_loss(logits, labels_BHW, weights_K, gamma, patch)
        return reference.segmentation_loss(logits, labels_BHW, weights_K, gamma, patch)


def _check(logits: Tensor, labels_BHW: Tensor, class_weights_K: Tensor, patch: int | None) -> None:
    if labels_BHW.ndim != 3 or labels_BHW.dtype not in _LABEL_DTYPES:
        raise ValueError(f"labels must be whole numbers [B, H, W]; got {labels_BHW.dtype} {list(labels_BHW.shape)}")
    if class_weights_K.ndim != 1 or not class_weights_K.is_floating_point():
        raise ValueError(
            f"class_weights must be floating [K]; got {class_weights_K.dtype} {list(class_weights_K.shape)}"
        )
    batch, height, width = labels_BHW.shape
    classes = len(class_weights_K)
    if patch is None:
        expected = [batch, classes, height, width]
    elif patch < 1:
        raise ValueError(f"patch must be at least 1; got {patch}")
    else:
        expected = [batch, -(-height // patch) * -(-width // patch), patch * patch * classes]
    if not logits.is_floating_point() or list(logits.shape) != expected:
        raise ValueError(
            f"logits must be floating {expected} for labels {list(labels_BHW.shape)}, {classes} class weights and "
            f"patch={patch}; got {logits.dtype} {list(logits.shape)}"
        )
