"""The segmentation loss: focal + Dice of the last logits and, with their weights, of the auxiliary ones.

Both terms are computed image by image and averaged over the images, so the loss of a batch does not depend on how it is
cut into micro-batches or shared among processes. See `affmae_kernels.segmentation_loss` for the formulas.

Axes: B batch, K classes, H W image, T cells of the canvas, P = p * p * K values of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from affmae_engine.config import FinetuneConfig, LossConfig
from affmae_engine.errors import ConfigError
from affmae_kernels.segmentation_loss import segmentation_loss

_WEIGHT_RANGE = (0.1, 10.0)


class SegmentationLoss:
    """Weighted focal + Dice on the last logits and, with the weights of `LossConfig`, on those of steps 2 and 1.

    Args:
        finetune: `focal_weight`, `dice_weight`, `focal_gamma`.
        loss: weights of the auxiliary logits (method section 6).
        class_weights: one per class; they multiply the focal loss of the pixels of that class, and weight the
            classes of an image in its mean of Dice.
        backend: of the loss, see `affmae_kernels.dispatch`.

    Raises:
        ConfigError: `focal_gamma` lies between 0 and 1, where the gradient of the focal loss is unbounded.
    """

    def __init__(
        self, finetune: FinetuneConfig, loss: LossConfig, class_weights: Sequence[float], *, backend: str = "auto"
    ) -> None:
        if 0 < finetune.focal_gamma < 1:
            raise ConfigError(
                f"finetune.focal_gamma = {finetune.focal_gamma}: its gradient is unbounded", "take 0, or 1 and more"
            )
        self._gamma, self._backend = finetune.focal_gamma, backend
        self._focal_weight, self._dice_weight = finetune.focal_weight, finetune.dice_weight
        self._aux = {"step2": loss.step2, "step1": loss.step1}
        self._class_weights_K = torch.tensor(class_weights, dtype=torch.float32)

    def __call__(self, outputs: Mapping[str, Tensor], labels_BHW: Tensor) -> dict[str, Tensor]:
        """Named losses, scalars in float32: means over the images, where one without any label counts as 0.

        Args:
            outputs: "logits" and optionally "logits_step2", "logits_step1", [B, K, H, W] or, as the class heads give
                them, [B, T, P].
            labels_BHW: classes as whole numbers, `IGNORE` where there is nothing to learn.

        Returns:
            "loss" (what is optimized), "focal" and "dice" of the last logits, and "step2", "step1" when present
            (each focal + Dice, before its weight) unless their weight is 0.
        """
        focal, dice = self._focal_and_dice(outputs["logits"], labels_BHW)
        total = self._focal_weight * focal + self._dice_weight * dice
        auxiliary: dict[str, Tensor] = {}
        for name, weight in self._aux.items():
            logits = outputs.get(f"logits_{name}")
            if logits is None:
                continue
            if weight == 0:  # a gradient of zeros: processes that exchange gradients expect one of every parameter
                total = total + logits[:0].sum()
                continue
            aux_focal, aux_dice = self._focal_and_dice(logits, labels_BHW)
            auxiliary[name] = self._focal_weight * aux_focal + self._dice_weight * aux_dice
            total = total + weight * auxiliary[name]
        return {"loss": total, "focal": focal, "dice": dice, **auxiliary}

    def _focal_and_dice(self, logits: Tensor, labels_BHW: Tensor) -> tuple[Tensor, Tensor]:
        weights_K = self._class_weights_K.to(logits.device)
        if not logits.is_meta:  # stays on the device from the first step on, before one is captured as a CUDA graph
            self._class_weights_K = weights_K
        patch = None
        if logits.ndim == 3:
            patch = math.isqrt(logits.shape[-1] // len(weights_K))
        return segmentation_loss(logits, labels_BHW, weights_K, gamma=self._gamma, patch=patch, backend=self._backend)


def weights_from_counts(counts: Sequence[int]) -> tuple[float, ...]:
    """Class weights from pixel counts: the inverse square root of the frequency, with mean 1, clipped to [0.1, 10].

    The plain inverse would let a synapse class (0.3 % of the pixels) outweigh everything else; the square root is the
    usual compromise. Classes without any pixel get weight 1 (they contribute nothing) and are left out of the mean.
    """
    pixels = np.asarray(counts, dtype=np.float64)
    present = pixels > 0
    weights = np.ones(len(pixels))
    if present.any():
        inverse = 1 / np.sqrt(pixels[present] / pixels.sum())
        weights[present] = np.clip(inverse / inverse.mean(), *_WEIGHT_RANGE)
    return tuple(round(float(weight), 4) for weight in weights)
