"""Validation of a segmenter on whole sections, by the very tiling that `affmae predict` uses.

The score is the mean IoU over all validation pixels; classes without a true pixel are left out, and where fewer than
two classes are left there is no score. Very large validation sets are scored on sections spread evenly over them,
always the same ones, so that scores stay comparable.

Axes: Y X section.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from affmae_engine.config import RunConfig
from affmae_engine.data.normalise import Normalisation
from affmae_engine.data.segmentation import Section
from affmae_engine.data.store import Store
from affmae_engine.picture_files import Picture
from affmae_engine.predict.compute import predicted_classes
from affmae_engine.predict.network import TileNetwork
from affmae_engine.segmentation_metrics import Confusion, class_mean, mean
from affmae_engine.train.task import Evaluation
from affmae_engine.visualize import comparison_picture

_MOST_PIXELS = 1 << 28
"""Pixels scored at most; about a minute of tiled inference on a card."""

_PREVIEWED = 3
_PREVIEW_EDGE = 512


@dataclass(frozen=True)
class SegmentationEvaluation:
    """Evaluates and pictures a segmenter on fixed sections.

    Args:
        store, sections: the validation data, see `chosen_sections`.
        normalisation: of intensities.
        class_names: of the classes 0, 1, 2, ...
        config: `finetune.ignore_label`, `predict` and the training crop, which is the default tile.
    """

    store: Store
    sections: Sequence[Section]
    normalisation: Normalisation
    class_names: tuple[str, ...]
    config: RunConfig

    def evaluate(self, model: nn.Module, device: torch.device) -> Evaluation:
        """IoU and Dice per class and their means; `model` is in eval mode, on `device`, under its autocast."""
        classes = len(self.class_names)
        total, per_image = Confusion(classes), []
        for section in self.sections:
            here = Confusion(classes)
            predicted_YX = self._predict(model, device, section, slice(None), slice(None))
            here.add(predicted_YX, section.labels(self.store, self.config.finetune.ignore_label))
            total += here
            per_image.append(class_mean(here.iou()))
        score = class_mean(total.iou())
        metrics = {
            "score": score,
            "iou": score,
            "dice": class_mean(total.dice()),
            "iou_per_image": mean(per_image),
            "accuracy": total.accuracy(),
        }
        return Evaluation(score=score, metrics=metrics, per_class=total.per_class(self.class_names))

    def preview(self, model: nn.Module, device: torch.device) -> dict[str, Picture]:
        """One picture: for up to three sections the middle of image, truth, prediction and errors."""
        step = max(1, len(self.sections) // _PREVIEWED)
        rows = []
        for section in self.sections[(step - 1) // 2 :: step][:_PREVIEWED]:
            y, x = _middle(section.height), _middle(section.width)
            truth_YX = section.labels(self.store, self.config.finetune.ignore_label, y, x)
            rows.append((section.image(self.store, y, x), truth_YX, self._predict(model, device, section, y, x)))
        return {"": comparison_picture(rows, self.class_names)}

    def _predict(
        self, model: nn.Module, device: torch.device, section: Section, y: slice, x: slice
    ) -> NDArray[np.int64]:
        """Predicted classes of a window of a section."""
        intensities = self.normalisation.for_image(self.store[section.name].statistics)
        patch = self.config.model.patch_size
        tile = -(-(self.config.predict.tile or self.config.image_size) // patch) * patch
        ignored = self.config.finetune.ignore_label
        network = TileNetwork(
            model,
            classes=len(self.class_names),
            device=device,
            excluded=() if ignored is None else (ignored,),
        )
        return predicted_classes(
            network, section.image(self.store, y, x), intensities, tile=tile,
            overlap=self.config.predict.overlap, batch_size=self.config.predict.batch_size,
        )  # fmt: skip


def chosen_sections(sections: Sequence[Section], *, most_pixels: int = _MOST_PIXELS) -> list[Section]:
    """All sections, or as many as `most_pixels` allow, spread evenly."""
    pixels = sum(section.height * section.width for section in sections)
    if pixels <= most_pixels:
        return list(sections)
    count = max(1, int(len(sections) * most_pixels / pixels))
    return [sections[(2 * k + 1) * len(sections) // (2 * count)] for k in range(count)]


def _middle(length: int) -> slice:
    """The middle `_PREVIEW_EDGE` pixels."""
    first = max(0, (length - _PREVIEW_EDGE) // 2)
    return slice(first, min(length, first + _PREVIEW_EDGE))
