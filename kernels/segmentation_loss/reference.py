"""Focal and Dice loss in plain PyTorch.

Axes: B images, K classes, H W pixels of an image, T cells of the canvas (h x w), p edge of a patch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from affmae_kernels.precision import compute_dtype

SMOOTH = 1e-5
"""Added to numerator and denominator of Dice."""
TINY = torch.finfo(torch.float32).tiny


def segmentation_loss(
    logits: Tensor, labels_BHW: Tensor, class_weights_K: Tensor, gamma: float, patch: int | None
) -> tuple[Tensor, Tensor]:
    """See the package for the formulas and the shapes."""
    classes = len(class_weights_K)
    logits_BKHW = logits if patch is None else _image_of_patches(logits, labels_BHW, classes, patch)

    # Ignored pixels: their logits become constants, so that no value of theirs, finite or not, reaches the loss.
    counted_BHW = (labels_BHW >= 0) & (labels_BHW < classes)
    target_BHW = labels_BHW.long().masked_fill(~counted_BHW, 0)
    logits_BKHW = logits_BKHW.to(compute_dtype(logits)).masked_fill(~counted_BHW[:, None], 0.0)
    weights_K = class_weights_K.to(logits_BKHW.dtype)

    # The focal loss: mean over the counted pixels.
    log_p_BKHW = logits_BKHW.log_softmax(1)
    log_p_true_BHW = log_p_BKHW.gather(1, target_BHW[:, None]).squeeze(1)
    missing_BHW = -torch.expm1(log_p_true_BHW)  # 1 - p of the true class
    focal_BHW = weights_K[target_BHW] * missing_BHW.pow(gamma) * -log_p_true_BHW
    focal_B = (focal_BHW * counted_BHW).sum((1, 2)) / counted_BHW.sum((1, 2)).clamp(min=1)

    # The Dice loss: sums over the counted pixels, then a weighted mean over the classes present in the image.
    onehot_BKHW = (torch.arange(classes, device=logits.device)[:, None, None] == target_BHW[:, None]) & (
        counted_BHW[:, None]
    )
    p_BKHW = log_p_BKHW.exp() * counted_BHW[:, None]
    hit_BK, pixels_BK = (p_BKHW * onehot_BKHW).sum((2, 3)), onehot_BKHW.sum((2, 3))
    dice_BK = 1 - (2 * hit_BK + SMOOTH) / (p_BKHW.sum((2, 3)) + pixels_BK + SMOOTH)
    share_BK = weights_K * (pixels_BK > 0)
    dice_B = (dice_BK * share_BK).sum(1) / share_BK.sum(1).clamp(min=TINY)
    return focal_B.mean(), dice_B.mean()


def _image_of_patches(logits_BTP: Tensor, labels_BHW: Tensor, classes: int, patch: int) -> Tensor:
    """[B, T, p * p * K] -> [B, K, H, W]."""
    _, height, width = labels_BHW.shape
    rows, columns = -(-height // patch), -(-width // patch)
    split = logits_BTP.unflatten(2, (patch, patch, classes)).unflatten(1, (rows, columns))  # [B, h, w, p, p, K]
    whole_BKHW = split.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    return whole_BKHW[..., :height, :width]
