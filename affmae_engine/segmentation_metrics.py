"""Segmentation scores from a confusion matrix of pixels: IoU and Dice per class, their means, and means per image.

A class without a true pixel cannot be scored: its figures are nan and it is left out of every mean (pixels wrongly
given to it still count against the class they belong to). Counts are int64 and exact, so the scores do not depend on
how the images were cut or in which order they came.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from affmae_engine.data.labels import IGNORE


class Confusion:
    """Pixel counts by (true class, predicted class).

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int) -> None:
        self.counts: NDArray[np.int64] = np.zeros((classes, classes), dtype=np.int64)

    def add(self, prediction: NDArray, truth: NDArray) -> None:
        """Count an image, or a part of one.

        Args:
            prediction: integer classes, any shape.
            truth: integer classes of the same shape; `IGNORE` is not counted.

        Raises:
            ValueError: the shapes differ, or a class is out of range.
        """
        if prediction.shape != truth.shape:
            raise ValueError(f"prediction {prediction.shape} and truth {truth.shape} differ in shape")
        classes = len(self.counts)
        valid = truth != IGNORE
        predicted, true = prediction[valid].astype(np.int64), truth[valid].astype(np.int64)
        for name, values in (("prediction", predicted), ("truth", true)):
            if values.size and (values.min() < 0 or values.max() >= classes):
                raise ValueError(f"{name} holds {values.min()} to {values.max()}, there are {classes} classes")
        self.counts += np.bincount(true * classes + predicted, minlength=classes**2).reshape(classes, classes)

    def __iadd__(self, other: Confusion) -> Confusion:
        """Add the counts of another part of the same data."""
        self.counts += other.counts
        return self

    def iou(self) -> NDArray[np.float64]:
        """Intersection over union per class, nan where the truth has no pixel of it."""
        true, predicted, hit = self._marginals()
        return _ratio(hit, true + predicted - hit, true)

    def dice(self) -> NDArray[np.float64]:
        """Dice coefficient per class, nan where the truth has no pixel of it."""
        true, predicted, hit = self._marginals()
        return _ratio(2 * hit, true + predicted, true)

    def accuracy(self) -> float:
        """Share of the pixels that are right; nan without pixels."""
        total = int(self.counts.sum())
        return float(np.trace(self.counts) / total) if total else float("nan")

    def per_class(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """{class name: {"iou", "dice", "pixels" (true ones)}} in the order of the classes."""
        true = self.counts.sum(axis=1)
        return {
            name: {"iou": float(iou), "dice": float(dice), "pixels": float(pixels)}
            for name, iou, dice, pixels in zip(names, self.iou(), self.dice(), true, strict=True)
        }

    def _marginals(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        return self.counts.sum(axis=1), self.counts.sum(axis=0), np.diagonal(self.counts)


def mean(values: NDArray[np.float64] | Sequence[float]) -> float:
    """Mean of the values that are not nan; nan when there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(np.nanmean(np.asarray(values, dtype=np.float64))) if len(values) else float("nan")


def _ratio(part: NDArray, whole: NDArray, true: NDArray) -> NDArray[np.float64]:
    return np.where(true > 0, part / np.maximum(whole, 1), np.nan)
