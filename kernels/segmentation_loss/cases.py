"""Cases of the segmentation loss: odd sizes in both layouts, and those of finetuning the base network."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from affmae_kernels.cases import Case
from affmae_kernels.segmentation_loss import segmentation_loss


def _make(
    random: torch.Generator,
    dtype: torch.dtype,
    *,
    shape_BHW: tuple[int, int, int],
    classes: int,
    patch: int | None,
    label_dtype: torch.dtype = torch.int64,
    scale: float = 2.0,
) -> dict[str, Any]:
    """Random logits; labels of which a tenth is ignored, the last image wholly, the last class absent from image 0."""
    batch, height, width = shape_BHW
    if patch is None:
        shape = [batch, classes, height, width]
    else:
        shape = [batch, -(-height // patch) * -(-width // patch), patch * patch * classes]
    logits = scale * torch.randn(shape, generator=random)
    labels_BHW = torch.randint(classes, shape_BHW, generator=random)
    labels_BHW[0] %= max(1, classes - 1)
    ignored_BHW = torch.rand(shape_BHW, generator=random) < 0.1
    if batch > 2:
        ignored_BHW[-1] = True
    ignore = 255 if label_dtype == torch.uint8 else -1
    return {
        "logits": logits.to(dtype),
        "labels": labels_BHW.masked_fill(ignored_BHW, ignore).to(label_dtype),
        "class_weights": 0.5 + torch.rand(classes, generator=random),
    }


def _call(
    *, backend: str, logits: Tensor, labels: Tensor, class_weights: Tensor, gamma: float, patch: int | None
) -> dict[str, Tensor]:
    focal, dice = segmentation_loss(logits, labels, class_weights, gamma=gamma, patch=patch, backend=backend)
    return {"focal": focal, "dice": dice}


def _case(
    name: str,
    shape_BHW: tuple[int, int, int],
    classes: int,
    patch: int | None,
    *,
    gamma: float = 2.0,
    label_dtype: torch.dtype = torch.int64,
    scale: float = 2.0,
    network: bool = False,
) -> Case:
    make = partial(_make, shape_BHW=shape_BHW, classes=classes, patch=patch, label_dtype=label_dtype, scale=scale)
    return Case("segmentation_loss", name, make, partial(_call, gamma=gamma, patch=patch), network=network)


CASES = [
    _case("2 classes, 9 x 7 pixels", (1, 9, 7), 2, None),
    _case("5 classes, 13 x 18 pixels", (3, 13, 18), 5, None),
    _case("5 classes, patches of 4, 13 x 18 pixels", (3, 13, 18), 5, 4),
    _case("3 classes, patches of 8, 16 x 24 pixels, no focus", (2, 16, 24), 3, 8, gamma=0.0),
    _case("7 classes, patches of 2, 5 x 3 pixels, gamma 1", (2, 5, 3), 7, 2, gamma=1.0),
    _case("33 classes, patches of 4, 11 x 10 pixels, gamma 2.5, uint8 labels", (2, 11, 10), 33, 4, gamma=2.5,
          label_dtype=torch.uint8),
    _case("64 classes, 6 x 6 pixels", (1, 6, 6), 64, None),
    _case("1 class, 4 x 4 pixels", (1, 4, 4), 1, None),
    _case("sure logits, 4 classes, patches of 4, 10 x 9 pixels", (2, 10, 9), 4, 4, scale=30.0),
    _case("8 images of 512 px, 5 classes, patches of 8", (8, 512, 512), 5, 8, network=True),
    _case("2 images of 1024 px, 5 classes, patches of 8", (2, 1024, 1024), 5, 8, network=True),
]  # fmt: skip
