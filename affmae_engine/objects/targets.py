"""What a network that learns objects is trained on, from maps of object ids: class, boundary and distance.

The network gives K class logits and two more channels: a boundary logit and a distance logit. Predicted maps, named
by `channel_names`, are what the decoders take. `InstanceLoss` and `ObjectValidation` are what a training task needs
besides; both work on plain tensors and arrays.

Axes: B batch, K classes, C = K + 2 channels, H W image.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from skimage.segmentation import find_boundaries
from torch import Tensor
from torch.nn import functional

from affmae_engine.objects.decode import DecodeOptions
from affmae_engine.objects.make import objects_in_memory
from affmae_engine.objects.maps import BOUNDARY, DISTANCE, ArrayMaps
from affmae_engine.objects.pairs import PairCounts, add_pairs, count_pairs
from affmae_engine.objects.scores import ObjectScores, score_table
from affmae_kernels.precision import without_autocast
from affmae_kernels.segmentation_loss import segmentation_loss

IGNORE = -1
"""Class of pixels without a label."""
DISTANCE_CAP = 16.0
"""Pixels of a training image beyond which distances are not told apart."""
_MOST_CLASSES = 32
_EPSILON = 1.0


@dataclass(frozen=True)
class InstanceTargets:
    """Targets of one image [H, W]: class int64 (`IGNORE` without a label), boundary and distance float32 0 to 1."""

    class_HW: np.ndarray
    boundary_HW: np.ndarray
    distance_HW: np.ndarray


def looks_like_ids(values: Collection[int]) -> bool:
    """Whether the values of a label map are ids of objects rather than classes.

    Ids are many, or not numbered 0, 1, 2, ... as classes are. A mask of 0 and 255 is a class.
    """
    found = {value for value in values if value}
    if found <= {255} or found <= {128, 255}:
        return False
    return len(found) > _MOST_CLASSES or max(found, default=0) > 255


def instance_targets(
    ids_HW: np.ndarray,
    *,
    class_of: np.ndarray | None = None,
    ignore_id: int | None = None,
    cap: float = DISTANCE_CAP,
    width: int = 1,
) -> InstanceTargets:
    """Targets from a map of object ids; 0 is background. The edge of the image is no boundary.

    Boundary is every pixel within `width` of a pixel with another id. Distance is that to the nearest pixel outside of
    the pixel's own object, divided by `cap` and at most 1; 0 in the background.

    Args:
        ids_HW: any integers.
        class_of: class (from 1) by id; None makes every object class 1.
        ignore_id: id of pixels without a label.
        cap: in pixels.
    """
    ids = np.asarray(ids_HW)
    ignored = np.zeros(ids.shape, bool) if ignore_id is None else ids == ignore_id
    position = np.unique(np.where(ignored, 0, ids), return_inverse=True)
    values, local = position[0], position[1].reshape(ids.shape)
    if values[0] != 0:
        values, local = np.concatenate([[0], values]), local + 1
    boundary = find_boundaries(local, connectivity=1, mode="thick")
    if width > 1:
        boundary = ndimage.binary_dilation(boundary, iterations=width - 1)
    distance = np.zeros(ids.shape, np.float32)
    for number, window in enumerate(ndimage.find_objects(local), 1):
        if window is None:
            continue
        # One pixel more on every side, where the image has one: what lies there is outside of the object.
        wide = tuple(slice(max(0, s.start - 1), s.stop + 1) for s in window)
        own = local[wide] == number
        inside = np.full(own.shape, cap) if own.all() else ndimage.distance_transform_edt(own)
        distance[wide][own] = np.minimum(inside[own] / cap, 1)
    classes = (local > 0).astype(np.int64) if class_of is None else np.asarray(class_of, np.int64)[values][local]
    classes[ignored] = IGNORE
    return InstanceTargets(classes, boundary.astype(np.float32), distance)


def channel_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """Names of the channels of a network that predicts objects."""
    return (*class_names, BOUNDARY, DISTANCE)


def to_maps(logits_BCHW: Tensor) -> Tensor:
    """Logits as maps of 0 to 1 in fp32: softmax over the classes, sigmoid of boundary and distance."""
    logits = logits_BCHW.float()
    return torch.cat([logits[:, :-2].softmax(1), logits[:, -2:].sigmoid()], dim=1)


class InstanceLoss:
    """Focal and Dice loss of the classes, cross-entropy and Dice of the boundary, smooth L1 of the distance.

    Args:
        class_weights: one per class.
        boundary_weight, distance_weight: of these terms, relative to the class loss.
        gamma, backend: of the class loss, see `affmae_kernels.segmentation_loss`.
    """

    def __init__(
        self,
        class_weights: Sequence[float],
        *,
        boundary_weight: float = 1.0,
        distance_weight: float = 1.0,
        gamma: float = 2.0,
        backend: str = "auto",
    ) -> None:
        self._class_weights_K = torch.tensor(class_weights, dtype=torch.float32)
        self._boundary_weight, self._distance_weight = boundary_weight, distance_weight
        self._gamma, self._backend = gamma, backend

    def __call__(
        self, logits_BCHW: Tensor, class_BHW: Tensor, boundary_BHW: Tensor, distance_BHW: Tensor
    ) -> dict[str, Tensor]:
        """Scalars in fp32, means over the images: "loss" (what is optimized), "focal", "dice", "boundary", "distance".

        Args:
            logits_BCHW: K class logits, boundary logit, distance logit.
            class_BHW: int64; pixels of `IGNORE` count in no term.
            boundary_BHW, distance_BHW: targets, 0 to 1.

        Raises:
            ValueError: the number of channels is not that of the classes and 2.
        """
        classes = len(self._class_weights_K)
        if logits_BCHW.shape[1] != classes + 2:
            raise ValueError(f"{classes} classes need {classes + 2} channels; got {logits_BCHW.shape[1]}")
        weights_K = self._class_weights_K.to(logits_BCHW.device)
        if not logits_BCHW.is_meta:  # stays on the device, before a step is captured as a CUDA graph
            self._class_weights_K = weights_K
        focal, dice = segmentation_loss(
            logits_BCHW[:, :classes].contiguous(), class_BHW, weights_K, gamma=self._gamma, backend=self._backend
        )
        with without_autocast(logits_BCHW):
            valid_BHW = (class_BHW != IGNORE).float()
            boundary = _boundary_loss(logits_BCHW[:, -2].float(), boundary_BHW, valid_BHW)
            error_BHW = functional.smooth_l1_loss(
                logits_BCHW[:, -1].float().sigmoid(), distance_BHW, reduction="none", beta=0.1
            )
            distance = _mean(error_BHW, valid_BHW)
            loss = focal + dice + self._boundary_weight * boundary + self._distance_weight * distance
        return {"loss": loss, "focal": focal, "dice": dice, "boundary": boundary, "distance": distance}


class ObjectValidation:
    """Object scores over held-out sections: decodes predicted maps and compares the objects with the true ones.

    Args:
        options: of the decoder; sections are decoded one by one.
        cap: of the distance target.
    """

    def __init__(self, options: DecodeOptions | None = None, *, cap: float = DISTANCE_CAP) -> None:
        self._options, self._cap = options or DecodeOptions(sections=True), cap
        self._tables: list[PairCounts] = []

    def add(self, maps_CHW: np.ndarray, ids_HW: np.ndarray, *, ignore_id: int | None = None) -> np.ndarray:
        """Decode one section; returns its objects, uint32 [H, W].

        Args:
            maps_CHW: as `to_maps` gives them for one image; class 0 is background.
            ids_HW: true objects, 0 is background. Pixels of `ignore_id` do not count.
        """
        foreground = 1 - maps_CHW[:1]
        objects = objects_in_memory(ArrayMaps(foreground, maps_CHW[-2:-1], maps_CHW[-1:] * self._cap), self._options)[0]
        counted = np.ones(ids_HW.shape, bool) if ignore_id is None else ids_HW != ignore_id
        pairs = count_pairs(ids_HW[counted], objects[counted])
        # Objects of different sections are different objects.
        offset = np.uint64(len(self._tables)) << np.uint64(40)
        shifted = np.where(pairs.ids_N2 == 0, np.uint64(0), pairs.ids_N2 + offset)
        self._tables.append(PairCounts(shifted, pairs.counts_N))
        return objects

    def scores(self) -> ObjectScores:
        """Scores over all sections so far; `pq` is the one to choose a checkpoint by."""
        return score_table(add_pairs(self._tables))


def _boundary_loss(logit_BHW: Tensor, target_BHW: Tensor, valid_BHW: Tensor) -> Tensor:
    """Cross-entropy plus Dice, since boundaries are a small part of an image."""
    entropy = functional.binary_cross_entropy_with_logits(logit_BHW, target_BHW, reduction="none")
    probability = logit_BHW.sigmoid() * valid_BHW
    target = target_BHW * valid_BHW
    shared = (probability * target).sum((1, 2))
    dice = 1 - (2 * shared + _EPSILON) / (probability.sum((1, 2)) + target.sum((1, 2)) + _EPSILON)
    return _mean(entropy, valid_BHW) + dice.mean()


def _mean(values_BHW: Tensor, valid_BHW: Tensor) -> Tensor:
    """Mean over the valid pixels of each image, then over the images; 0 for an image without any."""
    count_B = valid_BHW.sum((1, 2)).clamp(min=1)
    return ((values_BHW * valid_BHW).sum((1, 2)) / count_B).mean()
