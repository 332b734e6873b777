"""Scoring predicted labels against labels drawn by hand: IoU and Dice per class, over all files and per image.

Truth is found and checked as `affmae finetune` does it (by name, as stacks, binary masks per class), so that what was
good for training is good for scoring. Reads a few rows at a time: size does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from affmae_engine.data.labels import IGNORE
from affmae_engine.data.labels.checks import CheckedLabels, check_labels
from affmae_engine.data.labels.pairing import pair_labels
from affmae_engine.data.readers import Source, open_sources
from affmae_engine.errors import InputError
from affmae_engine.predict.stream import PredictReport
from affmae_engine.segmentation_metrics import Confusion, mean

_ROWS_PIXELS = 1 << 24


@dataclass(frozen=True)
class Score:
    """mean_iou, mean_dice: over the classes that the truth has. per_class: {name: {"iou", "dice", "pixels"}}.
    per_image: mean IoU by input name."""

    mean_iou: float
    mean_dice: float
    per_class: dict[str, dict[str, float]]
    per_image: dict[str, float]


def read_truth(
    inputs: Sequence[Path],
    truth: Sequence[Path],
    *,
    class_names: Sequence[str],
    ignore_label: int | None,
    files: Sequence[Path] | None = None,
) -> CheckedLabels:
    """Pair inputs with their true labels and check these; nothing is predicted yet.

    Args:
        inputs: as the user named them; names of labels are compared below these.
        files: what is predicted of them (`files.Plan.files`); None is everything.

    Raises:
        InputError: lists every input without labels, labels of another size, values that are no class.
        ConfigError: the labels are masks of other classes than the model's.
    """
    pairing = pair_labels(inputs, truth, image_files=files)
    return check_labels(pairing, class_names=class_names, ignore_label=ignore_label)


def score(reports: Sequence[PredictReport], truth: CheckedLabels) -> Score:
    """Compare what `predict` wrote with the truth.

    Raises:
        InputError: a prediction has no truth, or cannot be read any more.
    """
    true_of = {(pair.image.info.path.resolve(), pair.image.info.series): pair for pair in truth.pairs}
    total = Confusion(len(truth.class_names))
    per_image: dict[str, float] = {}
    for report in reports:
        pair = true_of.get((report.source.resolve(), report.series))
        if pair is None:
            raise InputError(f"{report.source} has no labels to be scored against", "give labels for every input")
        here = Confusion(len(truth.class_names))
        with open_sources(report.labels, labels=True)[0] as predicted, pair.labels as true:
            _count(predicted, true, truth.ignore_label, here)
        total += here
        per_image[pair.name] = mean(here.iou())
    return Score(mean(total.iou()), mean(total.dice()), total.per_class(truth.class_names), per_image)


def _count(predicted: Source, true: Source, ignore_label: int | None, into: Confusion) -> None:
    depth, height, width = true.info.shape_ZYX
    if predicted.info.shape_ZYX != true.info.shape_ZYX:
        raise InputError(
            f"{predicted.info.path} is {predicted.info.shape_ZYX}, its true labels are {true.info.shape_ZYX} (z, y, x)"
        )
    rows = max(1, _ROWS_PIXELS // width)
    for z in range(depth):
        for first in range(0, height, rows):
            part = slice(z, z + 1), slice(first, min(first + rows, height)), slice(0, width)
            true_ZYX = true.read(*part).astype(np.int64)
            if ignore_label is not None:
                true_ZYX[true_ZYX == ignore_label] = IGNORE
            into.add(predicted.read(*part), true_ZYX)
