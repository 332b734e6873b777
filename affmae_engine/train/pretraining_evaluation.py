"""Held-out loss and preview of pretraining: fixed crops with fixed masks, so that two figures can be compared.

Unusual: at most `MOST_CROPS` crops, spread evenly over the held-out sections and read once. Their masks come from a
seed of their own: they are the same in every run on the same data, whatever its seed. The crops are not turned, but
they cover the magnifications of the training crops evenly; at one fixed magnification the loss would not compare.

Axes: B crops, C H W image, V visible and Q masked tokens, N tokens of a stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from affmae_engine.config import RunConfig
from affmae_engine.data.augment import Crop
from affmae_engine.data.dataset import UNIFORM_STD, Plane, as_channels, load_crop
from affmae_engine.data.store import Store
from affmae_engine.model.build import Autoencoder
from affmae_engine.model.collapse import effective_rank
from affmae_engine.model.masking import draw_mask
from affmae_engine.model.patches import canvas_of
from affmae_engine.picture_files import Picture
from affmae_engine.runtime.memory import in_smaller_batches
from affmae_engine.train.task import Evaluation
from affmae_engine.visualize import ReconstructionRow, reconstruction_picture

MOST_CROPS = 64
"""Crops in the held-out set."""

PREVIEW_ROWS = 3

_MASK_SEED = 20_260_216
_LARGEST_BATCH = 32
_GOLDEN = 0.618034
_TITLES = {"step1": "from stage 4", "step2": "from stages 4 and 3", "last": "reconstruction"}
_ONLY_TITLE = {"last": "reconstruction"}


@dataclass(frozen=True)
class FixedCrop:
    """A window of one section."""

    plane: Plane
    z: int
    crop: Crop


def choose_crops(
    planes: Sequence[Plane], size: int, scale: tuple[float, float], limit: int = MOST_CROPS
) -> list[FixedCrop]:
    """Windows without overlap, at most `limit`, spread evenly over all sections and, within a section, over its tiles.

    Args:
        planes: what may be cropped.
        size: edge of a training image; sections too small for a window give the largest square that fits.
        scale: smallest and largest edge of a window relative to `size` (`data.crop_scale`).
        limit: of the number of windows.
    """
    sections = [(plane, z) for plane in planes for z in range(plane.z0, plane.z1)]
    chosen = [sections[i] for i in _evenly(len(sections), limit)]
    each = max(1, limit // max(1, len(chosen)))
    crops: list[FixedCrop] = []
    for plane, z in chosen:
        tile = min(max(1, round(size * scale[1])), *plane.shape_YX)
        rows, columns = plane.shape_YX[0] // tile, plane.shape_YX[1] // tile
        top, left = ((length % tile) // 2 for length in plane.shape_YX)
        for number in _evenly(rows * columns, each):
            row, column = divmod(number, columns)
            share = (len(crops) + 0.5) * _GOLDEN % 1  # evenly spread for any number of crops
            edge = min(max(1, round(size * (scale[0] + share * (scale[1] - scale[0])))), tile)
            margin = (tile - edge) // 2
            crops.append(FixedCrop(plane, z, Crop(top + row * tile + margin, left + column * tile + margin, edge)))
    return crops


class PretrainingEvaluation:
    """`evaluate` and `preview` of the pretraining task. Crops are read when they are first needed.

    Args:
        store: the images.
        crops: see `choose_crops`; at least one.
        config: of the run.
    """

    def __init__(self, store: Store, crops: Sequence[FixedCrop], config: RunConfig) -> None:
        self.store, self.crops, self.config = store, list(crops), config
        self._batch: dict[str, Tensor] = {}

    def evaluate(self, model: nn.Module, device: torch.device) -> Evaluation:
        """Mean losses over the crops and the effective rank of each stage; the score is minus the loss.

        "mean_fill" is the error of filling what is hidden with the mean of what is visible, and "explained" the share
        of that error which the reconstruction removes: 1 - last / mean_fill.
        """
        train = self.config.train
        largest = train.micro_batch if isinstance(train.micro_batch, int) else train.batch_size
        return in_smaller_batches(
            lambda step: self._evaluate(model, device, step), min(largest, _LARGEST_BATCH), device
        )

    def _evaluate(self, model: nn.Module, device: torch.device, step: int) -> Evaluation:
        batch = self._crops()
        count = len(batch["image"])
        sums: dict[str, Tensor] = {}
        for start in range(0, count, step):
            part = {name: tensor[start : start + step].to(device) for name, tensor in batch.items()}
            for name, value in model(part["image"], part["visible"], part["masked"]).items():
                sums[name] = sums.get(name, torch.zeros((), device=device)) + value.float() * len(part["image"])
        metrics = {name: float(value) / count for name, value in sums.items()}
        metrics["mean_fill"] = self._mean_fill_error()
        metrics["explained"] = 1 - metrics["last"] / metrics["mean_fill"] if metrics["mean_fill"] > 0 else math.nan
        part = {name: tensor[:step].to(device) for name, tensor in batch.items()}
        stages = cast(Autoencoder, model).reconstruct(part["image"], part["visible"], part["masked"]).stage_feat
        ranks = [float(effective_rank(feat_BNC).mean()) for feat_BNC in stages]
        return Evaluation(score=-metrics["loss"], metrics=metrics, effective_rank=ranks)

    def preview(self, model: nn.Module, device: torch.device) -> dict[str, Picture]:
        """One picture: a few crops, what every supervised step makes of them, and where the tokens of stages are."""
        batch = self._crops()
        chosen = _evenly(len(batch["image"]), PREVIEW_ROWS)
        part = {name: tensor[chosen].to(device) for name, tensor in batch.items()}
        made = cast(Autoencoder, model).reconstruct(part["image"], part["visible"], part["masked"])
        titles = _TITLES if len(made.images) > 1 else _ONLY_TITLE
        rows = [
            ReconstructionRow(
                image_YX=part["image"][i, 0].cpu().numpy(),
                masked_YX=self._masked_pixels(part["masked"][i]),
                images={title: made.images[name][i, 0].float().cpu().numpy() for name, title in titles.items()},
                stage_positions=[pos_BN2[i].cpu().numpy() for pos_BN2 in made.stage_pos],
            )
            for i in range(len(chosen))
        ]
        return {"": reconstruction_picture(rows, patch=self.config.model.patch_size)}

    def _crops(self) -> dict[str, Tensor]:
        """Images and masks of all crops, stacked, on the host. Uniform ones are dropped unless all of them are."""
        if not self._batch:
            size = self.config.image_size
            squares = [load_crop(self.store, c.plane, c.z, c.crop, size) for c in self.crops]
            squares = [square for square in squares if square.std() >= UNIFORM_STD] or squares
            canvas_hw = canvas_of(size, size, self.config.model.patch_size)
            masks = [draw_mask(canvas_hw, self.config.mask, seed=_MASK_SEED, index=i) for i in range(len(squares))]
            self._batch = {
                "image": torch.stack([as_channels(square, self.config.model.channels) for square in squares]),
                "visible": torch.stack([visible_V for visible_V, _ in masks]),
                "masked": torch.stack([masked_Q for _, masked_Q in masks]),
            }
        return self._batch

    def _mean_fill_error(self) -> float:
        """Mean squared error of the hidden pixels when each crop is filled with the mean of its visible ones."""
        batch, errors = self._crops(), []
        for image_CHW, masked_Q in zip(batch["image"], batch["masked"], strict=True):
            image_YX = image_CHW[0].numpy()
            hidden_YX = self._masked_pixels(masked_Q)[: image_YX.shape[0], : image_YX.shape[1]]
            if hidden_YX.any() and not hidden_YX.all():
                errors.append(float(np.square(image_YX[hidden_YX] - image_YX[~hidden_YX].mean()).mean()))
        return sum(errors) / len(errors) if errors else math.nan

    def _masked_pixels(self, masked_Q: Tensor) -> np.ndarray:
        """True where a pixel was hidden, [Y, X]."""
        patch, size = self.config.model.patch_size, self.config.image_size
        cells_hw = np.zeros(canvas_of(size, size, patch), bool)
        cells_hw.reshape(-1)[masked_Q.cpu().numpy()] = True
        return cells_hw.repeat(patch, axis=0).repeat(patch, axis=1)


def _evenly(count: int, limit: int) -> list[int]:
    """At most `limit` of the numbers 0 to count - 1, spread evenly and centred."""
    taken = min(count, limit)
    return [(2 * i + 1) * count // (2 * taken) for i in range(taken)]
