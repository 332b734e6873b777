"""The segmentation loss: MONAI's focal and Dice losses with class weights, an exact ignore mask and deep supervision.

What is unusual. Both terms are computed image by image and averaged over the images, so the loss of a batch does not
depend on how it is cut into micro-batches or shared out among processes. Pixels to ignore (label `IGNORE`) are taken
out before MONAI sees them, so that they carry no gradient at all and the mean runs over the pixels of the image that
count. Dice is averaged over the classes that occur in the image: a class that is absent would only add a constant 1 and
a needless push (its Dice is 0/0); the focal term still punishes predicting it. Everything is computed in float32,
whatever the autocast type.

Axes: B batch, C classes, H W image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from affmae_engine.config import FinetuneConfig, LossConfig
from affmae_engine.data.labels import IGNORE
from affmae_engine.errors import ConfigError

_WEIGHT_RANGE = (0.1, 10.0)


class SegmentationLoss:
    """Weighted focal + Dice on the last logits and, with the weights of `LossConfig`, on those of steps 2 and 1.

    Args:
        finetune: `focal_weight`, `dice_weight`, `focal_gamma`.
        loss: weights of the auxiliary logits (method section 6).
        class_weights: one per class; they multiply the focal loss of the pixels of that class, and weight the
            classes of an image in its mean of Dice.

    Raises:
        ConfigError: `focal_gamma` lies between 0 and 1, where the gradient of the focal loss is unbounded.
    """

    def __init__(self, finetune: FinetuneConfig, loss: LossConfig, class_weights: Sequence[float]) -> None:
        if 0 < finetune.focal_gamma < 1:
            raise ConfigError(
                f"finetune.focal_gamma = {finetune.focal_gamma}: its gradient is unbounded", "take 0, or 1 and more"
            )
        from monai.losses import DiceLoss, FocalLoss  # importing MONAI takes seconds

        self._focal = FocalLoss(use_softmax=True, gamma=finetune.focal_gamma, reduction="none")
        self._dice = DiceLoss(batch=False, reduction="none")
        self._focal_weight = finetune.focal_weight
        self._dice_weight = finetune.dice_weight
        self._aux = {"step2": loss.step2, "step1": loss.step1}
        self._class_weights = torch.tensor(class_weights, dtype=torch.float32)

    def __call__(self, outputs: Mapping[str, Tensor], labels_BHW: Tensor) -> dict[str, Tensor]:
        """Named losses, scalars in float32: means over the images, where one without any label counts as 0.

        Args:
            outputs: "logits" [B, C, H, W] and optionally "logits_step2", "logits_step1" of the same shape.
            labels_BHW: int64 classes, `IGNORE` where there is nothing to learn.

        Returns:
            "loss" (what is optimised), "focal" and "dice" of the last logits, and "step2", "step1" when present
            (each focal + Dice, before its weight) unless their weight is 0.
        """
        target = _Target(labels_BHW, classes=outputs["logits"].shape[1])
        weights = self._weights_on(labels_BHW.device)
        focal, dice = self._terms(outputs["logits"], target, weights)
        total = self._focal_weight * focal + self._dice_weight * dice
        auxiliary: dict[str, Tensor] = {}
        for name, weight in self._aux.items():
            logits_BCHW = outputs.get(f"logits_{name}")
            if logits_BCHW is None:
                continue
            if weight == 0:  # a gradient of zeros: processes that exchange gradients expect one of every parameter
                total = total + logits_BCHW[:0].sum()
                continue
            aux_focal, aux_dice = self._terms(logits_BCHW, target, weights)
            auxiliary[name] = self._focal_weight * aux_focal + self._dice_weight * aux_dice
            total = total + weight * auxiliary[name]
        return {"loss": total, "focal": focal, "dice": dice, **auxiliary}

    def _terms(self, logits_BCHW: Tensor, target: _Target, weights_C: Tensor) -> tuple[Tensor, Tensor]:
        # The masked logits are constants to autograd, so even a non-finite logit under the mask does no harm.
        logits_BCHW = logits_BCHW.float().masked_fill(~target.valid_B1HW, 0.0)
        focal_BCHW = self._focal(logits_BCHW, target.onehot_BCHW)
        focal_B = (focal_BCHW * weights_C[:, None, None]).sum(dim=(1, 2, 3)) / target.pixels_B
        probability_BCHW = logits_BCHW.softmax(dim=1) * target.valid_B1HW
        dice_BC = self._dice(probability_BCHW, target.onehot_BCHW).flatten(1)
        share_BC = weights_C * target.present_BC
        dice_B = (dice_BC * share_BC).sum(1) / share_BC.sum(1).clamp(min=torch.finfo(torch.float32).tiny)
        return focal_B.mean(), dice_B.mean()

    def _weights_on(self, device: torch.device) -> Tensor:
        if self._class_weights.device != device:
            self._class_weights = self._class_weights.to(device)
        return self._class_weights


class _Target:
    """What the three sets of logits share: the one-hot truth, which pixels count, which classes occur in an image."""

    def __init__(self, labels_BHW: Tensor, *, classes: int) -> None:
        valid_BHW = labels_BHW != IGNORE
        onehot_BHWC = F.one_hot(labels_BHW.masked_fill(~valid_BHW, 0), classes)
        self.valid_B1HW = valid_BHW[:, None]
        self.onehot_BCHW = (onehot_BHWC.movedim(-1, 1) * self.valid_B1HW).float()
        self.pixels_B = valid_BHW.sum(dim=(1, 2)).clamp(min=1)
        self.present_BC = (self.onehot_BCHW.amax(dim=(2, 3)) > 0).float()


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
